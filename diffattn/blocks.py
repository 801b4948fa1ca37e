"""BlockLayout: the key blocks that each query block visits, as masks and kernels exchange them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from diffattn.distinct import distinct, distinct_rows
from diffattn.kernels.checks import LAYOUT_NAMES, LayoutTensors

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

WORD_BITS = 32


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """The blocks of a block-sparse attention, as index lists per row of query blocks.

    A *full* block attends everywhere; a *partial* block attends where its bit mask says so. Blocks
    on the ragged end of the sequence count as full when every token pair that exists is allowed:
    kernels never read past `tokens_q` or `tokens_kv`.

    Attributes:
        tokens_q, tokens_kv: sequence lengths in tokens; any positive number.
        block_q, block_kv: tokens per query block and per key block.
        full_count: int32 `(batch|1, heads|1, rows)`, number of full blocks in each row.
        full_index: int32 `(batch|1, heads|1, rows, cap)`, key-block indices of the full blocks,
            ascending; entries from `full_count` on are 0 and mean nothing.
        partial_count, partial_index: the same for partial blocks.
        partial_mask: int32, shape of `partial_index`: the row of `bit_masks` that each block obeys.
        bit_masks: int32 `(masks, block_q, ceil(block_kv / 32))`, bit `j % 32` of word `j // 32` set
            when key `j` of the block is visible to that query. Equal masks are stored once.
    """

    tokens_q: int
    tokens_kv: int
    block_q: int
    block_kv: int
    full_count: torch.Tensor
    full_index: torch.Tensor
    partial_count: torch.Tensor
    partial_index: torch.Tensor
    partial_mask: torch.Tensor
    bit_masks: torch.Tensor

    def __repr__(self) -> str:
        batch, heads, _ = self.full_count.shape
        # Reading counts of another device would wait for the device.
        visited = ""
        if self.device.type == "cpu":
            visited = f", {self.full_blocks} full and {self.partial_blocks} partial"
        return (
            f"<BlockLayout: {self.tokens_q} x {self.tokens_kv} tokens in {batch} x {heads} x"
            f" {self.rows} x {self.columns} blocks of {self.block_q} x {self.block_kv}{visited},"
            f" on {self.device}>"
        )

    @property
    def rows(self) -> int:
        """Number of query blocks."""
        return -(-self.tokens_q // self.block_q)

    @property
    def columns(self) -> int:
        """Number of key blocks."""
        return -(-self.tokens_kv // self.block_kv)

    @property
    def device(self) -> torch.device:
        return self.full_count.device

    @property
    def tensors(self) -> LayoutTensors:
        """The index lists and bit masks, in the order in which kernels take them."""
        return (
            self.full_count,
            self.full_index,
            self.partial_count,
            self.partial_index,
            self.partial_mask,
            self.bit_masks,
        )

    @property
    def full_blocks(self) -> int:
        """Full blocks over all rows, heads and samples."""
        return int(self.full_count.sum())

    @property
    def partial_blocks(self) -> int:
        """Partial blocks over all rows, heads and samples."""
        return int(self.partial_count.sum())

    @property
    def density(self) -> float:
        """Fraction of the blocks that are visited: the work done relative to dense attention."""
        layouts = self.full_count.shape[0] * self.full_count.shape[1]
        return (self.full_blocks + self.partial_blocks) / (layouts * self.rows * self.columns)

    @property
    def nbytes(self) -> int:
        """Memory of all index lists and bit masks, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> BlockLayout:
        """The layout on `device`; this object when the layout is already there."""
        device = torch.device(device)
        if self.device == device:
            return self
        return replace(self, **{name: getattr(self, name).to(device) for name in LAYOUT_NAMES})

    def to_block_mask(self) -> BlockMask:
        """The same mask for torch's `flex_attention`, token-exact; see `diffattn.block_forms`."""
        from diffattn.block_forms import to_block_mask  # imports this module

        return to_block_mask(self)

    def dense(self) -> torch.Tensor:
        """The token mask of this layout: bool `(batch|1, heads|1, tokens_q, tokens_kv)`.

        Needs memory for every token pair: for tests and pictures.
        """
        batch, heads, rows = self.full_count.shape
        out = torch.zeros(
            batch, heads, rows, self.columns, self.block_q, self.block_kv,
            dtype=torch.bool, device=self.device,
        )  # fmt: skip
        bits = unpack_bits(self.bit_masks, self.block_kv)
        for b in range(batch):
            for h in range(heads):
                for r in range(rows):
                    full = self.full_index[b, h, r, : self.full_count[b, h, r]].long()
                    out[b, h, r, full] = True
                    n = self.partial_count[b, h, r]
                    partial = self.partial_index[b, h, r, :n].long()
                    out[b, h, r, partial] = bits[self.partial_mask[b, h, r, :n].long()]
        out = out.transpose(3, 4).reshape(
            batch, heads, rows * self.block_q, self.columns * self.block_kv
        )
        return out[:, :, : self.tokens_q, : self.tokens_kv]


