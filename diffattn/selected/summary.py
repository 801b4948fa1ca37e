"""Attention that sees some key blocks token by token, and others by one summary key each.

Sol-Attn (arXiv 2607.24027) puts the keys of the blocks that a query block has selected, and one
mean key and value for each other block, in the same softmax. Skipped blocks so keep their weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.blocks import BlockLayout, pack_bits
from diffattn.interception import through_modes
from diffattn.kernels.autocast import autocast_off, cast_as_sdpa
from diffattn.kernels.summary import summary_attention
from diffattn.operator import (
    attention,
    check_inputs,
    check_triton,
    choose_backend,
    layout_of,
    merged,
)
from diffattn.selected.key_blocks import KeyBlocks


@dataclass(frozen=True, eq=False)
class Summary:
    """Keys that each stand for several keys.

    Attributes:
        key, value: (batch, summaries, heads, head_dim), in the dtype of the queries or float32.
        bias: float32 (batch | 1, heads | 1, summaries), added to the scores: the logarithm of the
            number of keys that the summary stands for; -inf where there is none.
        hidden: int32 (batch | 1, heads | 1, query blocks, ceil(summaries / 32)): bit `c % 32` of
            word `c // 32` hides summary c from the queries of a block.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def of_blocks(
        cls,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: KeyBlocks,
        hidden: torch.Tensor,
        *,
        key_mask: torch.Tensor | None = None,
        means: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Summary:
        """The mean key and value of each block; differentiable in key and value.

        Args:
            key, value: (batch, tokens, heads, head_dim), in the order of the blocks.
            blocks: the blocks, without text of their own.
            hidden: bool (batch | 1, heads | 1, query blocks, blocks), as `chosen` pairs are.
            key_mask: bool (batch, tokens): False for keys that count in no mean.
            means: the means of key and value, if the caller has them.
        """
        if key_mask is None:
            bias = blocks.logarithms
        else:
            counts = blocks.means(key_mask[:, :, None, None].float())[:, :, 0, 0] * blocks.sizes
            bias = counts.round().log()[:, None]
        if means is None:
            means = blocks.means(key, key_mask), blocks.means(value, key_mask)
        return cls(*means, bias, pack_bits(hidden))


def summarised_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    summary: Summary,
    *,
    query_means: torch.Tensor | None = None,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the blocks of a layout and over summary keys, in one softmax; differentiable.

    Gradients reach query, key and value, and the keys, values and biases of the summary. A query
    that sees no key and no summary gives 0.

    With `query_means` all queries of a block see the summaries with the scores of their block's
    mean, as in comfy-kitchen's form of Sol-Attn. That costs next to nothing, and is further from
    dense attention. The mean of all summary keys is subtracted from the scores of both parts: what
    all keys have in common then weighs alike in scores of a query and of its block.

    Args:
        query, key, value: (batch, tokens, heads, head_dim).
        layout: the blocks that are seen token by token.
        summary: the summaries; `hidden` has a row for each query block of the layout.
        query_means: the mean query of each query block, float32 (batch, query blocks, heads,
            head_dim), for summaries that a block sees as a whole; None for summaries that each
            query sees by itself.
        scale: factor of the scores; 1 / sqrt(head_dim) when None.
        key_mask: bool (batch, tokens): False for keys of the layout that are padding.
        return_lse: also return the natural log-sum-exp of the scores, (batch, heads, tokens).
        backend: as for `attention`. On "triton" the pass over the summaries continues the softmax
            of the pass over the blocks. On other backends the summaries run in torch's matrix
            products, and two attentions are merged by their log-sum-exp.

    Returns:
        (batch, tokens, heads, head_dim) in the dtype of `query`, or of the autocast region; with
        `return_lse` also the log-sum-exp.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
        NotImplementedError: if the tensors' device has no sparse kernel, and in forward mode.
    """
    query, key, value = cast_as_sdpa(query, key, value)
    check_inputs(query, key, value, key_mask)
    layout = layout_of(layout, query, key)
    name = choose_backend(query.device, backend)

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast_off(query.device.type):
            if query_means is None and name == "triton":
                return _jointly(query, key, value, layout, summary, scale, key_mask)
            out, lse = attention(
                query,
                key,
                value,
                layout,
                key_mask=key_mask,
                scale=scale,
                return_lse=True,
                backend=name,
            )
            if query_means is not None:
                return _with_summaries_of_blocks(
                    out, lse, query, query_means, summary, layout.block_q, scale
                )
            more = summary_attention(
                query,
                summary.key,
                summary.value,
                summary.bias,
                summary.hidden,
                block_q=layout.block_q,
                scale=scale,
            )
            return merged(out, lse, *more)

    if return_lse:
        return attend(query, key, value)
    return through_modes(lambda q, k, v: attend(q, k, v)[0], query, key, value)


def _jointly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    summary: Summary,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by kernels that keep no result of one part alone."""
    check_triton()
    from diffattn.kernels.summary.joint import joint_attention

    return joint_attention(
        query,
        key,
        value,
        layout.tensors,
        summary.key,
        summary.value,
        summary.bias,
        summary.hidden,
        block_q=layout.block_q,
        block_kv=layout.block_kv,
        scale=scale,
        key_mask=key_mask,
    )


def _with_summaries_of_blocks(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    query_means: torch.Tensor,
    summary: Summary,
    block_q: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add summaries, by the scores of the query blocks' means, to an attention."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    exists = (summary.bias > -torch.inf).transpose(1, 2)[..., None]
    key = summary.key.masked_fill(~exists, 0)
    centre = key.sum(1, keepdim=True) / exists.sum(1, keepdim=True).clamp(min=1)
    # Each query block is one query here: few enough for matrix products on every device.
    of_blocks, lse_of_blocks = summary_attention(
        query_means,
        key - centre,
        summary.value.to(query_means.dtype),
        summary.bias,
        summary.hidden,
        block_q=1,
        scale=factor,
    )
    tokens = query.shape[1]
    more = _for_queries(of_blocks.to(out.dtype), block_q, tokens)
    lse_of_more = _for_queries(lse_of_blocks.transpose(1, 2), block_q, tokens).transpose(1, 2)
    common = query.to(centre.dtype).transpose(1, 2) @ centre.permute(0, 2, 3, 1)
    common = common[..., 0] * factor  # (batch, heads, tokens)
    out, lse = merged(out, lse - common, more, lse_of_more)
    return out, lse + common


def _for_queries(x: torch.Tensor, block_q: int, tokens: int) -> torch.Tensor:
    """Give each query what its block has: (batch, blocks, ...) to (batch, tokens, ...)."""
    # An expansion: the gradients of a gather would be added in no fixed order on a GPU.
    each = x[:, :, None].expand(-1, -1, block_q, *x.shape[2:])
    return each.flatten(1, 2)[:, :tokens]
