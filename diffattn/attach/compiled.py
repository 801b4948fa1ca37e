"""Attention as operators of torch that torch.compile does not trace into.

Building a layout cannot be traced, because the sizes of its lists depend on the values in the mask.
An operator of torch takes tensors and numbers, but no layout. So compiled code holds the sizes of
the grid and the serial number of a source. When the code runs, the operator looks up the source by
its number, and the source gives the layout of the grid.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch

from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.kernels.transforms import is_forward_mode
from diffattn.operator import attention, attention_gradients, choose_backend
from diffattn.orders import TileOrder

_serials = itertools.count()
_sources: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class LayoutSource(Protocol):
    """An object that knows the layout of a call, and the order of tokens to build the layout in."""

    def order(self, grid: TokenGrid) -> TileOrder | None: ...

    def layout(
        self, grid: TokenGrid, device: torch.device, order: TileOrder | None
    ) -> BlockLayout: ...


def remember(source: LayoutSource | MethodSource) -> int:
    """Enter `source` into the table of sources and return its serial number.

    The table does not keep the source alive.
    """
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
    order: TileOrder | None = None,
) -> torch.Tensor:
    """`attention` over the layout that the source of number `serial` has for `grid`.

    The backend is chosen when the call is traced, for the output and its gradients. Compiled code
    keeps to that backend.

    Args:
        query, key, value: (batch, tokens, heads, head_dim).
        grid: the tokens of the call, text included.
        serial: the source's number from `remember`.
        scale, key_mask: as for `attention`.
        order: the order that the tensors have their tokens in; the grid's own when None.

    Returns:
        (batch, tokens, heads, head_dim), in the order of `query`.

    Raises:
        NotImplementedError: within `torch.func.jvp` or `dual_level`.
    """
    _check_no_tangents()
    size = [grid.frames, grid.height, grid.width, grid.text_before, grid.text_after]
    if order is not None:
        size += order.tile
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    backend = choose_backend(query.device)
    out, _ = _forward(query, key, value, key_mask, size, serial, scale, backend)
    return out


class MethodSource(Protocol):
    """An object that attends by a method over the tokens of a grid, text included."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: TokenGrid,
        *,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor: ...


def traced_method(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    serial: int,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over `grid` by the method of the source of number `serial`.

    The method need not be traceable. The backward computes the attention once more. Arguments,
    result and errors are those of `traced_attention`.
    """
    _check_no_tangents()
    size = [grid.frames, grid.height, grid.width, grid.text_before, grid.text_after]
    return _attend(query, key, value, key_mask, size, serial, scale)


def _check_no_tangents() -> None:
    if is_forward_mode():
        raise NotImplementedError(
            "compiled attention has no forward-mode derivative (torch.func.jvp, dual_level); call"
            " torch.compile without fullgraph, so that attention is left out of what is compiled"
        )


@torch.library.custom_op("diffattn::method_attention", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    size: list[int],
    serial: int,
    scale: float | None,
) -> torch.Tensor:
    source: MethodSource = _sources[serial]
    out = source.attend(query, key, value, TokenGrid(*size), scale=scale, key_mask=key_mask)
    return out.contiguous()


@_attend.register_fake
def _(query: torch.Tensor, *rest: torch.Tensor | list[int] | float | None) -> torch.Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("diffattn::method_attention_backward", mutates_args=())
def _attend_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    size: list[int],
    serial: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Autograd is off inside an operator, as in inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
        source: MethodSource = _sources[serial]
        out = source.attend(query, key, value, TokenGrid(*size), scale=scale, key_mask=key_mask)
        dq, dk, dv = torch.autograd.grad(out, (query, key, value), grad_out)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attend_backward.register_fake
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


def _setup_attend(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, key_mask, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, key_mask)


def _attend_autograd(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = _attend_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None)


_attend.register_autograd(_attend_autograd, setup_context=_setup_attend)


def _layout(
    size: list[int], serial: int, device: torch.device
) -> tuple[BlockLayout, TileOrder | None]:
    """The layout of a call, and the order into which the tokens have yet to be put.

    Args:
        size: the five sizes of the grid, and the three of the tile if the tokens come in tiles.
    """
    source, grid, tile = _sources[serial], TokenGrid(*size[:5]), size[5:]
    order = TileOrder(grid, (tile[0], tile[1], tile[2])) if tile else source.order(grid)
    return source.layout(grid, device, order), None if tile else order


@torch.library.custom_op("diffattn::static_mask_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    size: list[int],
    serial: int,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout, order = _layout(size, serial, query.device)
    return attention(
        query,
        key,
        value,
        layout,
        order=order,
        scale=scale,
        key_mask=key_mask,
        return_lse=True,
        backend=backend,
    )


@_forward.register_fake
def _(
    query: torch.Tensor, *rest: torch.Tensor | list[int] | float | str | None
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layout, order = _layout(size, serial, query.device)
    return attention_gradients(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        layout,
        order=order,
        scale=scale,
        key_mask=key_mask,
        backend=backend,
    )


@_backward.register_fake
def _(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: torch.Tensor | list[int] | float | str | None,
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
    # Traced code never uses the log-sum-exp: only the output has a gradient.
    grads = _backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
