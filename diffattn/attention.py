"""attention(): the one differentiable operator, and the only caller of the kernels."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Literal, overload

import torch
import torch.nn.functional as F

from diffattn.blocks import BlockLayout
from diffattn.kernels import cpu as cpu_kernel
from diffattn.kernels.reference import reference_attention
from diffattn.mask import AttentionMask

logger = logging.getLogger(__name__)

# (query, key, value, layout, scale, key_mask) -> (output, log-sum-exp), differentiable
Backend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, BlockLayout, float | None, torch.Tensor | None],
    tuple[torch.Tensor, torch.Tensor],
]

BACKEND_VARIABLE = "DIFFATTN_BACKEND"


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask | BlockLayout | None = None,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask | BlockLayout | None = None,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask | BlockLayout | None = None,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the token pairs of a mask, computing only the blocks it visits.

    Differentiable in query, key and value. Only `mask` (and `key_mask`) hide anything: a query that
    sees no key gives 0 and a log-sum-exp of -inf.

    Args:
        query, key, value: (batch, tokens, heads, head_dim), any strides, of one dtype and device.
        mask: an `AttentionMask` (computed in blocks of 128), or a `BlockLayout` built with another
            block size; None is dense attention.
        key_mask: bool (batch, tokens): False hides a key from every query, as padding does.
        scale: factor of the scores; 1 / sqrt(head_dim) when None.
        return_lse: also return the natural log-sum-exp of the scores, float32
            (batch, heads, tokens), which merges two attentions over disjoint keys.
        backend: "cpu" or "reference" (dense float64, for checks); by default the environment
            variable DIFFATTN_BACKEND, or else the one for the tensors' device.

    Returns:
        (batch, tokens, heads, head_dim) in the dtype of `query`; with `return_lse` also the lse.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together or the mask, or the backend is
            unknown.
        NotImplementedError: if there is no sparse kernel for the tensors' device.
    """
    _check_inputs(query, key, value, key_mask)
    if mask is None and not return_lse:
        return _dense_attention(query, key, value, key_mask, scale)
    name = backend or os.environ.get(BACKEND_VARIABLE) or _default_backend(query.device)
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    layout = _layout_of(mask, query, key)
    out, lse = BACKENDS[name](query, key, value, layout, scale, key_mask)
    return (out, lse) if return_lse else out


def attention_gradients(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention` with respect to query, key and value, for those without autograd.

    Args:
        grad_out: gradient of the output, (batch, tokens, heads, head_dim).
        query, key, value, layout, scale, key_mask: what `attention` was given.
        out, lse: what it returned.
    """
    if query.device.type != "cpu":
        raise _no_kernel_for(query.device)
    return cpu_kernel.block_sparse_attention_gradients(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        *layout.tensors,
        block_q=layout.block_q,
        block_kv=layout.block_kv,
        scale=scale,
        key_mask=key_mask,
    )


def _cpu_backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return cpu_kernel.block_sparse_attention(
        query,
        key,
        value,
        *layout.tensors,
        block_q=layout.block_q,
        block_kv=layout.block_kv,
        scale=scale,
        key_mask=key_mask,
    )


def _reference_backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = reference_attention(
        query, key, value, layout.dense(), scale=scale, key_mask=key_mask
    )
    return out.to(query.dtype), lse.float()


BACKENDS: dict[str, Backend] = {"cpu": _cpu_backend, "reference": _reference_backend}


def _default_backend(device: torch.device) -> str:
    if device.type != "cpu":
        raise _no_kernel_for(device)
    return "cpu"


def _no_kernel_for(device: torch.device) -> NotImplementedError:
    return NotImplementedError(
        f"this version of diffattn has a sparse kernel for the CPU only, and the tensors are on"
        f" {device}; move the pipeline to the CPU, or pass backend='reference' to check results"
    )


def _dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if key_mask is None else key_mask[:, None, None, :],
        scale=scale,
    )
    return out.transpose(1, 2)


def _layout_of(
    mask: AttentionMask | BlockLayout | None, query: torch.Tensor, key: torch.Tensor
) -> BlockLayout:
    if isinstance(mask, BlockLayout):
        layout = mask
    elif isinstance(mask, AttentionMask):
        layout = mask.blocks(device=query.device)
    elif mask is None:
        raise ValueError("return_lse needs a mask: pass a FullMask for dense attention")
    else:
        raise ValueError(
            f"mask is a {type(mask).__name__}, but must be an AttentionMask or a BlockLayout"
        )
    if (layout.tokens_q, layout.tokens_kv) != (query.shape[1], key.shape[1]):
        raise ValueError(
            f"the mask is over {layout.tokens_q} x {layout.tokens_kv} tokens, but query and key"
            f" have {query.shape[1]} and {key.shape[1]}; build it for this grid"
        )
    if layout.device != query.device:
        raise ValueError(
            f"the mask's blocks are on {layout.device} and the query on {query.device};"
            f" call .to({str(query.device)!r}) on the layout"
        )
    return layout


def _check_inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but must be"
                f" (batch, tokens, heads, head_dim)"
            )
    if key.shape != value.shape or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do"
            f" not fit: batch and heads must be equal, key and value of one shape"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"head_dim is {query.shape[3]} in query and {key.shape[3]} in key")
    if key_mask is not None and (
        key_mask.dtype != torch.bool or tuple(key_mask.shape) != (key.shape[0], key.shape[1])
    ):
        raise ValueError(
            f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}, but must be bool"
            f" {(key.shape[0], key.shape[1])}: (batch, tokens)"
        )