_GATHER_BITS = sum(1 << (56 - 7 * j) for j in range(8))


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Pack bool `(..., n)` into int32 words `(..., ceil(n / 32))`, key 0 in the lowest bit."""
    padding = -mask.shape[-1] % WORD_BITS
    if padding:
        mask = torch.nn.functional.pad(mask, (0, padding))
    # Eight bytes of 0 or 1 at once: bit 56 + j of the product is byte j. The copy is contiguous
    # and aligned, because a view of a tensor may begin at any byte.
    flags = mask.to(torch.uint8, memory_format=torch.contiguous_format)
    bytes_of_bits = (flags.view(torch.int64) * _GATHER_BITS) >> 56
    return bytes_of_bits.to(torch.uint8).view(torch.int32)


def unpack_bits(words: torch.Tensor, n: int) -> torch.Tensor:
    """Inverse of `pack_bits`: int32 `(..., words)` to bool `(..., n)`."""
    shifts = torch.arange(WORD_BITS, device=words.device)
    return ((words.long().unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[..., :n]


EMPTY, PARTIAL, FULL = 0, 1, 2  # states of a block, as stored in the uint8 tensors below

# (rows, columns) of n partial blocks -> their token masks, bool (n, block_q, block_kv), or as the
# int32 words of `pack_bits`
BlockBits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (rows, columns) of n partial blocks -> int64 (n,): blocks of equal signature have equal token
# masks; None if not known
BlockSignatures = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]

# Packed masks of this many token pairs are compared at a time.
_PACKED_PAIRS_PER_CHUNK = 1 << 26


def pairs_per_chunk(device: torch.device) -> int:
    """The number of token pairs whose masks are computed at a time.

    Few enough for the cache of a CPU. Elsewhere a launch takes as long as the work on a million
    pairs, and 32 MiB hold an int64 for each of these pairs.
    """
    return 1 << 20 if device.type == "cpu" else 1 << 22


def layout_from_states(
    states: torch.Tensor,
    bits: BlockBits | None,
    *,
    tokens_q: int,
    tokens_kv: int,
    block_q: int,
    block_kv: int,
    signatures: BlockSignatures | None = None,
    packed: bool = False,
) -> BlockLayout:
    """Build a layout shared by all heads and samples from the state of every block.

    Args:
        states: uint8 `(rows, columns)` of `EMPTY`, `PARTIAL` or `FULL`. A block marked partial may
            turn out empty or full once its bits are known; it is then stored as such.
        bits: gives the token masks of some partial blocks, chunk by chunk; may be None when no
            block is partial. Values for tokens past the end of the sequence are ignored.
        tokens_q, tokens_kv: sequence lengths.
        block_q, block_kv: tokens per block.
        signatures: gives equal numbers to partial blocks of equal masks, so that `bits` computes
            one block per number. Blocks at the ragged end of the sequence are kept apart anyway.
        packed: whether `bits` gives words of `pack_bits`.

    Raises:
        ValueError: if `states` does not have one entry per block, or a partial block has no bits.
    """
    expected = (-(-tokens_q // block_q), -(-tokens_kv // block_kv))
    if tuple(states.shape) != expected:
        raise ValueError(
            f"states has shape {tuple(states.shape)}, but {tokens_q} x {tokens_kv} tokens in blocks"
            f" of {block_q} x {block_kv} make {expected} blocks"
        )
    states = states.clone()
    row, column = (states == PARTIAL).nonzero(as_tuple=True)
    if row.numel() and bits is None:
        raise ValueError(f"{row.numel()} blocks are partial, but no bits were given for them")
    one_of_each, like = _representatives(states, row, column, signatures)
    words, mask_of_block = _distinct_masks(
        states,
        row[one_of_each],
        column[one_of_each],
        bits if packed or bits is None else _packing(bits, block_q, block_kv),
        tokens_q,
        tokens_kv,
        block_q,
        block_kv,
        _PACKED_PAIRS_PER_CHUNK if packed else pairs_per_chunk(states.device),
    )
    states[row, column] = states[row[one_of_each], column[one_of_each]][like]
    mask_of_block = mask_of_block[like]
    mask_table = torch.zeros(states.shape, dtype=torch.int32, device=states.device)
    mask_table[row, column] = mask_of_block
    full_count, full_index = index_lists(states == FULL)
    partial_count, partial_index = index_lists(states == PARTIAL)
    return BlockLayout(
        tokens_q=tokens_q,
        tokens_kv=tokens_kv,
        block_q=block_q,
        block_kv=block_kv,
        full_count=full_count[None, None],
        full_index=full_index[None, None],
        partial_count=partial_count[None, None],
        partial_index=partial_index[None, None],
        partial_mask=mask_table.gather(1, partial_index.long())[None, None],
        bit_masks=words,
    )


def index_lists(visited: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 counts `(rows,)` and ascending indices `(rows, cap)` of bool `(rows, columns)`."""
    count = visited.sum(1)
    cap = max(1, int(count.max()))  # kernels cannot address an empty last dimension
    row, column = visited.nonzero(as_tuple=True)
    first = count.cumsum(0) - count
    index = torch.zeros(visited.shape[0], cap, dtype=torch.int32, device=visited.device)
    slot = torch.arange(row.numel(), device=visited.device) - first[row]
    index[row, slot] = column.to(torch.int32)
    return count.to(torch.int32), index


