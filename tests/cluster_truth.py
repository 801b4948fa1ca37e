"""SVG2's definition in float64: which pairs of tokens its clusters compute, and the output."""

from __future__ import annotations

from typing import Any

import torch

from diffattn.methods.svg2 import ClusterPairs

# Clusters for grids of some hundred tokens.
SMALL: dict[str, Any] = {
    "query_cluster": 20, "key_cluster": 8, "query_block": 16, "block": 16, "top_p": 0.5,
}  # fmt: skip


def seen_pairs(pairs: ClusterPairs) -> torch.Tensor:
    """The pairs of tokens that are computed: bool (batch, heads, tokens, tokens)."""
    batch, heads, tokens = pairs.query_labels.shape
    out = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            chosen = torch.nn.functional.pad(pairs.chosen[b, h], (0, 1))
            out[b, h] = chosen[pairs.query_labels[b, h]][:, pairs.key_labels[b, h]]
    return out


def truth(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: ClusterPairs, summarise: bool
) -> torch.Tensor:
    """Float64 attention: exact over the pairs, each other key replaced by its cluster's mean.

    As many copies of a mean as the cluster has keys weigh as much as one key with the logarithm of
    their number added to its score.
    """
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    seen = seen_pairs(pairs)
    clusters = pairs.chosen.shape[3]
    there = pairs.key_labels < clusters
    shares = torch.nn.functional.one_hot(pairs.key_labels, clusters + 1)[..., :clusters].double()
    shares = shares / shares.sum(2, keepdim=True).clamp(min=1)
    label = pairs.key_labels.clamp(max=clusters - 1)[..., None].expand_as(k)
    k_mean, v_mean = ((shares.mT @ x).gather(2, label) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    pooled = q @ k_mean.mT * scale if summarise else torch.full(seen.shape, -torch.inf).double()
    scores = torch.where(seen, q @ k.mT * scale, pooled).masked_fill(~there[:, :, None], -torch.inf)
    weights = scores.softmax(-1)
    out = weights.masked_fill(~seen, 0) @ v + weights.masked_fill(seen, 0) @ v_mean
    return out.transpose(1, 2)
