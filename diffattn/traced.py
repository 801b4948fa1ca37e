"""Attention under a static mask as one operator that torch.compile does not look into.

Which blocks a mask visits depends on the mask, so the building of a layout cannot be traced. Code
being compiled names the source and the grid instead, and the layout is looked up when it runs.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch

from diffattn.attention import attention, attention_gradients
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid

_serials = itertools.count()
_sources: weakref.WeakValueDictionary[int, LayoutSource] = weakref.WeakValueDictionary()


class LayoutSource(Protocol):
    """Whoever knows the layout of a call."""

    def layout(self, grid: TokenGrid, device: torch.device) -> BlockLayout: ...


def remember(source: LayoutSource) -> int:
    """Give `source` a number by which it is found, for as long as it lives."""
    serial = next(_serials)
    _sources[serial] = source
    return serial


def traced_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    serial: int,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention` over the layout that source number `serial` has for `grid`.

    Args:
        query, key, value: (batch, tokens, heads, head_dim).
        grid: the tokens of the call.
        serial: what `remember` gave.
        scale, key_mask: as for `attention`.
    """
    size = [grid.frames, grid.height, grid.width, grid.text_before, grid.text_after]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, _ = _forward(query, key, value, key_mask, size, serial, scale)
    return out


def _layout(size: list[int], serial: int, device: torch.device) -> BlockLayout:
    return _sources[serial].layout(TokenGrid(*size), device)


@torch.library.custom_op("diffattn::static_mask_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    size: list[int],
    serial: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = _layout(size, serial, query.device)
    out, lse = attention(query, key, value, layout, scale=scale, key_mask=key_mask, return_lse=True)
    return out, lse


@_forward.register_fake
def _(
    query: torch.Tensor, *rest: torch.Tensor | list[int] | float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=dtype)


@torch.library.custom_op("diffattn::static_mask_attention_backward", mutates_args=())
def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_mask: torch.Tensor | None,
    size: list[int],
    serial: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = _layout(size, serial, query.device)
    return attention_gradients(
        grad_out, query, key, value, out, lse, layout, scale=scale, key_mask=key_mask
    )


@_backward.register_fake
def _(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: torch.Tensor | list[int] | float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, key_mask, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output, key_mask)


def _autograd(
    ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    # Nothing that is traced uses the lse: only the output has a gradient.
    grads = _backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