def _representatives(
    states: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    signatures: BlockSignatures | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One partial block per signature, by index, and for every block its place among these."""
    every = torch.arange(row.numel(), device=row.device)
    kind = None if signatures is None else signatures(row, column)
    if kind is None or not row.numel():
        return every, every
    _, like = kind.unique(return_inverse=True)
    # A short block at the end holds fewer tokens than a block of equal signature elsewhere.
    end = (row == states.shape[0] - 1) * 1 + (column == states.shape[1] - 1) * 2
    return distinct(like * 4 + end)


def _packing(bits: BlockBits, block_q: int, block_kv: int) -> BlockBits:
    def words(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        # A rule that ignores the key, or the query, may give a mask with a dimension of 1.
        return pack_bits(bits(row, column).expand(len(row), block_q, block_kv))

    return words


def _distinct_masks(
    states: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    words: BlockBits | None,
    tokens_q: int,
    tokens_kv: int,
    block_q: int,
    block_kv: int,
    pairs_at_once: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct masks of the partial blocks, packed, and the index of each block's mask.

    Writes EMPTY or FULL into `states` where the bits say so.
    """
    device = states.device
    words_per_row = -(-block_kv // WORD_BITS)
    mask_of_block = torch.zeros(row.numel(), dtype=torch.int32, device=device)
    tables = [torch.zeros(0, block_q * words_per_row, dtype=torch.int32, device=device)]
    found = 0
    in_block_q = torch.arange(block_q, device=device)
    in_block_kv = torch.arange(block_kv, device=device)
    step = max(1, pairs_at_once // (block_q * block_kv))
    for start in range(0, row.numel(), step):
        assert words is not None
        r, c = row[start : start + step], column[start : start + step]
        query_exists = r[:, None] * block_q + in_block_q < tokens_q
        key_exists = pack_bits(c[:, None] * block_kv + in_block_kv < tokens_kv)
        exists = key_exists[:, None, :].where(query_exists[:, :, None], 0)
        allowed = words(r, c) & exists
        is_partial = allowed.flatten(1).any(1)
        state = torch.where(is_partial, PARTIAL, EMPTY)
        is_full = (allowed == exists).flatten(1).all(1)
        states[r, c] = state.where(~is_full, FULL).to(torch.uint8)
        rest = (is_partial & ~is_full).nonzero().flatten()
        masks = allowed[rest].flatten(1)
        first, which = distinct_rows(masks)
        mask_of_block[start + rest] = (found + which).to(torch.int32)
        tables.append(masks[first])
        found += len(first)
    table = torch.cat(tables)
    if found and len(tables) > 2:  # masks may be in several chunks
        first, place = distinct_rows(table)
        table, mask_of_block = table[first], place[mask_of_block.long()].to(torch.int32)
    return table.view(-1, block_q, words_per_row), mask_of_block
