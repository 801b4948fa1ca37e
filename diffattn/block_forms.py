"""The blocks of a layout in the index forms of other libraries, and back from torch's BlockMask.

Each form is a small dataclass whose fields have the names of the other library's own arguments, so
that `vars(form)` can be passed as keywords. None of those libraries is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.attention.flex_attention import BlockMask

from diffattn.blocks import (
    FULL,
    PARTIAL,
    WORD_BITS,
    BlockBits,
    BlockLayout,
    index_lists,
    layout_from_states,
    unpack_bits,
)
from diffattn.distinct import distinct_rows

# The first rows of `TokenRule.bits`; the layout's own bit masks follow.
_NOTHING, _EVERYTHING, _FIRST_BIT_MASK = 0, 1, 2

# (sample, head, query, key), each one number -> whether the query attends to the key
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# The block sizes that cuDNN's block sparse attention has kernels for.
CUDNN_BLOCK_SIZES = (64, 128)


@dataclass(frozen=True)
class TokenRule:
    """The token pairs that attend, as two table look-ups for a `mask_mod`.

    Query `i` of sample `b` and head `h` sees key `j` when, with `w = j % block_kv`, bit `w % 32` of
    `bits[blocks[b, h, i // block_q, j // block_kv], i % block_q, w // 32]` is set.

    Attributes:
        blocks: int32 `(batch|1, heads|1, rows, columns)`, the row of `bits` that each block obeys.
        bits: int32 `(2 + masks, block_q, ceil(block_kv / 32))`: a mask that hides all keys,
            a mask that hides none, and the layout's bit masks.
    """

    blocks: torch.Tensor
    bits: torch.Tensor


@dataclass(frozen=True)
class FA4Blocks:
    """Block lists of one direction, as `flash_attn.cute`'s `BlockSparseTensorsTorch` takes them.

    Attributes:
        mask_block_cnt, mask_block_idx: int32 `(batch|1, heads|1, rows)` and `(..., rows, cap)`,
            partial blocks, for which the kernel calls `mask_mod`; ascending.
        full_block_cnt, full_block_idx: the same for full blocks.
        block_size: tokens per query block and per key block, in this order in both directions.
    """

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


@dataclass(frozen=True)
class FA4Layout:
    """A layout in the form of FlashAttention-4.

    FlashAttention-4 wants key blocks of the size of its key tile (128 on Hopper and Blackwell), and
    query blocks of a multiple of its query tile (256 on Blackwell where two tiles share a program).

    Attributes:
        forward: for every query block, its key blocks.
        backward: for every key block, its query blocks.
        rule: the tables for the `mask_mod` of the partial blocks: pass `rule.blocks` and
            `rule.bits` as `aux_tensors`. None where no block is partial: no `mask_mod` is needed.
    """

    forward: FA4Blocks
    backward: FA4Blocks
    rule: TokenRule | None


@dataclass(frozen=True)
class CuDNNBlocks:
    """Keywords of cuDNN-frontend's `BSA.block_sparse_attention_forward`.

    The backward function takes all but `allow_empty_block_nums`. On Hopper cuDNN wants a query
    length that is a multiple of 64.

    Attributes:
        q2k_block_index: int32 `(batch, heads, rows, cap)`, key blocks of every query block.
        q2k_block_nums: int32 `(batch, heads, rows)`, number of key blocks of every query block.
        block_sizes: int32 `(columns,)`, tokens of every key block: the last may be short.
        sparse_block_size: tokens per block, of queries and keys alike.
        allow_empty_block_nums: whether some query block sees nothing.
    """

    q2k_block_index: torch.Tensor
    q2k_block_nums: torch.Tensor
    block_sizes: torch.Tensor
    sparse_block_size: int
    allow_empty_block_nums: bool


@dataclass(frozen=True)
class FlashInferBlocks:
    """Keywords of `plan` of FlashInfer's `BlockSparseAttentionWrapper`, but heads and head_dim.

    Attributes:
        indptr: int32 `(rows + 1,)`, where each row of blocks starts in `indices`.
        indices: int32 `(visited,)`, key blocks, ascending in each row.
        M, N: query and key tokens.
        R, C: tokens per query block and per key block.
        mask: bool `(visited, R, C)`, the token masks of the visited blocks: a byte per token pair.
            None where no block is partial.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    M: int
    N: int
    R: int
    C: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class FlashInferVariableBlocks:
    """Keywords of `plan` of FlashInfer's `VariableBlockSparseAttentionWrapper`.

    Attributes:
        block_mask_map: bool `(heads, rows, columns)`, which blocks are visited.
        block_row_sz: int32 `(heads, rows)`, tokens of every query block.
        block_col_sz: int32 `(heads, columns)`, tokens of every key block.
    """

    block_mask_map: torch.Tensor
    block_row_sz: torch.Tensor
    block_col_sz: torch.Tensor


