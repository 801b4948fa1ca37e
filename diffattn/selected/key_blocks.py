"""Partitions: the video tokens of a grid in blocks, each a run of the sequence in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from diffattn.grid import TokenGrid
from diffattn.orders import permuted

Chunk: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class KeyBlocks:
    """A sequence cut into blocks of any lengths, those of video tokens between those of text.

    Attributes:
        starts: int32 `(blocks + 1,)`, where each block begins in the sequence, and the end of it.
        text_before, text_after: text tokens at either end, a block each where there are any.
        members: int64 `(video blocks, longest)`, the video tokens of each block, counted from the
            first of the video; the number of them all stands for none in shorter blocks.
        sizes: int64 `(video blocks,)`, the length of each.
        block_of: int64 `(video tokens,)`, the video block of each.
        lengths: the sizes, for those who must not wait for a device.
    """

    starts: torch.Tensor
    text_before: int
    text_after: int
    members: torch.Tensor
    sizes: torch.Tensor
    block_of: torch.Tensor
    lengths: tuple[int, ...]
    _tiles: dict[int, KeyBlocks] = field(default_factory=dict, repr=False)
    _padded: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_lengths(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        text_before: int = 0,
        text_after: int = 0,
    ) -> KeyBlocks:
        """Cut a sequence into video blocks of these lengths, with so many tokens of text around.

        Raises:
            ValueError: if there is no block, or one without tokens.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"blocks need at least one token each, but are of {list(lengths)}")
        size = torch.tensor(lengths)
        ends = size.cumsum(0)
        video = int(ends[-1])
        before, after = ([n] if n else [] for n in (text_before, text_after))
        all_lengths = torch.tensor([0, *before, *lengths, *after])
        place = torch.arange(int(size.max()))
        members = (ends - size)[:, None] + place
        members[place >= size[:, None]] = video
        return cls(
            starts=all_lengths.cumsum(0).to(device, torch.int32),
            text_before=text_before,
            text_after=text_after,
            members=members.to(device),
            sizes=size.to(device),
            block_of=torch.arange(len(lengths)).repeat_interleave(size).to(device),
            lengths=tuple(lengths),
        )

    @property
    def blocks(self) -> int:
        """All blocks, text included."""
        return self.starts.numel() - 1

    @property
    def video_blocks(self) -> int:
        return self.members.shape[0]

    @property
    def video(self) -> slice:
        """Where the video tokens are in the sequence."""
        return slice(self.text_before, self.text_before + self.block_of.numel())

    def padded(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Every block, text included, filled up to a multiple of `size` tokens.

        Returns:
            int64 `(padded tokens,)`, the token at each place, their number where there is none; and
            int64 `(padded tokens / size,)`, the block of each run of `size`.
        """
        if size not in self._padded:
            with torch.inference_mode(False):
                before, after = ([n] if n else [] for n in (self.text_before, self.text_after))
                lengths = torch.tensor([*before, *self.lengths, *after])
                runs = (lengths + size - 1) // size
                block = torch.arange(len(lengths)).repeat_interleave(runs)
                of_place = block.repeat_interleave(size)
                first = (runs.cumsum(0) - runs) * size
                place = torch.arange(len(of_place)) - first[of_place]
                token = place + (lengths.cumsum(0) - lengths)[of_place]
                token[place >= lengths[of_place]] = int(lengths.sum())
                device = self.starts.device
                self._padded[size] = token.to(device), block.to(device)
        return self._padded[size]

    def means(self, x: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        """The mean of each block's tokens, in float32 at least.

        Args:
            x: `(batch, video tokens, heads, head_dim)`.
            counted: bool `(batch, video tokens)`, false for tokens that are left out.

        Returns:
            `(batch, video blocks, heads, head_dim)`; 0 for a block without a token that counts.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        if counted is None:
            tokens = self.sizes[None]
        else:
            # Whatever a caller leaves in padding must not become a NaN.
            x = x.masked_fill(~counted[:, :, None, None], 0)
            tokens = self._sums(counted[:, :, None, None], torch.int64)[:, :, 0, 0]
        return self._sums(x, dtype) / tokens.clamp(min=1)[:, :, None, None]

    def _sums(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Sums of whole rows, not scattered additions: those have no fixed order on a GPU.
        if len(set(self.lengths)) == 1:
            return x.unflatten(1, tuple(self.members.shape)).sum(2, dtype=dtype)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
        rows = x.index_select(1, self.members.flatten()).unflatten(1, tuple(self.members.shape))
        return rows.sum(2, dtype=dtype)

    def cut(self, tile: int) -> KeyBlocks:
        """The same video tokens in tiles of at most so many tokens, none of them in two blocks."""
        if tile not in self._tiles:
            lengths = []
            for length in self.lengths:
                lengths += [tile] * (length // tile) + [length % tile] * (length % tile > 0)
            with torch.inference_mode(False):
                self._tiles[tile] = KeyBlocks.of_lengths(lengths, self.starts.device)
        return self._tiles[tile]


@dataclass(frozen=True)
class Partition:
    """The tokens of `grid` with its video tokens block by block; text keeps its places.

    Blocks at the ends of an axis that is no multiple of the chunk are shorter.

    Attributes:
        grid: the tokens of the sequence.
        chunk: of blocks that are boxes, frames, rows and columns; of runs of tokens in the
            grid's own order, their length alone. More than the grid has is all of it.
    """

    grid: TokenGrid
    chunk: Chunk
    _on: dict[torch.device, tuple[KeyBlocks, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def lengths(self) -> list[int]:
        """Video tokens of each block."""
        return torch.bincount(self._block_of_place()).tolist()

    def key_blocks(self, device: torch.device) -> KeyBlocks:
        """The sequence in the partition's order, cut into blocks."""
        return self._known(device)[0]

    def to_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Bring the tokens `(batch, tokens, ...)` into the partition's order; differentiable.

        Raises:
            ValueError: if there are not as many tokens as in the grid.
        """
        self._check_tokens(x)
        if self._keeps_order:
            return x
        _, there, back = self._known(x.device)
        return permuted(x, there, back, 1)

    def from_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `to_blocks`."""
        self._check_tokens(x)
        if self._keeps_order:
            return x
        _, there, back = self._known(x.device)
        return permuted(x, back, there, 1)

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64 `(tokens,)`: where in the model's sequence each token of this order is."""
        return self._known(torch.device(device))[1]

    def _check_tokens(self, x: torch.Tensor) -> None:
        if x.shape[1] != self.grid.tokens:
            raise ValueError(
                f"dimension 1 of a tensor of shape {tuple(x.shape)} has not the {self.grid.tokens}"
                f" tokens of {self.grid}"
            )

    @property
    def _keeps_order(self) -> bool:
        return len(self.chunk) == 1

    def _known(self, device: torch.device) -> tuple[KeyBlocks, torch.Tensor, torch.Tensor]:
        if device not in self._on:
            # A run in inference mode must leave tensors that training can use.
            with torch.inference_mode(False):
                grid = self.grid
                block = self._block_of_place()
                video = block.argsort(stable=True) + grid.video.start
                token = torch.arange(grid.tokens)
                there = torch.cat([token[: grid.video.start], video, token[grid.video.stop :]])
                blocks = KeyBlocks.of_lengths(
                    torch.bincount(block).tolist(),
                    device,
                    text_before=grid.text_before,
                    text_after=grid.text_after,
                )
                self._on[device] = blocks, there.to(device), there.argsort().to(device)
        return self._on[device]

    def _block_of_place(self) -> torch.Tensor:
        """int64 `(video tokens,)`: the block of each video token in the grid's own order."""
        grid = self.grid
        place = torch.arange(grid.video_tokens)
        if self._keeps_order:
            return place // self.chunk[0]
        out = torch.zeros_like(place)
        sizes = (grid.frames, grid.height, grid.width)
        axes = grid.coordinates(place + grid.video.start)
        for axis, size, side in zip(axes, sizes, self.chunk, strict=True):
            out = out * -(-size // side) + axis // side
        return out
