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
        earlier: int32 like `query`, how many earlier blocks the query has selected.
        selected: int32 `(pairs, tokens)`, how many blocks a query has selected.
    """

    first: torch.Tensor
    query: torch.Tensor
    earlier: torch.Tensor
    selected: torch.Tensor


def scratch_bytes() -> int:
    """Bytes of lists and of running sums or partial results at a time."""
    return _SCRATCH_BYTES


def turns(pairs: int, bytes_per_pair: int) -> Iterator[tuple[int, int]]:
    """First pair and number of pairs of each turn, about equally many in each."""
    count = -(-pairs // max(1, _SCRATCH_BYTES // bytes_per_pair))
    stops = [pairs * i // count for i in range(count + 1)]
    for start, stop in pairwise(stops):
        yield start, stop - start


def list_bytes(blocks: int, tokens: int) -> int:
    """Bytes that the lists of a pair have room for."""
    return (blocks * (2 * tokens + triton.cdiv(tokens, CHUNK) + 1) + tokens) * 4


@triton.jit
def load_flags(
    p_bits, s_bb, s_bh, s_bt, s_bw, first_pair, tokens, heads, chunks, words, CHUNK: tl.constexpr
):
    """1 where a query of the program's chunk selected a block of its word, else 0; pair, places."""
    i_program = tl.program_id(0)
    i_word = i_program % words
    i_chunk = i_program // words % chunks
    i_pair = i_program // words // chunks
    i_bh = first_pair + i_pair
    p_bits += (i_bh // heads).to(tl.int64) * s_bb + (i_bh % heads).to(tl.int64) * s_bh
    o_t = i_chunk * CHUNK + tl.arange(0, CHUNK)
    p_word = p_bits + o_t.to(tl.int64) * s_bt
    b_word = tl.load(p_word + i_word.to(tl.int64) * s_bw, mask=o_t < tokens, other=0)  # (CHUNK,)
    b_flag = (b_word[:, None] >> tl.arange(0, 32)[None, :]) & 1  # (CHUNK, 32)
    return b_flag, p_word, i_pair.to(tl.int64), i_chunk, i_word, o_t


@triton.jit(do_not_specialize=["first_pair", "tokens", "blocks", "chunks"])
def count_kernel(
    p_bits, p_count, s_bb, s_bh, s_bt, s_bw, first_pair, tokens, heads, blocks, chunks, words,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the queries of a chunk that selected each of 32 blocks."""
    b_flag, _, i_pair, i_chunk, i_word, _ = load_flags(
        p_bits, s_bb, s_bh, s_bt, s_bw, first_pair, tokens, heads, chunks, words, CHUNK
    )
    o_c = i_word * 32 + tl.arange(0, 32)
    # Stored one place on: the running sum at a chunk then counts the queries before the chunk.
    p_count += i_pair * blocks * (chunks + 1) + i_chunk + 1
    tl.store(p_count + o_c * (chunks + 1), tl.sum(b_flag, 0), mask=o_c < blocks)


@triton.jit(do_not_specialize=["first_pair", "tokens", "blocks", "chunks"])
def fill_kernel(
    p_bits, p_first, p_query, p_earlier, p_selected, s_bb, s_bh, s_bt, s_bw,
    first_pair, tokens, heads, blocks, chunks, words, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the queries of a chunk that selected a block to the lists of 32 blocks."""
    b_flag, p_word, i_pair, i_chunk, i_word, o_t = load_flags(
        p_bits, s_bb, s_bh, s_bt, s_bw, first_pair, tokens, heads, chunks, words, CHUNK
    )
    o_c = i_word * 32 + tl.arange(0, 32)
    b_flag = tl.where((o_c < blocks)[None, :], b_flag, 0)  # bits past the last block
    b_before = tl.zeros((CHUNK,), dtype=tl.int32)
    for _ in tl.range(0, i_word):
        b_word = tl.load(p_word, mask=o_t < tokens, other=0)  # (CHUNK,)
        p_word += s_bw
        b_before += tl.sum((b_word[:, None] >> tl.arange(0, 32)[None, :]) & 1, 1)
    # b_first: (32,)
    p_first += i_pair * blocks * (chunks + 1) + i_chunk
    b_first = tl.load(p_first + o_c * (chunks + 1), mask=o_c < blocks, other=0)
    # All (CHUNK, 32).
    b_place = b_first[None, :] + tl.cumsum(b_flag, 0) - b_flag
    b_earlier = b_before[:, None] + tl.cumsum(b_flag, 1) - b_flag
    b_place += (o_c * tokens)[None, :]
    p_query += i_pair * blocks * tokens
    p_earlier += i_pair * blocks * tokens
    b_query = tl.broadcast_to(o_t[:, None], (CHUNK, 32))
    tl.store(p_query + b_place, b_query, mask=b_flag != 0)
    tl.store(p_earlier + b_place, b_earlier, mask=b_flag != 0)
    if i_word == words - 1:
        b_selected = b_before + tl.sum(b_flag, 1)  # (CHUNK,)
        tl.store(p_selected + i_pair * tokens + o_t, b_selected, mask=o_t < tokens)


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
    _, heads, tokens, words = bits.shape
    chunks = triton.cdiv(tokens, chunk)
    count = bits.new_zeros((pairs, blocks, chunks + 1))
    query, earlier = (bits.new_empty((pairs, blocks, tokens)) for _ in range(2))
    selected = bits.new_empty((pairs, tokens))
    numbers = (*bits.stride(), first_pair, tokens, heads, blocks, chunks, words)
    grid = (pairs * chunks * words,)
    count_kernel[grid](bits, count, *numbers, CHUNK=chunk)
    first = count.cumsum(-1, dtype=torch.int32)
    fill_kernel[grid](
        bits, first, query, earlier, selected, *numbers, CHUNK=chunk, num_warps=8
    )  # fmt: skip
    return Lists(first, query, earlier, selected)


@dataclass(frozen=True)
class QueryTiles:
    """Lists cut into tiles of queries, one list after another.

    Attributes:
        stop: int32 `(lists,)`, the first tile after each list.
        list: int32, the list of each tile; the number of lists for surplus tiles.
    """

    stop: torch.Tensor
    list: torch.Tensor


def query_tiles(lists: Lists, tile: int) -> QueryTiles:
    """Cut the lists into tiles of at most `tile` queries.

    The number of tiles depends on values; there are as many as an upper bound from shapes.
    """
    _, _, tokens = lists.query.shape
    count = lists.first[:, :, -1].flatten()
    stop = ((count + (tile - 1)) // tile).cumsum(0, dtype=torch.int32)
    number = torch.arange(len(count) * triton.cdiv(tokens, tile), device=count.device)
    return QueryTiles(stop, torch.searchsorted(stop, number.int(), right=True, out_int32=True))


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
