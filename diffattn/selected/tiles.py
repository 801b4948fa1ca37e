"""Selected blocks on the block-sparse kernels: each tile of queries computes a union of blocks.

The union of a tile holds the blocks that any of its queries has selected. Bit masks hide from each
query the blocks that it has not selected. Blocks are filled up to whole tiles, so that no tile lies
in two blocks. The kernels that gather have no forward-mode derivative; these have.
"""

from __future__ import annotations

import torch

from diffattn.blocks import BlockLayout, unpack_bits
from diffattn.masks.base import BLOCK
from diffattn.operator import attention
from diffattn.selected.key_blocks import KeyBlocks

_WORDS = BLOCK // 32
# Bytes of bit masks that are made at a time; heads take turns where all heads would need more.
_MASK_BYTES = 1 << 28


def union_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: KeyBlocks,
    bits: torch.Tensor,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`diffattn.selected.selected_attention` by unions of blocks; arguments are the same."""
    batch, tokens, heads, _ = query.shape
    token, block = blocks.padded(BLOCK)
    there = token < tokens
    counted = there.expand(batch, -1)
    if key_mask is not None:
        counted = counted & torch.nn.functional.pad(key_mask, (0, 1)).index_select(1, token)
    per_head = batch * block.numel() * blocks.blocks * BLOCK * _WORDS * 4
    step = max(1, _MASK_BYTES // per_head)
    outs = []
    for first in range(0, heads, step):
        some = slice(first, first + step)
        q, k, v = (_filled(x[:, :, some], token) for x in (query, key, value))
        layout = _layout(blocks, bits[:, some], token, block)
        outs.append(attention(q, k, v, layout, scale=scale, key_mask=counted, backend=backend))
    # Each token has one place. Places of padding come last in the sort, and are dropped.
    place = token.argsort(stable=True)[:tokens]
    return torch.cat(outs, 2).index_select(1, place)


def union_pairs(blocks: KeyBlocks, bits: torch.Tensor) -> torch.Tensor:
    """Share of the pairs of dense attention that `union_attention` computes, a scalar."""
    token, block = blocks.padded(BLOCK)
    some, _ = _tiles(blocks, bits, token)
    dense = (bits.shape[2] / BLOCK) ** 2
    return some[..., block].float().sum((2, 3)).mean() / dense


def selected_pairs(blocks: KeyBlocks, bits: torch.Tensor) -> torch.Tensor:
    """Share of the pairs of dense attention that are selected, a scalar."""
    shares = unpack_bits(bits, blocks.blocks).float().mean((0, 1, 2))
    lengths = blocks.starts.diff()
    return (shares * lengths).sum() / lengths.sum()


def _filled(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """`x`, `(batch, tokens, ...)`, with its blocks filled up to whole tiles by zeros."""
    padding = (0, 0) * (x.ndim - 2) + (0, 1)
    return torch.nn.functional.pad(x, padding).index_select(1, token)


def _tiles(
    blocks: KeyBlocks, bits: torch.Tensor, token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether some query of a tile, and whether every query, has selected each block.

    Both are bool `(batch, heads, query tiles, blocks)`.
    """
    chosen = _by_tile(bits, token)
    some = _any(chosen)
    # A place of padding counts neither as selecting a block nor as missing a block.
    missing = _any(_by_tile(~bits, token))
    return unpack_bits(some, blocks.blocks), ~unpack_bits(missing, blocks.blocks)


def _by_tile(bits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The bits tile by tile, `(batch, heads, query tiles, BLOCK, words)`, 0 at padding."""
    padded = torch.nn.functional.pad(bits, (0, 0, 0, 1))
    return padded.index_select(2, token).unflatten(2, (-1, BLOCK))


def _any(bits: torch.Tensor) -> torch.Tensor:
    """The bitwise or over the queries of each tile, `(batch, heads, query tiles, words)`."""
    while bits.shape[3] > 1:
        bits = bits[:, :, :, 0::2] | bits[:, :, :, 1::2]
    return bits[:, :, :, 0]


def _layout(
    blocks: KeyBlocks, bits: torch.Tensor, token: torch.Tensor, block: torch.Tensor
) -> BlockLayout:
    """The tiles that are computed, with a bit mask for every query tile and block."""
    some, all_ = _tiles(blocks, bits, token)
    batch, heads, rows, count = some.shape
    full, partial = all_[..., block], (some & ~all_)[..., block]
    chosen = unpack_bits(_by_tile(bits, token), count).transpose(3, 4)
    masks = -chosen.to(torch.int32)[..., None].expand(*chosen.shape, _WORDS)
    masks = masks.reshape(-1, BLOCK, _WORDS)
    number = torch.arange(batch * heads * rows * count, device=bits.device)
    number = number.view(batch, heads, rows, count)[..., block].to(torch.int32)
    lists = {}
    for name, visited in (("full", full), ("partial", partial)):
        index = (~visited).to(torch.uint8).argsort(dim=-1, stable=True)
        lists[f"{name}_count"] = visited.sum(-1, dtype=torch.int32)
        lists[f"{name}_index"] = index.to(torch.int32)
    return BlockLayout(
        tokens_q=token.numel(),
        tokens_kv=token.numel(),
        block_q=BLOCK,
        block_kv=BLOCK,
        **lists,
        partial_mask=number.gather(-1, lists["partial_index"].long()),
        bit_masks=masks,
    )
