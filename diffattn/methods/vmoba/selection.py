"""Selection of the key blocks for each query, by the content of queries and keys.

A query's score of a block is the product of the query with the mean of the block's keys. The scores
that are ranked together are a pool. They become fixed-point numbers of 24 bits, from the lowest to
the highest score of the pool. Sums of such numbers are exact in any order: the same tensors always
select the same blocks. Of equal scores the first in the sequence is the best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.blocks import pack_bits
from diffattn.selected.key_blocks import KeyBlocks

# The pools of one sample: the blocks of a query, or all pairs of query and block of a head. Two
# more are in the public code and not in the paper: all pairs of a block over all heads, and all
# pairs of all heads.
SCOPES = ("query", "head", "unpublished-block", "unpublished-all")

_LEVEL_BITS = 12
_LEVELS = 1 << _LEVEL_BITS
_HIGHEST = (1 << 2 * _LEVEL_BITS) - 1
# Scores that differ by less, relative to the largest, are equal up to rounding.
_SMALLEST_SPREAD = 1e-5
# The most pairs of a pool that is sorted; larger pools are counted in histograms.
_LONGEST_SORTED = 1024
# Copies of a histogram on a GPU: threads that add to different copies do not wait for each other.
_COPIES = 32
# Pairs of query and block to process at once, at some 40 bytes each, if pools are no larger. The
# numbers fit into the caches of a CPU, and keep a whole GPU busy.
_PAIRS_AT_ONCE = {"cpu": 1 << 18}
_PAIRS_AT_ONCE_ELSEWHERE = 1 << 24


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
                bits[sample, some, video] = _with_others(chosen, blocks)
    return bits


def choose(
    scores: torch.Tensor,
    own: torch.Tensor,
    *,
    ranked: torch.Tensor | None = None,
    tau: float | None = None,
    budget: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The best entries of each pool: the fewest that reach a share of the similarity, or a number.

    Args:
        scores: (pools, entries).
        own: bool (pools, entries): True for entries that are chosen in any case and count.
        ranked: bool (pools, entries): False for entries that do not count, and are chosen only if
            they are in `own`; None if all entries count.
        tau: the share to reach of the sum of similarities. The similarity of an entry goes from 0
            for the pool's lowest score to 1 for the highest. A pool of equal scores has no
            similarity, and nothing to reach.
        budget: the number of entries to reach if `tau` is None, the same in all pools.

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
    """The mean over the blocks with a counted token, (batch, 1, heads, head_dim)."""
    if counted is None:
        return means.mean(1, keepdim=True)
    # The mean of a block without counted tokens is 0.
    holding = _holds_any(blocks, counted).sum(1).clamp(min=1)
    return means.sum(1, keepdim=True) / holding[:, None, None, None]


def _holds_any(blocks: KeyBlocks, counted: torch.Tensor) -> torch.Tensor:
    """Whether any token of a block counts: bool (batch, video blocks)."""
    return blocks.means(counted[:, :, None, None].float())[:, :, 0, 0] > 0


def _ranked(
    blocks: KeyBlocks, deciders: KeyBlocks, counted: torch.Tensor, tile: int
) -> torch.Tensor:
    """Whether query and block both have a counted token: bool (queries, blocks) of one sample."""
    queries = counted if tile == 1 else _holds_any(deciders, counted[None])[0]
    return queries[:, None] & _holds_any(blocks, counted[None])


def _pairs_at_once(device: torch.device) -> int:
    return _PAIRS_AT_ONCE.get(device.type, _PAIRS_AT_ONCE_ELSEWHERE)


def _head_parts(heads: int, pairs: int, scope: str, device: torch.device) -> list[slice]:
    """The parts of the heads to process at once: by memory, or all heads if they share a pool."""
    step = heads
    if scope in ("query", "head"):
        step = min(heads, max(1, _pairs_at_once(device) // pairs))
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


def _fixed_point(scores: torch.Tensor, ranked: torch.Tensor | None) -> torch.Tensor:
    """Scores as int32 from 0, the lowest of a pool, to `_HIGHEST`, the highest.

    Unranked entries, and all entries of a pool of equal scores, are 0.
    """
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
    """The fewest candidates, best first, whose weights reach `need`; all if the sum is less."""
    entries = points.shape[1]
    # All numbers differ: of equal points the first gets the higher number.
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
    """The result of `_by_sorting`, by histograms of the upper and of the lower bits."""
    upper, lower = points >> _LEVEL_BITS, points & (_LEVELS - 1)
    high, need = _last_level(upper, weight, need)
    low, need = _last_level(lower, weight * (upper == high[:, None]), need)
    last = (high * _LEVELS + low)[:, None]
    # Candidates at the last level have equal points and weights: the first ones are taken, as many
    # as are still needed.
    tied = candidate & (points == last)
    each = (weight * tied).amax(1).clamp(min=1)
    wanted = (need + each - 1) // each
    return candidate & (points > last) | tied & (
        tied.cumsum(1, dtype=torch.int32) <= wanted[:, None]
    )


def _last_level(
    level: torch.Tensor, weight: torch.Tensor, need: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last level to take, counted from the top, and the weight that this level must still give.

    Args:
        level: int (pools, entries), from 0 to `_LEVELS` - 1.
        weight: int64 (pools, entries).
        need: int64 (pools,), the sum of weights to reach.

    Returns:
        The highest level such that all entries at or above the level reach `need`, int64 (pools,):
        -1 if the weights never reach `need`, `_LEVELS` if nothing is needed. The part of `need`
        that the levels above leave to this level, int64 (pools,).
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
