"""Selected blocks on the block-sparse kernels: each tile of queries computes a union of blocks.

The union of a tile holds the blocks that any of its queries has selected. Bit masks hide from each
query the blocks that it has not selected. Where neighbouring queries select alike, little work is
wasted, and tiles run at the rate of dense attention. Blocks are filled up to whole tiles, so that
no tile lies in two blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from diffattn.blocks import BlockLayout, unpack_bits
from diffattn.masks.base import BLOCK
from diffattn.operator import attention
from diffattn.selected.key_blocks import KeyBlocks

_WORDS = BLOCK // 32
# Bytes of bit masks that are made at a time; heads take turns where all heads would need more.
_MASK_BYTES = 1 << 28
# The union is taken where it computes at most this many times the selected pairs. The factor comes
# from a model of the gather's memory traffic, not from a measurement.
_MOST_PAIRS = 1.5


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


@dataclass(frozen=True)
class _Measurement:
    """`union_pairs` and `selected_pairs` of a call, on their way from the device.

    Attributes:
        numbers: float `(2,)` on the CPU, the two numbers.
        arrived: the event after which `numbers` may be read.
    """

    numbers: torch.Tensor
    arrived: torch.Event


_measured: WeakKeyDictionary[KeyBlocks, _Measurement] = WeakKeyDictionary()
_chosen: WeakKeyDictionary[KeyBlocks, bool] = WeakKeyDictionary()


def prefers_union(blocks: KeyBlocks, bits: torch.Tensor) -> bool:
    """Whether the union of blocks was less work in earlier calls over the same blocks.

    Each call measures on the device, and a later call reads the result without waiting. Before the
    first result the answer is False.
    """
    if bits.is_cuda and torch.cuda.is_current_stream_capturing():
        return _chosen.get(blocks, False)
    last = _measured.get(blocks)
    if last is not None and not last.arrived.query():
        return _chosen.get(blocks, False)
    if last is not None:
        union, selected = last.numbers.tolist()
        _chosen[blocks] = union <= _MOST_PAIRS * selected
    numbers = torch.stack([union_pairs(blocks, bits), selected_pairs(blocks, bits)])
    numbers = numbers.to("cpu", non_blocking=True)
    arrived = torch.Event(bits.device)
    arrived.record()
    _measured[blocks] = _Measurement(numbers, arrived)
    return _chosen.get(blocks, False)


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
