"""The tiles of VSA: boxes of the video and runs of other tokens, filled up to blocks of a kernel.

Tiles of other tokens come first. No tile has tokens of two segments or of two spans. At the end of
an axis that is no multiple of the tile, tiles are short. A short tile is filled up with places that
no query sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from diffattn.orders import permuted
from diffattn.routing.lists import Held
from diffattn.selected.by_kernels import selection_kernels
from diffattn.selected.key_blocks import KeyBlocks, Partition
from diffattn.spans import Span, division_of

# Places per block of the kernels; a tile is one or several blocks.
BLOCK = 64


@dataclass(frozen=True, eq=False)
class Tiling:
    """A sequence in tiles, with places between them.

    Attributes:
        lengths: tokens of each tile, without the places that fill it up.
        owner: int64 (tiles,), the number of the span that a tile lies in; -1 for other tokens.
        span_tiles: the number of tiles of each span.
        token: int64 (places,), the token at each place. Places that fill up a tile have numbers
            from the number of all tokens on.
        place: int64 (places,), the inverse of `token`.
        filled: bool (places,), False for places that fill up a tile; None if every tile is full.
        tiles: the tiles as blocks of places.
        tile_of_block: int64 (blocks,), the tile of each block of `BLOCK` places.
        held: the keys of each block of `BLOCK` places; None if every tile is full.
        copy: int64 (places,), the copy that `spread` takes for each place; None for all copies.
    """

    lengths: tuple[int, ...]
    owner: torch.Tensor
    span_tiles: tuple[int, ...]
    token: torch.Tensor
    place: torch.Tensor
    filled: torch.Tensor | None
    tiles: KeyBlocks
    tile_of_block: torch.Tensor
    held: Held | None
    copy: torch.Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return sum(self.lengths)

    @property
    def places(self) -> int:
        return self.token.numel()

    def placed(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (batch, tokens, ...) at their places, with 0 at all others: (batch, places, ...).

        Differentiable.
        """
        missing = self.places - self.tokens
        if missing and x.ndim == 4 and selection_kernels(x) is not None:
            return self.tiles.moved(x, self.token, self.placed)[0]
        if missing:
            x = F.pad(x, (*(0,) * (2 * (x.ndim - 2)), 0, missing))
        return permuted(x, self.token, self.place, 1)

    def pooled(
        self, x: torch.Tensor, counted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `placed` gives, and the means of the tiles; differentiable.

        Args:
            x: (batch, tokens, heads, head_dim).
            counted: bool (batch, places), False for places that count in no mean.

        Returns:
            (batch, places, heads, head_dim); (batch, tiles, heads, head_dim), in float32 at least.
        """
        return self.tiles.moved(x, self.token, self.placed, counted)

    def unplaced(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `placed`."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x.index_select(1, self.place[: self.tokens])
        return permuted(x, self.place, self.token, 1)[:, : self.tokens]

    def counted(self, key_mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """The places that hold a key which is not padding: bool (batch, places); None for all.

        Args:
            key_mask: bool (batch, tokens), False for padding.
            batch: the number of samples.
        """
        if key_mask is not None:
            return self.placed(key_mask)
        return None if self.filled is None else self.filled.expand(batch, -1)

    def of_blocks(self, chosen: torch.Tensor) -> torch.Tensor:
        """Pairs of tiles (..., tiles, tiles) as pairs of blocks, bool (..., blocks, blocks)."""
        if len(self.tile_of_block) == len(self.lengths):
            return chosen
        return chosen.index_select(-2, self.tile_of_block).index_select(-1, self.tile_of_block)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Give every place of a tile the tile's own value; differentiable.

        Args:
            x: (batch, tiles, heads, head_dim).

        Returns:
            (batch, places, heads, head_dim).
        """
        longest = max(self.tiles.lengths)
        x = x[:, :, None].expand(-1, -1, longest, -1, -1).flatten(1, 2)
        # No copy is taken twice, so that the backward adds in a fixed order.
        return x if self.copy is None else x.index_select(1, self.copy)

    @property
    def tile_of_token(self) -> torch.Tensor:
        """int64 (tokens,): the tile of each token, in the order of the sequence."""
        return self.tile_of_block.repeat_interleave(BLOCK)[self.place[: self.tokens]]


def tiling_of(
    tokens: int,
    spans: Sequence[Span],
    tile: tuple[int, int, int],
    device: torch.device | str = "cpu",
    *,
    segments: Sequence[int] | None = None,
) -> Tiling:
    """Cut a sequence into tiles.

    Args:
        tokens: tokens of the sequence.
        spans: the rectangles that are cut into boxes.
        tile: frames, rows and columns of a box. Runs of other tokens are as long as a box has
            tokens.
        device: the device of the tensors.
        segments: the lengths of the segments of other tokens, in the order of the sequence. By
            default every run of other tokens between two spans is a segment.
    """
    size = math.prod(tile)
    division = division_of(spans[0].grid, spans)
    others = division.outside(torch.arange(tokens)[None])[0]
    if segments is None:
        # A segment ends where the next token is not the next of the sequence.
        ends = (others.diff() != 1).nonzero()[:, 0] + 1
        bounds = [0, *ends.tolist(), len(others)]
        segments = [stop - start for start, stop in pairwise(bounds)]
    lengths: list[int] = []
    for length in segments:
        lengths += [size] * (length // size) + [length % size] * (length % size > 0)
    owner = [-1] * len(lengths)
    sequence, span_tiles = [others], []
    for number, span in enumerate(spans):
        partition = Partition(span.grid, tile)
        of_span = partition.lengths()
        lengths += of_span
        owner += [number] * len(of_span)
        span_tiles.append(len(of_span))
        sequence.append(partition.positions()[span.grid.video])
    at_place, tile_of_block = KeyBlocks.of_lengths(lengths).padded(BLOCK)
    filled = at_place < tokens
    # The places that fill up tiles take tokens past the end, so that there is an inverse.
    at_place = at_place.masked_scatter(~filled, torch.arange(tokens, len(at_place)))
    token = torch.cat([*sequence, torch.arange(tokens, len(at_place))])[at_place]
    filled_up = [-(-n // BLOCK) * BLOCK for n in lengths]
    copies = KeyBlocks.of_lengths(filled_up).members < len(at_place)
    return Tiling(
        lengths=tuple(lengths),
        owner=torch.tensor(owner, device=device),
        span_tiles=tuple(span_tiles),
        token=token.to(device),
        place=token.argsort().to(device),
        filled=None if filled.all() else filled.to(device),
        held=None if filled.all() else Held.of(filled, BLOCK).to(device),
        tiles=KeyBlocks.of_lengths(filled_up, device),
        tile_of_block=tile_of_block.to(device),
        copy=None if copies.all() else copies.flatten().nonzero()[:, 0].to(device),
    )