def from_block_mask(block_mask: BlockMask) -> BlockLayout:
    """The layout of torch's `BlockMask`, on its device.

    Only the token pairs of partial blocks are looked up in the `mask_mod`. A BlockMask with one
    list of blocks for all samples (or heads) is taken to have one rule for all samples (or heads).

    Args:
        block_mask: of any block sizes, sequence lengths, samples and heads.

    Raises:
        ValueError: if the BlockMask lists a block past the last key block, or does not have one row
            per query block.
    """
    (tokens_q, tokens_kv), (block_q, block_kv) = block_mask.seq_lengths, block_mask.BLOCK_SIZE
    columns = -(-tokens_kv // block_kv)
    partial = _visited("kv_indices", block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    states = partial * torch.tensor(PARTIAL, dtype=torch.uint8, device=partial.device)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _visited(
            "full_kv_indices", block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns
        )
        states[full] = FULL
    batch, heads = states.shape[:2]
    layouts = [
        layout_from_states(
            states[sample, head],
            _bits_by_mask_mod(block_mask, sample, head),
            tokens_q=tokens_q,
            tokens_kv=tokens_kv,
            block_q=block_q,
            block_kv=block_kv,
        )
        for sample in range(batch)
        for head in range(heads)
    ]
    return layouts[0] if len(layouts) == 1 else _stack(layouts, batch, heads)


def to_block_mask(layout: BlockLayout, *, key_mask: torch.Tensor | None = None) -> BlockMask:
    """torch's `BlockMask` for `flex_attention`, token-exact: its `mask_mod` reads the bit masks.

    The `mask_mod` is right for every token pair, not only for those of partial blocks. Its tables
    stay on the layout's device: move the layout, not the BlockMask.

    Args:
        layout: the blocks.
        key_mask: bool `(batch, tokens_kv)`, False hides a key from every query. No block is full
            then, because flex_attention does not mask full blocks.
    """
    rule = token_rule(layout)
    partial, full = rule.blocks >= _FIRST_BIT_MASK, rule.blocks == _EVERYTHING
    if key_mask is not None:
        partial, full = partial | full, torch.zeros_like(full)
    return BlockMask.from_kv_blocks(
        *_wide_lists(partial),
        *_wide_lists(full),
        BLOCK_SIZE=(layout.block_q, layout.block_kv),
        mask_mod=_mask_mod(rule, layout.block_q, layout.block_kv, key_mask),
        seq_lengths=(layout.tokens_q, layout.tokens_kv),
    )


def token_rule(layout: BlockLayout) -> TokenRule:
    """The rule of every block of a layout, including blocks that are not visited."""
    blocks = torch.full(
        (*layout.full_count.shape, layout.columns + 1),
        _NOTHING,
        dtype=torch.int32,
        device=layout.device,
    )
    for count, index, value in (
        (layout.full_count, layout.full_index, torch.full_like(layout.full_index, _EVERYTHING)),
        (layout.partial_count, layout.partial_index, layout.partial_mask + _FIRST_BIT_MASK),
    ):
        # Entries past a row's count mean nothing: they go to an extra column.
        target = index.long().masked_fill(~_listed(count, index), layout.columns)
        blocks.scatter_(3, target, value)
    nothing = layout.bit_masks.new_zeros(1, *layout.bit_masks.shape[1:])
    return TokenRule(
        blocks=blocks[..., : layout.columns].contiguous(),
        bits=torch.cat([nothing, ~nothing, layout.bit_masks]),
    )


def to_fa4(layout: BlockLayout) -> FA4Layout:
    """The block lists of FlashAttention-4 (`flash_attn.cute`), of both directions."""
    rule = token_rule(layout)
    block_size = (layout.block_q, layout.block_kv)
    transposed = rule.blocks.transpose(2, 3)
    return FA4Layout(
        forward=FA4Blocks(
            layout.partial_count,
            layout.partial_index,
            layout.full_count,
            layout.full_index,
            block_size,
        ),
        backward=FA4Blocks(
            *_lists(transposed >= _FIRST_BIT_MASK), *_lists(transposed == _EVERYTHING), block_size
        ),
        rule=rule if layout.partial_blocks else None,
    )


def to_cudnn(layout: BlockLayout, *, batch: int, heads: int) -> CuDNNBlocks:
    """The block lists of cuDNN-frontend's block sparse attention.

    Args:
        layout: the blocks, all of them full.
        batch, heads: samples and query heads of the call: cuDNN wants a list for each head.

    Raises:
        ValueError: if a block is partial, blocks are not of 64 x 64 or 128 x 128 tokens, or the
            layout has another number of samples or heads.
    """
    _refuse_partial(layout, "cuDNN's block sparse attention")
    if layout.block_q != layout.block_kv or layout.block_q not in CUDNN_BLOCK_SIZES:
        sizes = " or ".join(f"{size} x {size}" for size in CUDNN_BLOCK_SIZES)
        raise ValueError(
            f"the layout's blocks are {layout.block_q} x {layout.block_kv} tokens, but cuDNN takes"
            f" {sizes}; build the layout with such blocks"
        )
    for name, count, of_layout in zip(
        ("samples", "heads"), (batch, heads), layout.full_count.shape, strict=False
    ):
        if of_layout not in (1, count):
            raise ValueError(
                f"the layout is for {of_layout} {name}, but {count} were asked for; it must be for"
                f" as many, or for 1 that all share"
            )
    return CuDNNBlocks(
        q2k_block_index=layout.full_index.expand(batch, heads, -1, -1).contiguous(),
        q2k_block_nums=layout.full_count.expand(batch, heads, -1).contiguous(),
        block_sizes=_block_lengths(layout.tokens_kv, layout.block_kv, layout.device),
        sparse_block_size=layout.block_kv,
        allow_empty_block_nums=bool((layout.full_count == 0).any()),
    )


def to_flashinfer(layout: BlockLayout) -> FlashInferBlocks:
    """The block-sparse matrix of FlashInfer's `BlockSparseAttentionWrapper`, partial blocks too.

    The matrix serves one sample at a time, with the same blocks in every head.

    Raises:
        ValueError: if the layout differs between samples or heads, or its last key block is short.
    """
    batch, heads, rows = layout.full_count.shape
    if batch * heads > 1:
        raise ValueError(
            f"the layout is one of {batch} samples and {heads} heads, but FlashInfer's block-sparse"
            f" matrix is shared by all; use to_flashinfer_variable, which tells heads apart"
        )
    if layout.tokens_kv % layout.block_kv:
        raise ValueError(
            f"{layout.tokens_kv} key tokens do not fill blocks of {layout.block_kv}, as they must"
            f" in FlashInfer's block-sparse matrix; build the layout with a block size that divides"
            f" them, or use to_flashinfer_variable"
        )
    rule = token_rule(layout)
    blocks = rule.blocks[0, 0]
    row, column = blocks.nonzero(as_tuple=True)
    indptr = torch.zeros(rows + 1, dtype=torch.int32, device=layout.device)
    indptr[1:] = (blocks != _NOTHING).sum(1).cumsum(0)
    mask = None
    if layout.partial_blocks:
        mask = unpack_bits(rule.bits, layout.block_kv)[blocks[row, column].long()]
    return FlashInferBlocks(
        indptr=indptr,
        indices=column.to(torch.int32),
        M=layout.tokens_q,
        N=layout.tokens_kv,
        R=layout.block_q,
        C=layout.block_kv,
        mask=mask,
    )


def to_flashinfer_variable(layout: BlockLayout, *, heads: int) -> FlashInferVariableBlocks:
    """The block map of FlashInfer's `VariableBlockSparseAttentionWrapper`, for one sample.

    Args:
        layout: the blocks, all of them full; the last ones may be short.
        heads: key and value heads of the call.

    Raises:
        ValueError: if a block is partial, or the layout has several samples or another number of
            heads.
    """
    _refuse_partial(layout, "FlashInfer's variable block-sparse attention")
    batch, of_layout, _ = layout.full_count.shape
    if batch > 1 or of_layout not in (1, heads):
        raise ValueError(
            f"the layout is one of {batch} samples and {of_layout} heads, but must be for one"
            f" sample, and for {heads} heads or for 1 that all share"
        )
    visited = token_rule(layout).blocks[0] != _NOTHING
    sizes = [
        _block_lengths(tokens, block, layout.device).expand(heads, -1).contiguous()
        for tokens, block in (
            (layout.tokens_q, layout.block_q),
            (layout.tokens_kv, layout.block_kv),
        )
    ]
    return FlashInferVariableBlocks(visited.expand(heads, -1, -1).contiguous(), *sizes)


def _mask_mod(
    rule: TokenRule, block_q: int, block_kv: int, key_mask: torch.Tensor | None
) -> MaskMod:
    batch, heads = rule.blocks.shape[:2]
    blocks, bits = rule.blocks.flatten(0, 1), rule.bits
    # With a step of 0, all samples or heads read the table that they share.
    per_sample, per_head = heads * (batch > 1), 1 * (heads > 1)

    def mask_mod(
        sample: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        table = sample * per_sample + head * per_head
        block = blocks[table, query // block_q, key // block_kv]
        in_block = key % block_kv
        word = bits[block, query % block_q, in_block // WORD_BITS]
        visible = ((word >> (in_block % WORD_BITS)) & 1) == 1
        return visible if key_mask is None else visible & key_mask[sample, key]

    return mask_mod


def _bits_by_mask_mod(block_mask: BlockMask, sample: int, head: int) -> BlockBits:
    """Token masks of blocks, from the BlockMask's `mask_mod` for every token pair."""
    (tokens_q, tokens_kv), (block_q, block_kv) = block_mask.seq_lengths, block_mask.BLOCK_SIZE
    # A mask_mod takes single tokens: broadcasting is not in its contract.
    pairs = torch.vmap(block_mask.mask_mod, in_dims=(None, None, None, 0))
    pairs = torch.vmap(pairs, in_dims=(None, None, 0, None))
    pairs = torch.vmap(pairs, in_dims=(None, None, 0, 0))

    def bits(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        query = row[:, None] * block_q + torch.arange(block_q, device=row.device)
        key = column[:, None] * block_kv + torch.arange(block_kv, device=row.device)
        b, h = (torch.tensor(i, device=row.device) for i in (sample, head))
        # Positions past the end are read as the last token: the layout drops those bits.
        return pairs(b, h, query.clamp(max=tokens_q - 1), key.clamp(max=tokens_kv - 1))

    return bits


def _visited(name: str, count: torch.Tensor, index: torch.Tensor, columns: int) -> torch.Tensor:
    """The index lists of a BlockMask as bool `(batch, heads, rows, columns)`."""
    count = count[(None,) * (3 - count.ndim)]
    index = index[(None,) * (4 - index.ndim)]
    listed = _listed(count, index)
    used = index[listed]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < columns:
        raise ValueError(
            f"{name} holds {int(used.min())} .. {int(used.max())}, but the BlockMask's lengths make"
            f" {columns} key blocks"
        )
    visited = torch.zeros(*count.shape, columns + 1, dtype=torch.bool, device=index.device)
    visited.scatter_(3, index.long().masked_fill(~listed, columns), True)
    return visited[..., :columns]


def _listed(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Whether each entry of the lists counts, bool in the shape of `index`."""
    return torch.arange(index.shape[-1], device=index.device) < count[..., None]


def _lists(visited: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and compact ascending indices of bool `(batch, heads, rows, columns)`, int32."""
    count, index = index_lists(visited.flatten(0, 2))
    return count.view(visited.shape[:3]), index.view(*visited.shape[:3], -1)


def _wide_lists(visited: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_lists` with indices as wide as the columns; BlockMask takes their number from the width."""
    count, index = _lists(visited)
    return count, torch.nn.functional.pad(index, (0, visited.shape[3] - index.shape[3]))


def _stack(layouts: list[BlockLayout], batch: int, heads: int) -> BlockLayout:
    """One layout of `batch` samples and `heads` heads, from a layout per head, sample by sample."""
    table = torch.cat([layout.bit_masks for layout in layouts])
    one_of_each, place = distinct_rows(table.flatten(1))
    parts, first = [], 0
    for layout in layouts:
        masks = layout.bit_masks.shape[0]
        own = place[first : first + masks].to(torch.int32)
        parts.append(layout.partial_mask if not masks else _renumbered(layout, own))
        first += masks

    def together(tensors: list[torch.Tensor]) -> torch.Tensor:
        width = max(x.shape[-1] for x in tensors)
        padded = [torch.nn.functional.pad(x[0, 0], (0, width - x.shape[-1])) for x in tensors]
        return torch.stack(padded).unflatten(0, (batch, heads))

    return replace(
        layouts[0],
        full_count=together([layout.full_count for layout in layouts]),
        full_index=together([layout.full_index for layout in layouts]),
        partial_count=together([layout.partial_count for layout in layouts]),
        partial_index=together([layout.partial_index for layout in layouts]),
        partial_mask=together(parts),
        bit_masks=table[one_of_each],
    )


def _renumbered(layout: BlockLayout, own: torch.Tensor) -> torch.Tensor:
    """`partial_mask` of a layout whose masks have moved to the rows `own` of another table."""
    listed = _listed(layout.partial_count, layout.partial_index)
    return own[layout.partial_mask.long()].masked_fill(~listed, 0)


def _block_lengths(tokens: int, block: int, device: torch.device) -> torch.Tensor:
    """int32 `(blocks,)`: tokens of every block of a sequence."""
    start = torch.arange(0, tokens, block, dtype=torch.int32, device=device)
    return (tokens - start).clamp(max=block)


def _refuse_partial(layout: BlockLayout, what: str) -> None:
    if layout.partial_blocks:
        raise ValueError(
            f"{layout.partial_blocks} of the layout's blocks are partial, and {what} computes whole"
            f" blocks only; use a block-aligned mask, or to_fa4, to_flashinfer or to_block_mask"
        )
