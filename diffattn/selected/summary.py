"""Attention that sees some key blocks token by token, and others by one summary key each.

Sol-Attn (arXiv 2607.24027) puts the keys of the blocks that a query block has selected, and one
mean key and value for each other block, in the same softmax. Skipped blocks so keep their weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from diffattn.blocks import BlockLayout, pack_bits
from diffattn.interception import through_modes
from diffattn.kernels.autocast import autocast_off, cast_as_sdpa
from diffattn.kernels.summary import summary_attention
from diffattn.operator import attention, choose_backend
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
    ) -> Summary:
        """The mean key and value of each block; differentiable in key and value.

        Args:
            key, value: (batch, tokens, heads, head_dim), in the order of the blocks.
            blocks: the blocks, without text of their own.
            hidden: bool (batch | 1, heads | 1, query blocks, blocks), as `chosen` pairs are.
            key_mask: bool (batch, tokens): False for keys that count in no mean.
        """
        if key_mask is None:
            counts = blocks.sizes.float()[None]
        else:
            counts = blocks.means(key_mask[:, :, None, None].float())[:, :, 0, 0] * blocks.sizes
        return cls(
            blocks.means(key, key_mask),
            blocks.means(value, key_mask),
            counts.round().log()[:, None],
            pack_bits(hidden),
        )


def summarised_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    summary: Summary,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the blocks of a layout and over summary keys, in one softmax; differentiable.

    Gradients reach query, key and value, and the keys, values and biases of the summary. Two
    attentions are merged by their log-sum-exp. A query that sees no key and no summary gives 0.

    Args:
        query, key, value: (batch, tokens, heads, head_dim).
        layout: the blocks that are seen token by token.
        summary: the summaries; `hidden` has a row for each query block of the layout.
        scale: factor of the scores; 1 / sqrt(head_dim) when None.
        key_mask: bool (batch, tokens): False for keys of the layout that are padding.
        return_lse: also return the natural log-sum-exp of the scores, (batch, heads, tokens).
        backend: as for `attention`. The summaries run in Triton on "triton", and in torch's matrix
            products on all other backends.

    Returns:
        (batch, tokens, heads, head_dim) in the dtype of `query`, or of the autocast region; with
        `return_lse` also the log-sum-exp.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
        NotImplementedError: if the tensors' device has no sparse kernel, and in forward mode.
    """
    query, key, value = cast_as_sdpa(query, key, value)
    attend = partial(
        _merged, layout=layout, summary=summary, scale=scale, key_mask=key_mask, backend=backend
    )
    if return_lse:
        return attend(query, key, value)
    return through_modes(lambda q, k, v: attend(q, k, v)[0], query, key, value)


def _merged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: BlockLayout,
    summary: Summary,
    scale: float | None,
    key_mask: torch.Tensor | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp over the blocks of a layout and the summaries."""
    exact, lse_exact = attention(
        query, key, value, layout, key_mask=key_mask, scale=scale, return_lse=True, backend=backend
    )
    with autocast_off(query.device.type):
        pooled, lse_pooled = summary_attention(
            query,
            summary.key,
            summary.value,
            summary.bias,
            summary.hidden,
            block_q=layout.block_q,
            scale=scale,
            backend="triton" if _in_triton(query, layout, backend) else "torch",
        )
        # Where neither sees a key, infinities would make NaN of values and gradients.
        neither = (lse_exact == -torch.inf) & (lse_pooled == -torch.inf)
        lse_exact, lse_pooled = (x.masked_fill(neither, 0) for x in (lse_exact, lse_pooled))
        share = (lse_pooled - lse_exact).sigmoid().transpose(1, 2)[..., None]
        out = torch.lerp(exact, pooled, share.to(exact.dtype))
        return out, torch.logaddexp(lse_exact, lse_pooled).masked_fill(neither, -torch.inf)


def _in_triton(query: torch.Tensor, layout: BlockLayout, backend: str | None) -> bool:
    name = choose_backend(query.device, backend)
    return name == "triton" and query.dtype != torch.float64 and layout.block_q % 16 == 0
