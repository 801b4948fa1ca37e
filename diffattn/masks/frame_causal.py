"""Causality between blocks of frames, for models that make a video block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.blocks import EMPTY, FULL
from diffattn.distinct import distinct_rows
from diffattn.masks.base import AttentionMask, Blocking

# Blocks of frames, for tokens outside of the video: as a query after all others, as a key before.
_AFTER, _BEFORE = 1 << 20, -1


@dataclass(frozen=True, eq=False)
class FrameCausalMask(AttentionMask):
    """Frames see their own block of frames and those before; other tokens see and are seen by all.

    The blocks have `grid.causal_frames` frames each, the last perhaps fewer.
    """

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self._frame_block(key, _BEFORE) <= self._frame_block(query, _AFTER)

    def _frame_block(self, token: torch.Tensor, other: int) -> torch.Tensor:
        frame, _, _ = self.grid.coordinates(token)
        return (frame // self.grid.causal_frames).where(~self.grid.is_text(token), other)

    def _in_blocks(self, blocking: Blocking, size: int, other: int) -> torch.Tensor:
        """The block of frames of each token, int64 (blocks, size), by blocks of the sequence.

        The last token fills the last block.
        """
        token = torch.arange(self.grid.tokens, device=blocking.device)
        if blocking.order is not None:
            token = blocking.order.positions(blocking.device)
        blocks = -(-self.grid.tokens // size)
        place = torch.arange(blocks * size, device=blocking.device).clamp(max=len(token) - 1)
        return self._frame_block(token[place], other).view(blocks, size)

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        states = super().block_states(blocking)
        query = self._in_blocks(blocking, blocking.block_q, _AFTER)
        key = self._in_blocks(blocking, blocking.block_kv, _BEFORE)
        states[key.amin(1)[None, :] > query.amax(1)[:, None]] = EMPTY
        states[key.amax(1)[None, :] <= query.amin(1)[:, None]] = FULL
        return states

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        # A mask depends on the steps inside of its blocks, and on how far these are apart.
        query = self._in_blocks(blocking, blocking.block_q, _AFTER)
        key = self._in_blocks(blocking, blocking.block_kv, _BEFORE)
        whole = key.amax(1)[column] <= query.amin(1)[row]
        apart = key[column, 0] - query[row, 0]
        _, steps_q = distinct_rows(query - query[:, :1])
        _, steps_k = distinct_rows(key - key[:, :1])
        kind = torch.stack([apart, steps_q[row], steps_k[column]], dim=1)
        _, kind = distinct_rows(kind.masked_fill(whole[:, None], 0))
        return kind.masked_fill(whole, -1)
