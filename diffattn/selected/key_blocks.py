"""Key blocks, and the order of the tokens in which each key block is a run of the sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch

from diffattn.grid import TokenGrid
from diffattn.orders import permuted
from diffattn.selected.by_kernels import selection_kernels

Chunk: TypeAlias = tuple[int, ...]

# A program of the kernel that pools reads a whole block: longer blocks would keep a GPU waiting.
_LONGEST_POOLED = 1024


@dataclass(frozen=True, eq=False)
class KeyBlocks:
    """A sequence cut into blocks of any lengths: blocks of video tokens, between other blocks.

    Attributes:
        starts: int32 `(blocks + 1,)`, the start of each block, and the end of the sequence.
        others_before, others_after: lengths of the blocks at either end that hold no video tokens,
            but text, or tokens of other pictures.
        members: int64 `(video blocks, longest)`, the video tokens of each block, counted from the
            first video token. Shorter blocks are filled up with the number of all video tokens.
        sizes: int64 `(video blocks,)`, the tokens of each video block.
        block_of: int64 `(video tokens,)`, the video block of each video token.
        lengths: `sizes` as Python integers, which can be read without waiting for a device.
    """

    starts: torch.Tensor
    others_before: tuple[int, ...]
    others_after: tuple[int, ...]
    members: torch.Tensor
    sizes: torch.Tensor
    block_of: torch.Tensor
    lengths: tuple[int, ...]
    _tiles: dict[int, KeyBlocks] = field(default_factory=dict, repr=False)
    _padded: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)
    _slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_lengths(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        text_before: int = 0,
        text_after: int = 0,
        others_before: Sequence[int] = (),
        others_after: Sequence[int] = (),
    ) -> KeyBlocks:
        """Cut a sequence into video blocks of `lengths` tokens, with other tokens around them.

        Args:
            lengths: tokens of each video block.
            device: the device of the tensors.
            text_before, text_after: text tokens at either end; the text at an end is one block.
            others_before, others_after: lengths of further blocks next to the video blocks.

        Raises:
            ValueError: if there is no block, or a block without tokens.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"blocks need at least one token each, but are of {list(lengths)}")
        size = torch.tensor(lengths)
        ends = size.cumsum(0)
        video = int(ends[-1])
        before = ((text_before,) if text_before else ()) + tuple(others_before)
        after = tuple(others_after) + ((text_after,) if text_after else ())
        all_lengths = torch.tensor([0, *before, *lengths, *after])
        place = torch.arange(int(size.max()))
        members = (ends - size)[:, None] + place
        members[place >= size[:, None]] = video
        return cls(
            starts=all_lengths.cumsum(0).to(device, torch.int32),
            others_before=before,
            others_after=after,
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
        start = sum(self.others_before)
        return slice(start, start + self.block_of.numel())

    def padded(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Every block, text included, filled up to a multiple of `size` tokens.

        Returns:
            int64 `(padded tokens,)`, the token at each place, or the number of all tokens at places
            of padding; and int64 `(padded tokens / size,)`, the block of each run of `size` places.
        """
        if size not in self._padded:
            with torch.inference_mode(False):
                lengths = torch.tensor([*self.others_before, *self.lengths, *self.others_after])
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
        kernels = selection_kernels(x) if self._longest <= _LONGEST_POOLED else None
        if kernels is not None:
            _, means = kernels.pooled(x, self._video_starts, self._longest, counted=counted)
            return means
        dtype = torch.promote_types(x.dtype, torch.float32)
        if counted is None:
            tokens = self.sizes[None]
        else:
            # A NaN in padding must not reach a sum.
            x = x.masked_fill(~counted[:, :, None, None], 0)
            tokens = self._sums(counted[:, :, None, None], torch.int64)[:, :, 0, 0]
        return self._sums(x, dtype) / tokens.clamp(min=1)[:, :, None, None]

    def moved(
        self,
        x: torch.Tensor,
        there: torch.Tensor,
        move: Callable[[torch.Tensor], torch.Tensor],
        counted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens in the places of the blocks, and the means of the blocks; differentiable.

        Args:
            x: `(batch, tokens, heads, head_dim)`.
            there: int64 `(video tokens,)`, the token at each place, or a number past the last token
                for a place of zeros.
            move: moves `x` so in torch's operators, where no kernel takes `x`.
            counted: bool `(batch, video tokens)`, False for places that are left out.

        Returns:
            `(batch, video tokens, heads, head_dim)`; and what `means` gives for them.
        """
        kernels = selection_kernels(x) if self._longest <= _LONGEST_POOLED else None
        if kernels is None:
            x = move(x)
            return x, self.means(x, counted)
        moved, means = kernels.pooled(
            x, self._video_starts, self._longest, token=there, counted=counted
        )
        return moved, means

    def parts(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Every video block cut into equally many parts of `size` tokens; the last may be empty.

        Returns:
            int32 `(video blocks * parts + 1,)`, the first video token of each part, and the end;
            bool `(1, video blocks, parts)`, whether a part has tokens.
        """
        if size not in self._slots:
            with torch.inference_mode(False):
                length = torch.tensor(self.lengths)
                end = length.cumsum(0)[:, None]
                place = torch.arange(0, self._longest, size)
                start = torch.minimum(end - length[:, None] + place, end)
                starts = torch.cat([start.flatten(), end[-1]]).to(torch.int32)
                exists = place < length[:, None]
                device = self.sizes.device
                self._slots[size] = starts.to(device), exists[None].to(device)
        return self._slots[size]

    @cached_property
    def logarithms(self) -> torch.Tensor:
        """float32 `(1, 1, video blocks)`: the logarithm of each block's number of tokens."""
        with torch.inference_mode(False):
            return self.sizes.float().log()[None, None]

    @cached_property
    def _longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def _video_starts(self) -> torch.Tensor:
        """int32 `(video blocks + 1,)`: the first video token of each block, and the end."""
        first = len(self.others_before)
        starts = self.starts[first : first + self.video_blocks + 1]
        return starts - starts[0] if first else starts.contiguous()

    def holds_any(self, counted: torch.Tensor) -> torch.Tensor:
        """Whether any token of a block counts: bool `(batch, video blocks)`.

        Args:
            counted: bool `(batch, video tokens)`, False for tokens that are left out.
        """
        return self.means(counted[:, :, None, None].float())[:, :, 0, 0] > 0

    def _sums(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Sums of whole rows: scattered additions have no fixed order on a GPU.
        if len(set(self.lengths)) == 1:
            return x.unflatten(1, tuple(self.members.shape)).sum(2, dtype=dtype)
        longest = self.lengths[0]
        whole = len(self.lengths) - 1
        if self.lengths[-1] < longest and self.lengths.count(longest) == whole:
            # Only the last block is short: no copy of all other blocks is needed.
            ends = whole * longest
            last = torch.nn.functional.pad(x[:, ends:], (0, 0, 0, 0, 0, longest - self.lengths[-1]))
            parts = (x[:, :ends].unflatten(1, (whole, longest)), last[:, None])
            return torch.cat([part.sum(2, dtype=dtype) for part in parts], 1)
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


class InBlocks(ABC):
    """An order of the tokens of `grid` in which each block is a run."""

    grid: TokenGrid

    @abstractmethod
    def lengths(self) -> list[int]:
        """Number of video tokens of each block."""

    @abstractmethod
    def _known(self, device: torch.device) -> tuple[KeyBlocks, torch.Tensor, torch.Tensor]:
        """The blocks, the position in the sequence of each token, and the inverse of these."""

    @property
    def _keeps_order(self) -> bool:
        """Whether the order is that of the sequence."""
        return False

    def key_blocks(self, device: torch.device) -> KeyBlocks:
        """The sequence in this order, cut into blocks."""
        return self._known(device)[0]

    def to_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Bring the tokens `(batch, tokens, ...)` into this order; differentiable.

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


@dataclass(frozen=True)
class Partition(InBlocks):
    """An order of the tokens of `grid`: the video tokens block by block, text in its places.

    Blocks at the ends of an axis that is no multiple of the chunk are shorter.

    Attributes:
        grid: the tokens of the sequence.
        chunk: the size of a block: (frames, rows, columns) of a box, or (tokens,) of a run in the
            grid's own order. Sizes beyond the grid's are allowed.
    """

    grid: TokenGrid
    chunk: Chunk
    _counted: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _on: dict[torch.device, tuple[KeyBlocks, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def lengths(self) -> list[int]:
        if not self._counted:
            self._counted.extend(torch.bincount(self._block_of_place()).tolist())
        return self._counted.copy()

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
                    self.lengths(),
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


@dataclass(frozen=True)
class JointPartition(InBlocks):
    """The partitions of several pictures or videos of one sequence, one after another.

    All other tokens come first, as one block.

    Attributes:
        parts: partitions over as many tokens, each with another picture for the video.
    """

    parts: tuple[Partition, ...]
    _on: dict[torch.device, tuple[KeyBlocks, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _pools: dict[torch.device, tuple[KeyBlocks, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def grid(self) -> TokenGrid:  # type: ignore[override]
        return self.parts[0].grid

    def lengths(self) -> list[int]:
        return [length for part in self.parts for length in part.lengths()]

    def pools(self, device: torch.device) -> tuple[KeyBlocks, ...]:
        """For each part the blocks of the sequence, where those of this part hold the video."""
        if device not in self._pools:
            lengths = [part.lengths() for part in self.parts]
            others = self.grid.tokens - sum(map(sum, lengths))
            with torch.inference_mode(False):
                self._pools[device] = tuple(
                    KeyBlocks.of_lengths(
                        lengths[n],
                        device,
                        text_before=others,
                        others_before=[x for part in lengths[:n] for x in part],
                        others_after=[x for part in lengths[n + 1 :] for x in part],
                    )
                    for n in range(len(self.parts))
                )
        return self._pools[device]

    def _known(self, device: torch.device) -> tuple[KeyBlocks, torch.Tensor, torch.Tensor]:
        if device not in self._on:
            with torch.inference_mode(False):
                token = torch.arange(self.grid.tokens)
                inside = torch.zeros_like(token, dtype=torch.bool)
                for part in self.parts:
                    inside[part.grid.video] = True
                pictures = [part.positions()[part.grid.video] for part in self.parts]
                there = torch.cat([token[~inside], *pictures])
                others = int((~inside).sum())
                blocks = KeyBlocks.of_lengths(self.lengths(), device, text_before=others)
                self._on[device] = blocks, there.to(device), there.argsort().to(device)
        return self._on[device]
