"""Selection of the key blocks for each query, by the content of queries and keys.

A query's score of a block is the product of the query with the mean of the block's keys. The scores
that are ranked together are a pool, from which `diffattn.routing.choosing` takes the best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.blocks import pack_bits
from diffattn.kernels.autocast import autocast_off
from diffattn.routing.choosing import choose, pairs_at_once
from diffattn.selected.key_blocks import KeyBlocks

# The pools of one sample: the blocks of a query, or all pairs of query and block of a head. Two
# more are in the public code and not in the paper: all pairs of a block over all heads, and all
# pairs of all heads.
SCOPES = ("query", "head", "unpublished-block", "unpublished-all")


@dataclass(frozen=True)
class Rule:
    """The rule that selects blocks; a query always selects its own block.

    Attributes:
        scope: the scores that are ranked together, one of `SCOPES`.
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
    words = -(-blocks.blocks // 32)
    bits = torch.empty(batch, heads, tokens, words, dtype=torch.int32, device=query.device)
    bits[:] = pack_bits(torch.ones(blocks.blocks, dtype=torch.bool, device=query.device))
    if rule.tau == 1 or (rule.topk is not None and rule.topk >= blocks.video_blocks):
        return bits
    video = blocks.video
    counted = None if key_mask is None else key_mask[:, video]
    query, key = query[:, video], key[:, video]
    deciders = blocks
    # In an autocast region the scores would be in half precision.
    with autocast_off(query.device.type):
        means = blocks.means(key, counted)
        if rule.centre_keys:
            means = means - _mean_block(means, blocks, counted)
        if rule.tile > 1:
            deciders = blocks.cut(rule.tile)
            query = deciders.means(query, counted)
            own = blocks.block_of[deciders.members[:, 0]]
        else:
            own = blocks.block_of
        for sample in range(batch):
            ranked = None
            if counted is not None:
                ranked = _ranked(blocks, deciders, counted[sample], rule.tile)
            pairs = query.shape[1] * blocks.video_blocks
            for some in _head_parts(heads, pairs, rule.scope, query.device):
                scores = _scores(query[sample, :, some], means[sample, :, some])
                chosen = _choose(scores, own, ranked, rule)
                if rule.tile > 1:
                    chosen = chosen[:, deciders.block_of]
                bits[sample, some, video] = _with_others(chosen, blocks)
    return bits


def _mean_block(
    means: torch.Tensor, blocks: KeyBlocks, counted: torch.Tensor | None
) -> torch.Tensor:
    """The mean over the blocks with a counted token, (batch, 1, heads, head_dim)."""
    if counted is None:
        return means.mean(1, keepdim=True)
    # The mean of a block without counted tokens is 0.
    holding = blocks.holds_any(counted).sum(1).clamp(min=1)
    return means.sum(1, keepdim=True) / holding[:, None, None, None]


def _ranked(
    blocks: KeyBlocks, deciders: KeyBlocks, counted: torch.Tensor, tile: int
) -> torch.Tensor:
    """Whether query and block both have a counted token: bool (queries, blocks) of one sample."""
    queries = counted if tile == 1 else deciders.holds_any(counted[None])[0]
    return queries[:, None] & blocks.holds_any(counted[None])


def _head_parts(heads: int, pairs: int, scope: str, device: torch.device) -> list[slice]:
    """The parts of the heads to process at once: by memory, or all heads if they share a pool."""
    step = heads
    if scope in ("query", "head"):
        step = min(heads, max(1, pairs_at_once(device) // pairs))
    return [slice(head, min(head + step, heads)) for head in range(0, heads, step)]


def _scores(query: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The scores, (heads, queries, blocks), in the dtype of the means, without a scale."""
    return query.to(means.dtype).transpose(0, 1) @ means.permute(1, 2, 0)


def _choose(
    scores: torch.Tensor, own: torch.Tensor, ranked: torch.Tensor | None, rule: Rule
) -> torch.Tensor:
    """The chosen blocks for some heads of a sample, bool (heads, queries, blocks).

    Args:
        scores: (heads, queries, blocks).
        own: int64 (queries,), the own block of each query.
        ranked: bool (queries, blocks): the pairs that count; None if all count.
        rule: the rule that selects blocks.
    """
    heads, queries, count = scores.shape
    is_own = own[:, None] == torch.arange(count, device=own.device)

    def pools(x: torch.Tensor) -> torch.Tensor:
        x = x.expand(heads, queries, count)
        if rule.scope == "query":
            return x.reshape(heads * queries, count)
        if rule.scope == "head":
            return x.reshape(heads, queries * count)
        if rule.scope == "unpublished-all":
            return x.reshape(1, -1)
        return x.permute(2, 0, 1).reshape(count, heads * queries)

    budget: int | torch.Tensor | None = None
    if rule.topk is not None:
        budget = min(rule.topk, count)
        if rule.scope != "query":
            budget = budget * (queries if ranked is None else ranked.any(1).sum())
        if rule.scope == "unpublished-all":
            budget = budget * heads
    chosen = choose(
        pools(scores),
        pools(is_own),
        ranked=None if ranked is None else pools(ranked),
        tau=rule.tau if rule.topk is None else None,
        budget=budget,
    )
    if rule.scope == "unpublished-block":
        return chosen.view(count, heads, queries).permute(1, 2, 0)
    return chosen.view(heads, queries, count)


def _with_others(chosen: torch.Tensor, blocks: KeyBlocks) -> torch.Tensor:
    """Bits of the chosen blocks, bool (heads, video tokens, blocks), and of the other blocks."""
    ends = (len(blocks.others_before), len(blocks.others_after))
    return pack_bits(torch.nn.functional.pad(chosen, ends, value=True))
