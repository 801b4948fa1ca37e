"""Fragments: the pieces between block boundaries and frame boundaries of a token sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from diffattn.grid import TokenGrid


@dataclass(frozen=True)
class Fragments:
    """The video tokens of a grid, cut at every block boundary and every frame boundary.

    All tensors are int64 `(fragments,)`, in sequence order.

    Attributes:
        block: block of the sequence that the fragment lies in, counted with the text before it.
        frame: latent frame it belongs to.
        first, last: its first and last token, counted from the start of the frame.
    """

    block: torch.Tensor
    frame: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @property
    def size(self) -> torch.Tensor:
        """Tokens of each fragment."""
        return self.last - self.first + 1


def cut(grid: TokenGrid, block_size: int, device: torch.device) -> Fragments:
    """Cut the video tokens of `grid` into fragments for blocks of `block_size` tokens."""
    offset, end = grid.video.start, grid.video.stop
    frame_starts = torch.arange(offset, end, grid.frame_tokens, device=device)
    block_starts = torch.arange(0, end, block_size, device=device)
    start = torch.cat([frame_starts, block_starts[block_starts >= offset]]).unique()
    stop = torch.cat([start[1:], start.new_tensor([end])])
    frame = (start - offset) // grid.frame_tokens
    first = start - offset - frame * grid.frame_tokens
    return Fragments(start // block_size, frame, first, first + stop - start - 1)


class InBlocks(Protocol):
    """Pieces of a sequence that know the block they lie in, int64 `(pieces,)`."""

    @property
    def block(self) -> torch.Tensor: ...


def any_in_block(
    pairs: torch.Tensor, query: InBlocks, key: InBlocks, rows: int, columns: int
) -> torch.Tensor:
    """Which blocks hold a pair of pieces that is marked.

    Args:
        pairs: bool `(query pieces, key pieces)`.
        query, key: where those pieces lie.
        rows, columns: number of query and key blocks of the sequence.

    Returns:
        bool `(rows, columns)`.
    """
    device = pairs.device
    by_row = torch.zeros(rows, pairs.shape[1], dtype=torch.int32, device=device)
    by_row.index_add_(0, query.block, pairs.to(torch.int32))
    out = torch.zeros(rows, columns, dtype=torch.int32, device=device)
    return out.index_add_(1, key.block, by_row) > 0
