"""Selection: which key blocks each query attends to, chosen by what queries and keys hold.

A query scores a block by its product with the mean of the block's keys. Scores that are ranked
together, a pool, become fixed-point numbers of 24 bits from its lowest to its highest score. Sums
of these are exact in any order, so that the same tensors always select the same blocks; of equal
ones the first in the sequence is the better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.blocks import pack_bits
from diffattn.selected.key_blocks import KeyBlocks

# What is ranked together, of one sample: the blocks of a query, or all pairs of query and block of
# a head. The public code has two more, which the paper does not mention: all pairs of a block over
# all heads, and all pairs of all heads.
SCOPES = ("query", "head", "unpublished-block", "unpublished-all")

_LEVEL_BITS = 12
_LEVELS = 1 << _LEVEL_BITS
_HIGHEST = (1 << 2 * _LEVEL_BITS) - 1
# A pool whose scores differ by less is one of equal scores: the rest is rounding.
_SMALLEST_SPREAD = 1e-5
# Pools of up to so many pairs are sorted, larger ones counted in histograms.
_LONGEST_SORTED = 1024
# Histograms that threads of a GPU add to in turn, so that they wait less for each other.
_COPIES = 32
# Pairs of query and block that are worked on at once, at some 40 bytes each, where pools are no
# larger: what the caches of a CPU hold, and enough for all of a GPU.
_PAIRS_AT_ONCE = {"cpu": 1 << 18}
_PAIRS_AT_ONCE_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Rule:
    """How blocks are chosen; every query's own block always is.

    Attributes:
        scope: what is ranked together, one of `SCOPES`.
        topk: blocks per query, its own counted, on average over the pool; as many as there are if
            that is less. None to choose by `tau`.
        tau: share of a pool's similarity that is kept, own blocks counted; 1 keeps all blocks.
        centre_keys: take the mean of all blocks off each block's mean.
        tile: queries that decide together, by their mean; 1 for each by itself.
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
    """The blocks that each query selects. Text selects all blocks, and is selected by all.

    Args:
        query, key: (batch, tokens, heads, head_dim), in the order of the blocks.
        blocks: the blocks of the sequence.
        rule: how they are chosen.
        key_mask: bool (batch, tokens): padded tokens, False, count in no mean and no pool; as
            queries they select their own block.

    Returns:
        bits: int32 `(batch, heads, tokens, ceil(blocks / 32))`: bit `c % 32` of word `c // 32` is
        set when a query selects block `c`. No gradient goes through it.
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
    # An autocast region would do the scores in half precision.
    with torch.autocast(query.device.type, enabled=False):
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
                bits[sample, some, video] = _with_text(chosen, blocks)
    return bits


def choose(
    scores: torch.Tensor,
    own: torch.Tensor,
    *,
    ranked: torch.Tensor | None = None,
    tau: float | None = None,
    budget: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The best entries of each pool: as few as reach a share of the similarity, or a number.

    Args:
        scores: (pools, entries).
        own: bool, of the same shape: entries that are chosen in any case and count.
        ranked: bool, of the same shape: others do not count, and are not chosen unless they are
            own; all when None.
        tau: of the sum of scores, from 0 at the pool's lowest to 1 at its highest, the share to
            reach. A pool of equal scores has no similarity to be reached.
        budget: number of entries to reach instead, the same in all pools.

    Returns:
        bool (pools, entries).
    """
    step = max(1, _pairs_at_once(scores.device) // scores.shape[1])
    if len(scores) > step:
        parts = [slice(start, start + step) for start in range(0, len(scores), step)]
        return torch.cat(
            [
                choose(
                    scores[part],
                    own[part],
                    ranked=None if ranked is None else ranked[part],
                    tau=tau,
                    budget=budget,
                )
                for part in parts
            ]
        )
    points = _fixed_point(scores, ranked)
    candidate = ~own if ranked is None else ranked & ~own
    if tau is None:
        assert budget is not None
        need = budget - (own if ranked is None else own & ranked).sum(1)
        weight = candidate.to(torch.int64)
    else:
        total = points.sum(1, dtype=torch.int64)
        need = (total.double() * tau).ceil().long() - (points * own).sum(1, dtype=torch.int64)
        weight = (points * candidate).to(torch.int64)
    best = _by_sorting if scores.shape[1] <= _LONGEST_SORTED else _by_counting
    return own | best(points, candidate, weight, need)


def _mean_block(
    means: torch.Tensor, blocks: KeyBlocks, counted: torch.Tensor | None
) -> torch.Tensor:
    """The mean of the blocks that have a token that counts, (batch, 1, heads, head_dim)."""
    if counted is None:
        return means.mean(1, keepdim=True)
    # The means of the others are 0.
    holding = _holds_any(blocks, counted).sum(1).clamp(min=1)
    return means.sum(1, keepdim=True) / holding[:, None, None, None]


def _holds_any(blocks: KeyBlocks, counted: torch.Tensor) -> torch.Tensor:
    """Bool (batch, video blocks): whether any token of a block counts."""
    return blocks.means(counted[:, :, None, None].float())[:, :, 0, 0] > 0


def _ranked(
    blocks: KeyBlocks, deciders: KeyBlocks, counted: torch.Tensor, tile: int
) -> torch.Tensor:
    """Bool (queries, blocks) of one sample: pairs in which both hold a token that counts."""
    queries = counted if tile == 1 else _holds_any(deciders, counted[None])[0]
    return queries[:, None] & _holds_any(blocks, counted[None])


def _pairs_at_once(device: torch.device) -> int:
    return _PAIRS_AT_ONCE.get(device.type, _PAIRS_AT_ONCE_ELSEWHERE)


def _head_parts(heads: int, pairs: int, scope: str, device: torch.device) -> list[slice]:
    """Heads that are worked on at once: as many as memory allows, or all that share a pool."""
    step = heads
    if scope in ("query", "head"):
        step = min(heads, max(1, _pairs_at_once(device) // pairs))
    return [slice(head, min(head + step, heads)) for head in range(0, heads, step)]


def _scores(query: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """(heads, queries, blocks), in the precision of the means, without a factor."""
    return query.to(means.dtype).transpose(0, 1) @ means.permute(1, 2, 0)


def _choose(
    scores: torch.Tensor, own: torch.Tensor, ranked: torch.Tensor | None, rule: Rule
) -> torch.Tensor:
    """Bool (heads, queries, blocks) for the scores of some heads of a sample.

    Args:
        own: int64 (queries,), the own block of each.
        ranked: bool (queries, blocks).
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


def _with_text(chosen: torch.Tensor, blocks: KeyBlocks) -> torch.Tensor:
    """Bits of (heads, video tokens, blocks): those chosen, and the text."""
    ends = (int(blocks.text_before > 0), int(blocks.text_after > 0))
    return pack_bits(torch.nn.functional.pad(chosen, ends, value=True))


def _fixed_point(scores: torch.Tensor, ranked: torch.Tensor | None) -> torch.Tensor:
    """int32: 0 for the lowest score of a pool to `_HIGHEST`; 0 where all are equal or unranked."""
    lowest = highest = scores
    if ranked is not None:
        lowest = scores.masked_fill(~ranked, torch.inf)
        highest = scores.masked_fill(~ranked, -torch.inf)
    low, high = lowest.amin(1, keepdim=True), highest.amax(1, keepdim=True)
    spread = high - low
    differ = spread > _SMALLEST_SPREAD * torch.maximum(low.abs(), high.abs())
    factor = torch.where(differ, _HIGHEST / spread, 0)
    points = torch.where(differ, (scores - low) * factor, 0).round_()
    if ranked is not None:
        points = points.masked_fill_(~ranked, 0)
    return points.nan_to_num_(0).clamp_(0, _HIGHEST).to(torch.int32)


def _by_sorting(
    points: torch.Tensor, candidate: torch.Tensor, weight: torch.Tensor, need: torch.Tensor
) -> torch.Tensor:
    """The fewest candidates, best first, whose weights reach `need`; all if they do not."""
    entries = points.shape[1]
    # No two are equal: the first of equal points has the higher number.
    place = torch.arange(entries - 1, -1, -1, device=points.device)
    number = (points.long() * entries + place).masked_fill_(~candidate, -1)
    ordered, order = number.sort(1, descending=True)
    weight = weight.gather(1, order)
    before = weight.cumsum(1) - weight
    taken = (ordered >= 0) & (before < need[:, None])
    last = ordered.masked_fill_(~taken, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
    return number >= last


def _by_counting(
    points: torch.Tensor, candidate: torch.Tensor, weight: torch.Tensor, need: torch.Tensor
) -> torch.Tensor:
    """What `_by_sorting` gives, without sorting: histograms of the upper and of the lower bits."""
    upper, lower = points >> _LEVEL_BITS, points & (_LEVELS - 1)
    high, need = _last_level(upper, weight, need)
    low, need = _last_level(lower, weight * (upper == high[:, None]), need)
    last = (high * _LEVELS + low)[:, None]
    # Of those at the last level as many as are still needed; all of them have the same weight.
    tied = candidate & (points == last)
    each = (weight * tied).amax(1).clamp(min=1)
    wanted = (need + each - 1) // each
    return candidate & (points > last) | tied & (
        tied.cumsum(1, dtype=torch.int32) <= wanted[:, None]
    )


def _last_level(
    level: torch.Tensor, weight: torch.Tensor, need: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The level, counted from the top, at which weights reach `need`, and what it has to give.

    -1 if they never do, `_LEVELS` if nothing is needed.
    """
    pools, entries = level.shape
    copies = _COPIES if level.is_cuda else 1
    histogram = weight.new_zeros(pools * _LEVELS * copies)
    bin_ = level.long() + torch.arange(pools, device=level.device)[:, None] * _LEVELS
    if copies > 1:
        bin_ = bin_ * copies + torch.arange(entries, device=level.device) % copies
    histogram.scatter_add_(0, bin_.flatten(), weight.flatten())
    per_level = histogram.view(pools, _LEVELS, copies).sum(2)
    reached = torch.nn.functional.pad(per_level.flip(1).cumsum(1).flip(1), (0, 2))
    last = (reached[:, : _LEVELS + 1] >= need[:, None]).sum(1) - 1
    return last, need - reached.gather(1, last[:, None] + 1)[:, 0]
