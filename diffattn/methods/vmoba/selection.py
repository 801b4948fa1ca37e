"""Selection of the key blocks for each query, by the content of queries and keys.

VMoBA is one combination of the parts of `diffattn.routing`:
    order: `Partition`, another one in each layer;
    score: `mean_scores` of each query, or of the mean of a tile of queries;
    rule: `best_in_pools`, by a number of blocks or a share of the similarity;
    always: a query's own block, which counts, and all blocks that hold no video.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.blocks import pack_bits
from diffattn.kernels.autocast import autocast_off
from diffattn.operator import backend_of, check_triton
from diffattn.routing.choosing import pairs_at_once
from diffattn.routing.pools import best_in_pools
from diffattn.routing.scores import mean_scores
from diffattn.selected.key_blocks import KeyBlocks


@dataclass(frozen=True)
class Rule:
    """The rule that selects blocks; a query always selects its own block.

    Attributes:
        scope: the scores that are ranked together, one of `diffattn.routing.pools.SCOPES`.
        topk: blocks per query, the own block included, on average over the pool; limited to the
            number of blocks. None to select by `tau`.
        tau: share of a pool's similarity to keep, own blocks included; 1 keeps all blocks.
        centre_keys: whether to subtract the mean of all blocks from each block's mean key.
        tile: queries that select together, by their mean; 1 for a selection by each query.
    """

    scope: str
    topk: int | None = None
    tau: float | None = None
    centre_keys: bool = False
    tile: int = 1


@torch.no_grad()
def select_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    blocks: KeyBlocks,
    rule: Rule,
    *,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The blocks that each query selects; all queries select all blocks that hold no video.

    Tokens that are no video tokens select all blocks.

    Args:
        query, key: (batch, tokens, heads, head_dim), in the order of the blocks.
        blocks: the blocks of the sequence.
        rule: the rule that selects blocks.
        key_mask: bool (batch, tokens): False for padded tokens, which count in no mean and in no
            pool. A padded query selects its own block.

    Returns:
        int32 `(batch, heads, tokens, ceil(blocks / 32))`, without a gradient: bit `c % 32` of word
        `c // 32` is set if the query selects block `c`.
    """
    batch, tokens, heads, _ = query.shape
    others = len(blocks.others_before) + len(blocks.others_after)
    is_dense = rule.tau == 1 or (rule.topk is not None and rule.topk >= blocks.video_blocks)
    if is_dense or others:
        words = -(-blocks.blocks // 32)
        bits = torch.empty(batch, heads, tokens, words, dtype=torch.int32, device=query.device)
        bits[:] = pack_bits(torch.ones(blocks.blocks, dtype=torch.bool, device=query.device))
        if is_dense:
            return bits
    video = blocks.video
    # In an autocast region the scores would be in half precision. A tangent of forward-mode
    # differentiation ends here.
    with autocast_off(query.device.type):
        select = _select_by_triton if _takes_triton(query, blocks, rule) else _select_by_torch
        of_video = select(query.detach(), key.detach(), blocks, rule, key_mask)
    if not others:
        return of_video
    bits[:, :, video] = of_video
    return bits


def _select_by_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    blocks: KeyBlocks,
    rule: Rule,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """The bits of `select_blocks` for the video tokens, in a few passes over memory."""
    from diffattn.kernels.gather.best_blocks import best_blocks, block_means

    before, video = len(blocks.others_before), blocks.video
    counted = None if key_mask is None else key_mask[:, video]
    means, holds = block_means(key, blocks.starts, key_mask, before, blocks.video_blocks)
    if rule.centre_keys:
        means = means - _mean_block(means, None if counted is None else holds)
    query, own, deciding = query[:, video], blocks.block_of, counted
    if rule.tile > 1:
        tiles = blocks.cut(rule.tile)
        query, tile_holds = block_means(query, tiles.starts, counted, 0, len(tiles.lengths))
        own = own[tiles.members[:, 0]]
        deciding = None if counted is None else tile_holds
    bits = best_blocks(
        query, means, own, deciding, None if counted is None else holds, before, blocks.blocks,
        rule.scope == "head", rule.topk, rule.tau,
    )  # fmt: skip
    return bits.index_select(2, blocks.cut(rule.tile).block_of) if rule.tile > 1 else bits


def _select_by_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    blocks: KeyBlocks,
    rule: Rule,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """The bits of `select_blocks` for the video tokens."""
    batch, _, heads, _ = query.shape
    counted = None if key_mask is None else key_mask[:, blocks.video]
    means = blocks.means(key[:, blocks.video], counted)
    holds = None if counted is None else blocks.holds_any(counted)
    if rule.centre_keys:
        means = means - _mean_block(means, holds)
    queries, own, deciding = _deciders(query[:, blocks.video], blocks, rule, counted)
    shape = (batch, heads, len(blocks.block_of), -(-blocks.blocks // 32))
    bits = query.new_empty(shape, dtype=torch.int32)
    is_own = own[:, None] == torch.arange(blocks.video_blocks, device=own.device)
    for sample in range(batch):
        ranked = None
        if deciding is not None and holds is not None:
            ranked = deciding[sample][:, None] & holds[sample]
        pairs = queries.shape[1] * blocks.video_blocks
        for some in _head_parts(heads, pairs, rule.scope, query.device):
            one = slice(sample, sample + 1)
            scores = mean_scores(queries[one, :, some].to(means.dtype), means[one, :, some])[0]
            chosen = best_in_pools(
                scores, is_own, scope=rule.scope, ranked=ranked, topk=rule.topk, tau=rule.tau
            )
            if rule.tile > 1:
                chosen = chosen[:, blocks.cut(rule.tile).block_of]
            bits[sample, some] = _with_others(chosen, blocks)
    return bits


def _deciders(
    query: torch.Tensor, blocks: KeyBlocks, rule: Rule, counted: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries, or means of tiles of queries, with the block of each and whether it counts."""
    if rule.tile == 1:
        return query, blocks.block_of, counted
    tiles = blocks.cut(rule.tile)
    own = blocks.block_of[tiles.members[:, 0]]
    return tiles.means(query, counted), own, None if counted is None else tiles.holds_any(counted)


def _takes_triton(query: torch.Tensor, blocks: KeyBlocks, rule: Rule) -> bool:
    """Whether a Triton kernel makes the selection."""
    if backend_of(query.device) != "triton":
        return False
    check_triton()
    from diffattn.kernels.gather.best_blocks import DTYPES, MOST_BLOCKS

    return (
        (rule.scope == "head" or (rule.scope == "query" and rule.topk is not None))
        and blocks.blocks <= MOST_BLOCKS
        and query.dtype in DTYPES
    )


def _mean_block(means: torch.Tensor, holds: torch.Tensor | None) -> torch.Tensor:
    """The mean over the blocks with a counted token, (batch, 1, heads, head_dim)."""
    if holds is None:
        return means.mean(1, keepdim=True)
    # The mean of a block without counted tokens is 0.
    return means.sum(1, keepdim=True) / holds.sum(1).clamp(min=1)[:, None, None, None]


def _head_parts(heads: int, pairs: int, scope: str, device: torch.device) -> list[slice]:
    """The parts of the heads to process at once: by memory, or all heads if they share a pool."""
    step = heads
    if scope in ("query", "head"):
        step = min(heads, max(1, pairs_at_once(device) // pairs))
    return [slice(head, min(head + step, heads)) for head in range(0, heads, step)]


def _with_others(chosen: torch.Tensor, blocks: KeyBlocks) -> torch.Tensor:
    """Bits of the chosen blocks, bool (heads, video tokens, blocks), and of the other blocks."""
    ends = (len(blocks.others_before), len(blocks.others_after))
    return pack_bits(torch.nn.functional.pad(chosen, ends, value=True))
