"""Lists of the queries that selected a key block, made without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl

# Queries per chunk. Lists record where each chunk begins: programs begin at a multiple of this.
CHUNK = 256

# Bytes of lists and running sums at a time. Every list has room for every query, because only the
# device knows how many are needed. Heads take turns where all of them together would need more.
_SCRATCH_BYTES = 2**30


@dataclass(frozen=True)
class Lists:
    """The queries that selected each key block, for a range of pairs.

    A pair is a head of a sample; pairs are numbered through all samples.

    Attributes:
        first: int32 `(pairs, blocks, chunks + 1)`, how many queries before each chunk selected a
            block; the last entry counts all queries that selected it.
        query: int32 `(pairs, blocks, tokens)`, the queries that selected a block, ascending; places
            beyond their number are undefined.
    """

    first: torch.Tensor
    query: torch.Tensor


def turns(pairs: int, bytes_per_pair: int) -> Iterator[tuple[int, int]]:
    """First pair and number of pairs of each turn, about equally many in each."""
    count = -(-pairs // max(1, _SCRATCH_BYTES // bytes_per_pair))
    stops = [pairs * i // count for i in range(count + 1)]
    for start, stop in pairwise(stops):
        yield start, stop - start


def list_bytes(blocks: int, tokens: int) -> int:
    """Bytes that the lists of a pair have room for."""
    return blocks * (tokens + triton.cdiv(tokens, CHUNK) + 1) * 4


@triton.jit
def load_flags(
    p_bits, s_bb, s_bh, s_bt, s_bw, first_pair, tokens, heads, blocks, chunks, CHUNK: tl.constexpr
):
    """1 for queries of the program's chunk that selected its block, else 0; list, chunk, tokens."""
    i_program = tl.program_id(0)
    i_chunk = i_program % chunks
    i_list = i_program // chunks
    i_block = i_list % blocks
    i_pair = first_pair + i_list // blocks
    p_bits += (i_pair // heads).to(tl.int64) * s_bb + (i_pair % heads).to(tl.int64) * s_bh
    p_bits += (i_block // 32).to(tl.int64) * s_bw
    o_t = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_word = tl.load(p_bits + o_t.to(tl.int64) * s_bt, mask=o_t < tokens, other=0)  # (CHUNK,)
    return (b_word >> (i_block % 32)) & 1, i_list.to(tl.int64), i_chunk, o_t


@triton.jit(do_not_specialize=["first_pair", "tokens", "blocks", "chunks"])
def count_kernel(
    p_bits, p_count, s_bb, s_bh, s_bt, s_bw, first_pair, tokens, heads, blocks, chunks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the queries of a chunk that selected a block."""
    b_flag, i_list, i_chunk, _ = load_flags(
        p_bits, s_bb, s_bh, s_bt, s_bw, first_pair, tokens, heads, blocks, chunks, CHUNK
    )
    # Stored one place on: the running sum at a chunk then counts the queries before the chunk.
    tl.store(p_count + i_list * (chunks + 1) + i_chunk + 1, tl.sum(b_flag, 0))


@triton.jit(do_not_specialize=["first_pair", "tokens", "blocks", "chunks"])
def fill_kernel(
    p_bits, p_first, p_query, s_bb, s_bh, s_bt, s_bw, first_pair, tokens, heads, blocks, chunks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the queries of a chunk that selected a block to the block's list."""
    b_flag, i_list, i_chunk, o_t = load_flags(
        p_bits, s_bb, s_bh, s_bt, s_bw, first_pair, tokens, heads, blocks, chunks, CHUNK
    )
    # b_place: (CHUNK,)
    b_place = tl.load(p_first + i_list * (chunks + 1) + i_chunk) + tl.cumsum(b_flag, 0) - b_flag
    tl.store(p_query + i_list * tokens + b_place, o_t, mask=b_flag != 0)


def selecting_queries(
    bits: torch.Tensor, blocks: int, first_pair: int, pairs: int, chunk: int
) -> Lists:
    """The lists of a range of pairs.

    Args:
        bits: int32 `(batch, heads, tokens, words)`, of any strides.
        blocks: number of key blocks.
        first_pair, pairs: the first pair and the number of pairs.
        chunk: queries per chunk, a power of 2.
    """
    _, heads, tokens, _ = bits.shape
    chunks = triton.cdiv(tokens, chunk)
    count = bits.new_zeros((pairs, blocks, chunks + 1))
    query = bits.new_empty((pairs, blocks, tokens))
    numbers = (*bits.stride(), first_pair, tokens, heads, blocks, chunks)
    grid = (pairs * blocks * chunks,)
    count_kernel[grid](bits, count, *numbers, CHUNK=chunk)
    first = count.cumsum(-1, dtype=torch.int32)
    fill_kernel[grid](bits, first, query, *numbers, CHUNK=chunk)
    return Lists(first, query)


@dataclass(frozen=True)
class KeyTiles:
    """Key blocks cut into tiles; no tile reaches into a second block.

    Attributes:
        block: int32 `(tiles,)`, the block of each tile; the number of blocks for surplus tiles.
        start: int32 `(tiles,)`, the first token of a tile.
        order: int32 `(pairs, tiles)`, tiles with the longest lists first.
    """

    block: torch.Tensor
    start: torch.Tensor
    order: torch.Tensor


def key_tiles(starts: torch.Tensor, tokens_kv: int, tile: int, lists: Lists) -> KeyTiles:
    """Cut the blocks between `starts` into tiles of at most `tile` keys.

    The number of tiles depends on values; there are as many as an upper bound from shapes.
    """
    length = starts.diff()
    blocks = len(length)
    count = (length + (tile - 1)).div(tile, rounding_mode="floor")
    stop = count.cumsum(0, dtype=torch.int32)
    number = torch.arange(tokens_kv // tile + blocks, dtype=torch.int32, device=starts.device)
    block = torch.searchsorted(stop, number, right=True, out_int32=True)
    inside = block.clamp(max=blocks - 1).long()
    start = starts[inside] + (number - stop[inside] + count[inside]) * tile
    selecting = lists.first[:, :, -1][:, inside].masked_fill(block == blocks, -1)
    order = selecting.sort(dim=-1, descending=True, stable=True).indices.int()
    return KeyTiles(block, start.int(), order)
