"""The best pairs of queries and blocks where the scores of several rows are ranked together."""

from __future__ import annotations

import torch

from diffattn.routing.choosing import choose

# The pools of one sample: the blocks of a query, or all pairs of query and block of a head. Two
# more are in the public code of VMoBA and not in the paper: all pairs of a block over all heads,
# and all pairs of all heads.
SCOPES = ("query", "head", "unpublished-block", "unpublished-all")


@torch.no_grad()
def best_in_pools(
    scores: torch.Tensor,
    own: torch.Tensor,
    *,
    scope: str,
    ranked: torch.Tensor | None = None,
    topk: int | None = None,
    tau: float | None = None,
) -> torch.Tensor:
    """The best pairs of each pool: a number of blocks per query, or a share of the similarity.

    Args:
        scores: (heads, queries, blocks), of some heads of a sample. All heads, if they share pools.
        own: bool (queries, blocks), the pairs that are chosen in any case and count.
        scope: the scores that are ranked together, one of `SCOPES`.
        ranked: bool (queries, blocks): the pairs that count; None if all count.
        topk: blocks per query, its own included, on average over the pool. No "unpublished-block".
        tau: if `topk` is None, the share to reach of the pool's similarity, see `choose`.

    Returns:
        bool (heads, queries, blocks).
    """
    heads, queries, count = scores.shape

    def pools(x: torch.Tensor) -> torch.Tensor:
        x = x.expand(heads, queries, count)
        if scope == "query":
            return x.reshape(heads * queries, count)
        if scope == "head":
            return x.reshape(heads, queries * count)
        if scope == "unpublished-all":
            return x.reshape(1, -1)
        return x.permute(2, 0, 1).reshape(count, heads * queries)

    budget: int | torch.Tensor | None = None
    if topk is not None:
        budget = min(topk, count)
        if scope != "query":
            budget = budget * (queries if ranked is None else ranked.any(1).sum())
        if scope == "unpublished-all":
            budget = budget * heads
    chosen = choose(
        pools(scores),
        pools(own),
        ranked=None if ranked is None else pools(ranked),
        tau=tau if topk is None else None,
        budget=budget,
    )
    if scope == "unpublished-block":
        return chosen.view(count, heads, queries).permute(1, 2, 0)
    return chosen.view(heads, queries, count)
