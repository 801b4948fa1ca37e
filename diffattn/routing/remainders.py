"""Attention of query blocks to the key blocks that they have chosen, and to what remains."""

from __future__ import annotations

import torch

from diffattn.operator import attention
from diffattn.routing.lists import layout_of_blocks
from diffattn.selected.key_blocks import KeyBlocks
from diffattn.selected.summary import Summary, summarised_attention

# What query blocks see of the key blocks that they have not chosen.
REMAINDERS = ("drop", "summary", "block-summary")


def attention_of_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: KeyBlocks,
    chosen: torch.Tensor,
    *,
    remainder: str = "drop",
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of query blocks to the key blocks that they have chosen; differentiable.

    Args:
        query, key, value: (batch, tokens, heads, head_dim), in the order of the blocks.
        blocks: the blocks of queries and of keys, without text of their own. All have as many
            tokens as the first; only the last may have fewer.
        chosen: bool (batch, heads, blocks, blocks), query blocks by key blocks.
        remainder: "drop" to leave out the other blocks, "summary" for one key of each, its mean,
            that each query sees by itself, or "block-summary" for the same by the scores of the
            mean query.
        scale: factor of the scores; 1 / sqrt(head_dim) when None.
        key_mask: bool (batch, tokens): False for padding, which is seen by no query and counts in
            no mean.
        means: the means of the blocks of query, key and value, if the caller has them.

    Returns:
        (batch, tokens, heads, head_dim).

    Raises:
        ValueError: if blocks are of other lengths, `chosen` does not fit, or the remainder is
            unknown.
    """
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder is {remainder!r}, but must be one of {', '.join(REMAINDERS)}")
    block, tokens = blocks.lengths[0], query.shape[1]
    layout = layout_of_blocks(
        chosen, tokens_q=tokens, tokens_kv=tokens, block_q=block, block_kv=block
    )
    if remainder == "drop":
        return attention(query, key, value, layout, scale=scale, key_mask=key_mask)
    if means is None:
        of_queries = blocks.means(query, key_mask) if remainder == "block-summary" else None
        summary = Summary.of_blocks(key, value, blocks, chosen, key_mask=key_mask)
    else:
        of_queries = means[0] if remainder == "block-summary" else None
        summary = Summary.of_blocks(key, value, blocks, chosen, key_mask=key_mask, means=means[1:])
    out = summarised_attention(
        query,
        key,
        value,
        layout,
        summary,
        query_means=of_queries,
        scale=scale,
        key_mask=key_mask,
    )
    assert isinstance(out, torch.Tensor)
    return out
