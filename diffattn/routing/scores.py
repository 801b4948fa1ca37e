"""Scores of pairs of a query block and a key block, from pooled queries and keys."""

from __future__ import annotations

import torch

from diffattn.selected.by_kernels import selection_kernels
from diffattn.selected.key_blocks import KeyBlocks

# Scores of parts that are in memory at a time.
_SCORES_AT_ONCE = 1 << 24


@torch.no_grad()
def mean_scores(
    query_means: torch.Tensor, key_means: torch.Tensor, scale: float = 1
) -> torch.Tensor:
    """The product of a query block's mean and a key block's mean.

    By linearity this is the mean score of the block's queries on the mean key.

    Args:
        query_means: (batch, query blocks, heads, head_dim), as of `KeyBlocks.means`; or queries
            themselves, which are blocks of one query.
        key_means: (batch, key blocks, heads, head_dim).
        scale: factor of the products.

    Returns:
        (batch, heads, query blocks, key blocks), without a gradient.
    """
    scores = query_means.transpose(1, 2) @ key_means.permute(0, 2, 3, 1)
    return scores if scale == 1 else scores.mul_(scale)


@torch.no_grad()
def part_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    query_blocks: KeyBlocks,
    key_blocks: KeyBlocks,
    *,
    part_q: int,
    part_kv: int,
    scale: float,
    counted_queries: torch.Tensor | None = None,
    counted_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logarithm of a block pair's softmax mass, estimated from means of parts (SubBlock).

    Blocks are cut into parts of at most `part_q` queries and `part_kv` keys. The score is the
    log-sum-exp over all pairs of parts. A short part counts as a whole part. With parts of a block
    each, the ranking is that of `mean_scores`; with parts of one token, the mass is exact.

    Args:
        query, key: (batch, tokens, heads, head_dim), in the order of the blocks.
        query_blocks, key_blocks: the blocks; neither has text of its own.
        part_q, part_kv: tokens per part.
        scale: factor of the scores.
        counted_queries, counted_keys: bool (batch, tokens): False for tokens that are left out. A
            part without a counted token is left out.

    Returns:
        (batch, heads, query blocks, key blocks), without a gradient; -inf for a block without a
        counted token.
    """
    of_query, has_query = _parts(query, query_blocks, part_q, counted_queries)
    of_key, has_key = _parts(key, key_blocks, part_kv, counted_keys)
    kernels = selection_kernels(of_query)
    if kernels is not None:
        scores: torch.Tensor = kernels.scores_of_parts(
            of_query, of_key, has_query, has_key, scale, query.dtype
        )
        return scores
    batch, rows, parts, heads, _ = of_query.shape
    columns = of_key.shape[1]
    keys = of_key.flatten(1, 2).permute(0, 2, 3, 1)  # (batch, heads, head_dim, columns * parts)
    out = query.new_empty((batch, heads, rows, columns), dtype=of_query.dtype)
    step = max(1, _SCORES_AT_ONCE // (batch * heads * parts * keys.shape[-1]))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        queries = of_query[:, some].flatten(1, 2).transpose(1, 2)
        pairs = (queries @ keys * scale).unflatten(2, (-1, parts)).unflatten(-1, (columns, -1))
        # (batch, heads, rows, parts, columns, parts)
        pairs = pairs.masked_fill(~has_query[:, None, some, :, None, None], -torch.inf)
        pairs = pairs.masked_fill(~has_key[:, None, None, None], -torch.inf)
        out[:, :, some] = pairs.transpose(3, 4).flatten(4).logsumexp(-1)
    return out


def _parts(
    x: torch.Tensor, blocks: KeyBlocks, size: int, counted: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of parts, (batch, blocks, parts, heads, head_dim), and whether each part exists."""
    if (kernels := selection_kernels(x)) is not None:
        starts, exists = blocks.parts(size)
        shape = len(blocks.lengths), exists.shape[2]
        _, means = kernels.pooled(x, starts, size, counted=counted)
        if counted is None:
            exists = exists.expand(x.shape[0], -1, -1)
        else:
            _, shares = kernels.pooled(counted[:, :, None, None].float(), starts, size)
            exists = (shares[:, :, 0, 0] > 0).unflatten(1, shape)
        return means.unflatten(1, shape), exists
    cut = blocks.cut(size)
    means = cut.means(x, counted)
    exists = torch.ones(x.shape[0], len(cut.lengths), dtype=torch.bool, device=x.device)
    if counted is not None:
        exists = cut.holds_any(counted)
    # The number of each part's block, and its place among the block's parts. All of it is worked
    # out on the device: a list copied there would wait for all work before.
    longest = -(-max(blocks.lengths) // size)
    parts = (blocks.sizes + size - 1) // size
    own = blocks.block_of[cut.members[:, 0]]
    place = torch.arange(len(cut.lengths), device=x.device) - (parts.cumsum(0) - parts)[own]
    index = own * longest + place
    filled = means.new_zeros(means.shape[0], len(blocks.lengths) * longest, *means.shape[2:])
    filled[:, index] = means
    there = torch.zeros(exists.shape[0], filled.shape[1], dtype=torch.bool, device=x.device)
    there[:, index] = exists
    return filled.unflatten(1, (-1, longest)), there.unflatten(1, (-1, longest))
