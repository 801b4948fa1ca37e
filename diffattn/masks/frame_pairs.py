"""FramePairsMask: whole frames of a video see whole frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.blocks import EMPTY, FULL, PARTIAL
from diffattn.distinct import distinct_rows
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask, Blocking, tokens_of_blocks

# Frames that change inside of a block, at most, for blocks to be told by numbers: the pairs of so
# many runs fit the bits of an int64. More are in blocks of videos with small frames, of which there
# are few.
_MOST_RUNS = 7


@dataclass(frozen=True, eq=False)
class FramePairsMask(AttentionMask):
    """A video token sees all tokens of some frames; text pairs never attend.

    Attributes:
        relation: bool `(frames, frames of the keys)`: whether the tokens of a frame see those of
            another.
        keys: the grid whose video tokens are the keys, over the same tokens as `grid`; None for
            `grid` itself.

    Raises:
        ValueError: if `relation` does not have one entry per pair of frames.
    """

    relation: torch.Tensor
    keys: TokenGrid | None = None

    def __post_init__(self) -> None:
        frames = self.grid.frames, self._key_grid.frames
        if tuple(self.relation.shape) != frames:
            raise ValueError(
                f"relation has shape {tuple(self.relation.shape)}, but the grids have"
                f" {frames[0]} x {frames[1]} frames"
            )

    @property
    def _key_grid(self) -> TokenGrid:
        return self.keys or self.grid

    def _seen(self, device: torch.device) -> torch.Tensor:
        """`relation` with one more row and column, of tokens that are in no frame."""
        return torch.nn.functional.pad(self.relation, (0, 1, 0, 1)).to(device)

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = self._seen(query.device)
        return seen[_frames_of(self.grid, query), _frames_of(self._key_grid, key)]

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        # Pairs of tokens that attend, and all pairs, by the tokens of each frame in each block.
        query = _held(self.grid, blocking, blocking.block_q)
        key = _held(self._key_grid, blocking, blocking.block_kv)
        attend = query @ self._seen(blocking.device).double() @ key.T
        states = torch.full(attend.shape, PARTIAL, dtype=torch.uint8, device=blocking.device)
        states[attend == 0] = EMPTY
        states[attend == query.sum(1)[:, None] * key.sum(1)] = FULL
        return states

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor | None:
        if not row.numel():
            return row
        # A mask is determined by the places in its blocks where the frame changes, and by the
        # pairs of the runs between them.
        query = _Runs.of(self.grid, blocking, blocking.block_q)
        key = _Runs.of(self._key_grid, blocking, blocking.block_kv)
        if max(query.most, key.most) > _MOST_RUNS:
            return None
        seen = self._seen(row.device)
        pairs = torch.zeros_like(row)
        for frame_q in query.frames[row].unbind(1):
            for frame_kv in key.frames[column].unbind(1):
                pairs = pairs * 2 + seen[frame_q, frame_kv]
        kinds = torch.stack([pairs, query.shape[row], key.shape[column]], 1)
        return distinct_rows(kinds)[1]


@dataclass(frozen=True)
class _Runs:
    """The blocks of a sequence as runs of tokens of one frame.

    Attributes:
        shape: int64 `(blocks,)`: blocks of one number change the frame in the same places.
        frames: int64 `(blocks, runs)`: the frame of each run; the last is repeated where a block
            has fewer runs than others.
        most: the largest number of runs of a block.
    """

    shape: torch.Tensor
    frames: torch.Tensor
    most: int

    @classmethod
    def of(cls, grid: TokenGrid, blocking: Blocking, size: int) -> _Runs:
        block = torch.arange(-(-grid.tokens // size), device=blocking.device)
        frame = _frames_of(grid, tokens_of_blocks(grid, block, size, blocking))  # (blocks, size)
        changes = torch.nn.functional.pad(frame[:, 1:] != frame[:, :-1], (1, 0))
        run = changes.cumsum(1)
        most = int(run.max()) + 1
        frames = frame[:, -1:].repeat(1, most).scatter(1, run, frame)
        return cls(distinct_rows(changes)[1], frames, most)


def _frames_of(grid: TokenGrid, token: torch.Tensor) -> torch.Tensor:
    """The frame of sequence positions, `grid.frames` for tokens that are in none."""
    frame, _, _ = grid.coordinates(token)
    return frame.where(~grid.is_text(token), grid.frames)


def _held(grid: TokenGrid, blocking: Blocking, size: int) -> torch.Tensor:
    """Tokens of each frame, and of none, in each block: float64 `(blocks, frames + 1)`."""
    token = torch.arange(grid.tokens, device=blocking.device)
    block, place = token // size, token
    if blocking.order is not None:
        place = blocking.order.positions(blocking.device)
    count = -(-grid.tokens // size) * (grid.frames + 1)
    out = torch.zeros(count, dtype=torch.float64, device=blocking.device)
    out.index_add_(
        0,
        block * (grid.frames + 1) + _frames_of(grid, place),
        torch.ones(grid.tokens, dtype=torch.float64, device=blocking.device),
    )
    return out.view(-1, grid.frames + 1)
