"""AttentionMask: the token-exact rule of a static attention pattern, and its algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from diffattn._checks import is_whole
from diffattn.blocks import (
    EMPTY,
    FULL,
    PARTIAL,
    BlockLayout,
    layout_from_states,
    pack_bits,
    pairs_per_chunk,
)
from diffattn.grid import TokenGrid
from diffattn.orders import TileOrder

BLOCK = 128  # the default block size of the kernels, in tokens
# A partial block has a bit for each of its token pairs: 8 MiB at this size.
_LARGEST_BLOCK = 8192


@dataclass(frozen=True)
class Blocking:
    """The way in which the tokens of a grid are cut into blocks of a mask.

    Attributes:
        block_q: query tokens per block.
        block_kv: key tokens per block.
        device: the device on which the blocks are computed.
        order: the order that queries and keys are put in before the cut; None leaves them in the
            order of the sequence.
    """

    block_q: int
    block_kv: int
    device: torch.device
    order: TileOrder | None = None


@dataclass(frozen=True, eq=False)
class AttentionMask(ABC):
    """The token pairs of a self-attention over `grid` that attend.

    Masks combine with `&`, `|` and `~`. Two tokens attend when `allowed(query, key)` is true, and
    all other methods follow from `allowed`. A subclass overrides `block_states` for speed:
    building the blocks then does not look at every token pair. Blocks may be cut in another order
    of the tokens than the sequence's. `allowed` always takes positions in the sequence.

    Attributes:
        grid: the tokens, which are queries and keys alike.
    """

    grid: TokenGrid
    _layouts: dict[Blocking, BlockLayout] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether pairs of sequence positions attend.

        Args:
            query, key: int64 positions, of shapes that broadcast together.

        Returns:
            bool, in the common shape or in a shape that expands to it.
        """

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        """The state of every block, uint8 `(rows, columns)`: EMPTY, PARTIAL or FULL.

        EMPTY and FULL must be certain. Any block may be PARTIAL: the token pairs of partial blocks
        are looked at one by one.
        """
        rows = -(-self.grid.tokens // blocking.block_q)
        columns = -(-self.grid.tokens // blocking.block_kv)
        return torch.full((rows, columns), PARTIAL, dtype=torch.uint8, device=blocking.device)

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor | None:
        """Numbers of n blocks, int64 `(n,)`: blocks of equal number hold equal token masks.

        None where the mask would have to look at the tokens.

        Args:
            row, column: int64 `(n,)`, indices of the blocks.
            blocking: the way in which the tokens are cut into blocks.
        """
        return None

    @property
    def kept_bytes(self) -> int:
        """Memory of the layouts that `blocks` has kept."""
        return sum(layout.nbytes for layout in self._layouts.values())

    def blocks(
        self,
        block_q: int = BLOCK,
        block_kv: int | None = None,
        device: torch.device | str = "cpu",
        order: TileOrder | None = None,
    ) -> BlockLayout:
        """The mask as index lists of blocks, built on `device` and kept for the next call.

        Args:
            block_q: query tokens per block.
            block_kv: key tokens per block; `block_q` when None.
            device: device of the lists.
            order: the order that queries and keys are put in before the cut; None leaves them in
                the order of the sequence.

        Raises:
            ValueError: for a block size that is no integer from 1 to 8192, or an order of another
                grid's tokens.
        """
        block_kv = block_q if block_kv is None else block_kv
        for size in (block_q, block_kv):
            if not (is_whole(size) and 1 <= size <= _LARGEST_BLOCK):
                raise ValueError(
                    f"block sizes must be integers from 1 to {_LARGEST_BLOCK}, not {block_q} x"
                    f" {block_kv}"
                )
        if order is not None and order.grid != self.grid:
            raise ValueError(f"the order is over {order.grid}, but the mask over {self.grid}")
        blocking = Blocking(block_q, block_kv, torch.device(device), order)
        if blocking not in self._layouts:
            self._layouts[blocking] = layout_from_states(
                self.block_states(blocking),
                lambda row, column: self.block_bits(row, column, blocking),
                tokens_q=self.grid.tokens,
                tokens_kv=self.grid.tokens,
                block_q=block_q,
                block_kv=block_kv,
                signatures=lambda row, column: self.block_signatures(row, column, blocking),
                packed=True,
            )
        return self._layouts[blocking]

    def block_bits(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        """The token masks of n blocks, in the words of `pack_bits`.

        Args:
            row, column: int64 `(n,)`, indices of the blocks.
            blocking: the way in which the tokens are cut into blocks.

        Returns:
            int32 `(n, block_q, ceil(block_kv / 32))`. Bits of keys and rows of queries past the end
            of the sequence mean nothing.
        """
        block_q, block_kv = blocking.block_q, blocking.block_kv
        step = max(1, pairs_per_chunk(row.device) // (block_q * block_kv))
        query = tokens_of_blocks(self.grid, row, block_q, blocking).split(step)
        key = tokens_of_blocks(self.grid, column, block_kv, blocking).split(step)
        words = []
        for q, k in zip(query, key, strict=True):
            seen = self.allowed(q[:, :, None], k[:, None, :])
            words.append(pack_bits(seen.expand(len(q), block_q, block_kv)))
        return torch.cat(words)

    def dense(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The mask as bool `(tokens, tokens)`; rows are queries. Needs memory for every pair."""
        token = torch.arange(self.grid.tokens, device=device)
        allowed = self.allowed(token[:, None], token[None, :])
        return allowed.expand(self.grid.tokens, self.grid.tokens)

    @property
    def density(self) -> float:
        """Fraction of all token pairs that attend, exact."""
        layout = self.blocks()
        return allowed_pairs(layout) / (layout.tokens_q * layout.tokens_kv)

    def __and__(self, other: AttentionMask) -> AttentionMask:
        return _Combination(self._common_grid(other), (self, other), all_of=True)

    def __or__(self, other: AttentionMask) -> AttentionMask:
        return _Combination(self._common_grid(other), (self, other), all_of=False)

    def __invert__(self) -> AttentionMask:
        return _Complement(self.grid, self)

    def _common_grid(self, other: AttentionMask) -> TokenGrid:
        if not isinstance(other, AttentionMask):
            raise TypeError(
                f"a mask combines with another mask, not with a {type(other).__name__}; a rule of"
                f" your own is a PredicateMask"
            )
        if self.grid != other.grid:
            raise ValueError(
                f"masks over different grids cannot be combined: {self.grid} and {other.grid}"
            )
        return self.grid


def tokens_of_blocks(
    grid: TokenGrid, block: torch.Tensor, size: int, blocking: Blocking
) -> torch.Tensor:
    """The positions in the sequence of the tokens of n blocks of `size` tokens, int64 `(n, size)`.

    Places past the end of the sequence are read as the last token.
    """
    place = block[:, None] * size + torch.arange(size, device=block.device)
    place = place.clamp(max=grid.tokens - 1)
    return place if blocking.order is None else blocking.order.positions(block.device)[place]


def as_words(flags: torch.Tensor) -> torch.Tensor:
    """int32 words of 32 equal bits each: all set for True."""
    return -flags.to(torch.int32)


@dataclass(frozen=True, eq=False)
class PredicateMask(AttentionMask):
    """A user's own rule, as a function of sequence positions.

    Attributes:
        predicate: takes int64 tensors of query and key positions that broadcast together and gives
            a bool tensor. `grid.coordinates` turns positions into (frame, row, column).
    """

    predicate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.predicate(query, key)


@dataclass(frozen=True, eq=False)
class FullMask(AttentionMask):
    """Every token attends to every token."""

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.ones(
            torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool, device=query.device
        )

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        return torch.full_like(super().block_states(blocking), FULL)


@dataclass(frozen=True, eq=False)
class TextMask(AttentionMask):
    """The pairs with a text token: text queries see all keys, and all queries see text keys."""

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.grid.is_text(query) | self.grid.is_text(key)

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        # Text keeps its places in every order.
        row = self._states_along(blocking.block_q, blocking.device)[:, None]
        column = self._states_along(blocking.block_kv, blocking.device)[None, :]
        return torch.maximum(row, column)

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        # The numbers of text tokens at the start and at the end of its blocks determine a mask.
        kinds = []
        for index, block in ((row, blocking.block_q), (column, blocking.block_kv)):
            start = index * block
            begins = (self.grid.text_before - start).clamp(0, block)
            ends = (start + block - self.grid.video.stop).clamp(0, block)
            kinds.append(begins * (block + 1) + ends)
        return kinds[0] * (blocking.block_kv + 1) ** 2 + kinds[1]

    def block_bits(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        query = self.grid.is_text(tokens_of_blocks(self.grid, row, blocking.block_q, blocking))
        key = self.grid.is_text(tokens_of_blocks(self.grid, column, blocking.block_kv, blocking))
        return as_words(query)[:, :, None] | pack_bits(key)[:, None]

    def _states_along(self, block: int, device: torch.device) -> torch.Tensor:
        start = torch.arange(0, self.grid.tokens, block, device=device)
        end = (start + block).clamp(max=self.grid.tokens)
        video = end.clamp(max=self.grid.video.stop) - start.clamp(min=self.grid.video.start)
        text = (end - start) - video.clamp(min=0)
        state = torch.full(start.shape, PARTIAL, dtype=torch.uint8, device=device)
        state[text == 0] = EMPTY
        state[text == end - start] = FULL
        return state


@dataclass(frozen=True, eq=False)
class BlockMapMask(AttentionMask):
    """A rule that holds for whole blocks of tokens, counted from the start of the sequence.

    Attributes:
        block_map: bool `(blocks, blocks)`, rows are query blocks; or a function that computes this
            map on a device, for a map of some work.
        block_size: tokens per block; the last block may be short.

    Raises:
        ValueError: if the map does not have one entry per pair of blocks.
    """

    block_map: torch.Tensor | Callable[[torch.device], torch.Tensor]
    block_size: int
    _computed: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.block_map, torch.Tensor):
            return
        n = -(-self.grid.tokens // self.block_size)
        if tuple(self.block_map.shape) != (n, n):
            raise ValueError(
                f"block_map has shape {tuple(self.block_map.shape)}, but {self.grid.tokens} tokens"
                f" in blocks of {self.block_size} make {n} x {n}"
            )

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        block_map = self._on(query.device)
        return block_map[query // self.block_size, key // self.block_size]

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        if blocking.order is not None:
            return super().block_states(blocking)
        visited = self._on(blocking.device)
        missing = ~visited
        for dim, size in enumerate((blocking.block_q, blocking.block_kv)):
            visited = _overlapped(visited, self.block_size, size, self.grid.tokens, dim=dim)
            missing = _overlapped(missing, self.block_size, size, self.grid.tokens, dim=dim)
        states = torch.full_like(visited, PARTIAL, dtype=torch.uint8)
        states[~visited] = EMPTY
        states[~missing] = FULL
        return states

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor | None:
        sizes = blocking.block_q, blocking.block_kv
        if blocking.order is not None or sizes != (self.block_size, self.block_size):
            return None
        return self._on(row.device)[row, column].long()

    def _on(self, device: torch.device) -> torch.Tensor:
        """`block_map` on a device."""
        if isinstance(self.block_map, torch.Tensor):
            return self.block_map.to(device)
        if device not in self._computed:
            self._computed[device] = self.block_map(device)
        return self._computed[device]


@dataclass(frozen=True, eq=False)
class _Combination(AttentionMask):
    """The pairs that all parts allow (`&`), or that any part allows (`|`)."""

    parts: tuple[AttentionMask, ...]
    all_of: bool

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        out = self.parts[0].allowed(query, key)
        for part in self.parts[1:]:
            other = part.allowed(query, key)
            out = out & other if self.all_of else out | other
        return out

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        # The states are ordered: two states combine to their minimum or maximum. Only two partial
        # blocks may combine to an empty or a full block, which `blocks` finds from the bits.
        states = [part.block_states(blocking) for part in self.parts]
        out = states[0]
        for other in states[1:]:
            out = torch.minimum(out, other) if self.all_of else torch.maximum(out, other)
        return out

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor | None:
        out = None
        for part in self.parts:
            signature = part.block_signatures(row, column, blocking)
            if signature is None:
                return None
            _, kind = signature.unique(return_inverse=True)
            if out is None:
                out = kind
            else:
                _, out = (out * row.numel() + kind).unique(return_inverse=True)
        return out

    def block_bits(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        out = self.parts[0].block_bits(row, column, blocking)
        for part in self.parts[1:]:
            other = part.block_bits(row, column, blocking)
            out = out & other if self.all_of else out | other
        return out


@dataclass(frozen=True, eq=False)
class _Complement(AttentionMask):
    """The pairs that `part` leaves out."""

    part: AttentionMask

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return ~self.part.allowed(query, key)

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        return FULL - self.part.block_states(blocking)

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor | None:
        return self.part.block_signatures(row, column, blocking)

    def block_bits(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        return ~self.part.block_bits(row, column, blocking)


def _overlapped(block_map: torch.Tensor, old: int, new: int, tokens: int, dim: int) -> torch.Tensor:
    """Regroup an axis from blocks of `old` tokens to blocks of `new` tokens.

    A new block is True where it overlaps an old block that is True.
    """
    if old == new:
        return block_map
    start = torch.arange(0, tokens, new, device=block_map.device)
    first, last = start // old, (start + new).clamp(max=tokens).sub(1) // old
    zero = torch.zeros_like(block_map.narrow(dim, 0, 1), dtype=torch.int32)
    running = torch.cat([zero, block_map.cumsum(dim, dtype=torch.int32)], dim)
    return running.index_select(dim, last + 1) > running.index_select(dim, first)


def allowed_pairs(layout: BlockLayout) -> int:
    """Number of token pairs that attend in a layout that all samples and heads share."""
    column_size = torch.full((layout.columns,), layout.block_kv, device=layout.device)
    column_size[-1] = layout.tokens_kv - (layout.columns - 1) * layout.block_kv
    row_size = torch.full((layout.rows,), layout.block_q, device=layout.device)
    row_size[-1] = layout.tokens_q - (layout.rows - 1) * layout.block_q
    slot = torch.arange(layout.full_index.shape[-1], device=layout.device)
    listed = slot < layout.full_count[0, 0, :, None]
    full = ((column_size[layout.full_index[0, 0].long()] * listed).sum(1) * row_size).sum()
    if not layout.bit_masks.shape[0]:
        return int(full)
    byte = torch.arange(256, device=layout.device)
    ones_in_byte = torch.stack([(byte >> bit) & 1 for bit in range(8)]).sum(0)
    ones = torch.stack([ones_in_byte[m.view(torch.uint8).long()].sum() for m in layout.bit_masks])
    slot = torch.arange(layout.partial_index.shape[-1], device=layout.device)
    listed = slot < layout.partial_count[0, 0, :, None]
    return int(full) + int((ones[layout.partial_mask[0, 0].long()] * listed).sum())
