"""Key blocks, and the order of the tokens in which each key block is a run of the sequence."""

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
    """A sequence cut into blocks of any lengths: blocks of video tokens, between blocks of text.

    Attributes:
        starts: int32 `(blocks + 1,)`, the start of each block, and the end of the sequence.
        text_before, text_after: text tokens at either end; the text at an end is one block.
        members: int64 `(video blocks, longest)`, the video tokens of each block, counted from the
            first video token. Shorter blocks are filled up with the number of all video tokens.
        sizes: int64 `(video blocks,)`, the tokens of each video block.
        block_of: int64 `(video tokens,)`, the video block of each video token.
        lengths: `sizes` as Python integers, which can be read without waiting for a device.
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
        """Cut a sequence into video blocks of `lengths` tokens, with text tokens around them.

        Raises:
            ValueError: if there is no block, or a block without tokens.
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
        """Number of all blocks, text included."""
        return self.starts.numel() - 1

    @property
    def video_blocks(self) -> int:
        """Number of blocks of video tokens."""
        return self.members.shape[0]

    @property
    def video(self) -> slice:
        """The positions of the video tokens in the sequence."""
        return slice(self.text_before, self.text_before + self.block_of.numel())

    def padded(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Every block, text included, filled up to a multiple of `size` tokens.

        Returns:
            int64 `(padded tokens,)`, the token at each place, or the number of all tokens at places
            of padding; and int64 `(padded tokens / size,)`, the block of each run of `size` places.
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
            counted: bool `(batch, video tokens)`, False for tokens that are left out.

        Returns:
            `(batch, video blocks, heads, head_dim)`; 0 for a block without a counted token.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        if counted is None:
            tokens = self.sizes[None]
        else:
            # A NaN in padding must not reach a sum.
            x = x.masked_fill(~counted[:, :, None, None], 0)
            tokens = self._sums(counted[:, :, None, None], torch.int64)[:, :, 0, 0]
        return self._sums(x, dtype) / tokens.clamp(min=1)[:, :, None, None]

    def _sums(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Sums of whole rows: scattered additions have no fixed order on a GPU.
        if len(set(self.lengths)) == 1:
            return x.unflatten(1, tuple(self.members.shape)).sum(2, dtype=dtype)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
        rows = x.index_select(1, self.members.flatten()).unflatten(1, tuple(self.members.shape))
        return rows.sum(2, dtype=dtype)

    def cut(self, tile: int) -> KeyBlocks:
        """The video tokens alone in tiles of at most `tile` tokens; no tile lies in two blocks."""
        if tile not in self._tiles:
            lengths = []
            for length in self.lengths:
                lengths += [tile] * (length // tile) + [length % tile] * (length % tile > 0)
            with torch.inference_mode(False):
                self._tiles[tile] = KeyBlocks.of_lengths(lengths, self.starts.device)
        return self._tiles[tile]


@dataclass(frozen=True)
class Partition:
    """An order of the tokens of `grid`: the video tokens block by block, text in its places.

    Blocks at the ends of an axis that is no multiple of the chunk are shorter.

    Attributes:
        grid: the tokens of the sequence.
        chunk: the size of a block: (frames, rows, columns) of a box, or (tokens,) of a run in the
            grid's own order. Sizes beyond the grid's are allowed.
    """

    grid: TokenGrid
    chunk: Chunk
    _on: dict[torch.device, tuple[KeyBlocks, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def lengths(self) -> list[int]:
        """Number of video tokens of each block."""
        return torch.bincount(self._block_of_place()).tolist()

    def key_blocks(self, device: torch.device) -> KeyBlocks:
        """The sequence in the partition's order, cut into blocks."""
        return self._known(device)[0]

    def to_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Bring the tokens `(batch, tokens, ...)` into the partition's order; differentiable.

        Raises:
            ValueError: if `x` does not have the grid's number of tokens.
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
        """int64 `(tokens,)`: the position in the model's sequence of each token of this order."""
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
            # Training after a run in inference mode must be able to use these tensors.
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
