"""Attention as operators of torch that torch.compile does not trace into.

Building a layout cannot be traced, because the sizes of its lists depend on the values in the mask.
An operator of torch takes tensors and numbers, but no layout. So compiled code holds the serial
number of a source. When the code runs, the operator looks up the source by its number, and the
source knows the grid of the running call and the layout of the grid. Compiled code that holds no
grid serves all sizes.

Each operator also returns the sizes that it has used, and the denoising step. The operators of its
gradients take them from there: autograd runs these in threads of its own, where there is no running
call, and perhaps after the next step has begun.

Tensors of two grids may have equal shapes. A CUDA graph of an operator would repeat the grid that
it was captured with, so the operators are kept out of CUDA graphs.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from diffattn.attach.running_call import running_call
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.kernels.autocast import cast_as_sdpa
from diffattn.kernels.transforms import is_forward_mode
from diffattn.methods.base import Site
from diffattn.models.token_flow import in_order
from diffattn.operator import attention, attention_gradients, choose_backend
from diffattn.orders import TileOrder
from diffattn.schedule import Moment

_serials = itertools.count()
_sources: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


# The grid of a call as numbers: five sizes, three of the tile that the tokens come in, and the
# place in `_with_references` of a grid that these eight do not describe.
_SIZES = 9
# The grid, and the position of the call in its denoising run: step and length.
_NUMBERS = _SIZES + 2


@dataclass(frozen=True)
class _Described:
    """A grid, and the order that its tokens come in."""

    grid: TokenGrid
    order: TileOrder | None


# Grids with references, and orders with others beside them, by numbers from 1. There are as many as
# sizes of calls in the life of the process.
_with_references: dict[_Described, int] = {}
_by_number: dict[int, _Described] = {}
_numbering = threading.Lock()

_KEPT_OUT_OF_GRAPHS = (torch.Tag.cudagraph_unsafe,)


class LayoutSource(Protocol):
    """An object that knows the layout of a call, and the order of tokens to build the layout in."""

    def order(self, grid: TokenGrid) -> TileOrder | None: ...

    def layout(
        self, grid: TokenGrid, device: torch.device, order: TileOrder | None
    ) -> BlockLayout: ...

    def score_scale(self, grid: TokenGrid, head_dim: int, scale: float | None) -> float | None: ...


class Running(Protocol):
    """A source that knows the grid of the running call and the order of its tokens."""

    def site(self, tokens: int) -> Site: ...


@runtime_checkable
class SourceOfSteps(Protocol):
    """A source whose method may differ from step to step of a denoising run."""

    @property
    def moment(self) -> Moment:
        """The position of the running call."""

    def at(self, moment: Moment) -> Any:
        """The `LayoutSource` and `MethodSource` of one step."""


def remember(source: object) -> int:
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
    grid: TokenGrid | None,
    serial: int,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    order: TileOrder | None = None,
) -> torch.Tensor:
    """`attention` over the layout that the source of number `serial` has for a grid.

    The backend is chosen when the call is traced, for the output and its gradients. Compiled code
    keeps to that backend.

    Args:
        query, key, value: (batch, tokens, heads, head_dim).
        grid: the tokens of the call, text included; None for those of the running call, of which
            the source must be a `Running`.
        serial: the source's number from `remember`.
        scale, key_mask: as for `attention`; the source may change the scale.
        order: the order that the tensors have their tokens in; the grid's own when None. The
            running call has an order of its own.

    Returns:
        (batch, tokens, heads, head_dim), in the order of `query`.

    Raises:
        NotImplementedError: within `torch.func.jvp` or `dual_level`.
    """
    _check_no_tangents()
    query, key, value = cast_as_sdpa(query, key, value)
    size = [] if grid is None else _sizes(grid, order)
    backend = choose_backend(query.device)
    return _forward(query, key, value, key_mask, size, serial, scale, backend)[0]


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
        place: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


def traced_method(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid | None,
    serial: int,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    place: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over a grid by the method of the source of number `serial`.

    The method need not be traceable. The backward computes the attention once more. `place` is as
    in `Call`, and None where there is a backward, which remembers nothing. Other arguments, result
    and errors are those of `traced_attention`.
    """
    _check_no_tangents()
    query, key, value = cast_as_sdpa(query, key, value)
    size = [] if grid is None else _sizes(grid, None)
    return _attend(query, key, value, key_mask, size, serial, scale, place)[0]


def _check_no_tangents() -> None:
    if is_forward_mode():
        raise NotImplementedError(
            "compiled attention has no forward-mode derivative (torch.func.jvp, dual_level); call"
            " torch.compile without fullgraph, so that attention is left out of what is compiled"
        )


def _sizes(grid: TokenGrid, order: TileOrder | None) -> list[int]:
    tile = (0, 0, 0) if order is None else order.tile
    number = 0
    if grid.references or grid.causal_frames or (order is not None and order.beside):
        described = _Described(grid, order)
        with _numbering:
            number = _with_references.setdefault(described, len(_with_references) + 1)
            _by_number[number] = described
    return [grid.frames, grid.height, grid.width, grid.text_before, grid.text_after, *tile, number]


def _used(size: list[int], serial: int, tokens: int) -> torch.Tensor:
    """The numbers of a call of `tokens` tokens, int64 (11,); the running call's without `size`."""
    source = _sources[serial]
    if not size:
        running: Running = source
        site = running.site(tokens)
        size = _sizes(site.grid, site.order)
    moment = source.moment if isinstance(source, SourceOfSteps) else Moment()
    return torch.tensor([*size, *[0] * (_SIZES - len(size)), *moment])


def _source(serial: int, used: torch.Tensor) -> Any:
    """The source of number `serial`, in the step of a call."""
    source = _sources[serial]
    if isinstance(source, SourceOfSteps):
        return source.at(Moment(*used[_SIZES:].tolist()))
    return source


def _grid_and_order(used: torch.Tensor) -> tuple[TokenGrid, TileOrder | None]:
    """The grid of a call, and the order that its tensors have their tokens in."""
    *sizes, depth, height, width, number = used[:_SIZES].tolist()
    if number:
        described = _by_number[number]
        return described.grid, described.order
    grid = TokenGrid(*sizes)
    return grid, TileOrder(grid, (depth, height, width)) if depth else None


@torch.library.custom_op("diffattn::method_attention", mutates_args=(), tags=_KEPT_OUT_OF_GRAPHS)
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    size: list[int],
    serial: int,
    scale: float | None,
    place: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    used = _used(size, serial, key.shape[1])
    source: MethodSource = _source(serial, used)
    grid, _ = _grid_and_order(used)
    attend = source.attend if place is None else partial(source.attend, place=place)
    out = attend(query, key, value, grid, scale=scale, key_mask=key_mask)
    return out.contiguous(), used


@_attend.register_fake
def _(
    query: torch.Tensor, *rest: torch.Tensor | list[int] | float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), torch.empty(_NUMBERS, dtype=torch.int64, device="cpu")


@torch.library.custom_op(
    "diffattn::method_attention_backward", mutates_args=(), tags=_KEPT_OUT_OF_GRAPHS
)
def _attend_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    used: torch.Tensor,
    key_mask: torch.Tensor | None,
    serial: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grid, _ = _grid_and_order(used)
    # Autograd is off inside an operator, as in inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
        source: MethodSource = _source(serial, used)
        out = source.attend(query, key, value, grid, scale=scale, key_mask=key_mask)
        dq, dk, dv = torch.autograd.grad(out, (query, key, value), grad_out)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attend_backward.register_fake
def _(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: torch.Tensor | float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _setup_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, key_mask, _, *ctx.options, _ = inputs
    ctx.save_for_backward(query, key, value, output[1], key_mask)


def _attend_autograd(
    ctx: Any, grad_out: torch.Tensor, grad_used: None
) -> tuple[torch.Tensor | None, ...]:
    grads = _attend_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None, None)


_attend.register_autograd(_attend_autograd, setup_context=_setup_attend)


@dataclass(frozen=True)
class _Blocks:
    """A call under a static mask.

    Attributes:
        layout: the blocks.
        order: the order into which the tokens have yet to be put; None to leave them.
        scale: the factor of the scores.
    """

    layout: BlockLayout
    order: TileOrder | None
    scale: float | None


def _blocks(used: torch.Tensor, serial: int, query: torch.Tensor, scale: float | None) -> _Blocks:
    source: LayoutSource = _source(serial, used)
    grid, given = _grid_and_order(used)
    order = given or source.order(grid)
    return _Blocks(
        source.layout(grid, query.device, order),
        None if given else order,
        source.score_scale(grid, query.shape[-1], scale),
    )


@torch.library.custom_op(
    "diffattn::static_mask_attention", mutates_args=(), tags=_KEPT_OUT_OF_GRAPHS
)
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    size: list[int],
    serial: int,
    scale: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    used = _used(size, serial, key.shape[1])
    blocks = _blocks(used, serial, query, scale)
    out, lse = attention(
        query,
        key,
        value,
        blocks.layout,
        order=blocks.order,
        scale=blocks.scale,
        key_mask=key_mask,
        return_lse=True,
        backend=backend,
    )
    return out, lse, used


@_forward.register_fake
def _(
    query: torch.Tensor, *rest: torch.Tensor | list[int] | float | str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(query.shape),
        query.new_empty((batch, heads, tokens), dtype=dtype),
        torch.empty(_NUMBERS, dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op(
    "diffattn::static_mask_attention_backward", mutates_args=(), tags=_KEPT_OUT_OF_GRAPHS
)
def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    used: torch.Tensor,
    key_mask: torch.Tensor | None,
    serial: int,
    scale: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = _blocks(used, serial, query, scale)
    return attention_gradients(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        blocks.layout,
        order=blocks.order,
        scale=blocks.scale,
        key_mask=key_mask,
        backend=backend,
    )


@_backward.register_fake
def _(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: torch.Tensor | float | str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, key_mask, _, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output, key_mask)


def _autograd(
    ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor, grad_used: None
) -> tuple[torch.Tensor | None, ...]:
    # Traced code never uses the log-sum-exp: only the output has a gradient.
    grads = _backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("diffattn::move_tokens", mutates_args=(), tags=_KEPT_OUT_OF_GRAPHS)
def move_tokens(x: torch.Tensor, serial: int, dim: int, enters: bool) -> torch.Tensor:
    """A copy of `x` with its tokens put in the order of the running call, or back in the model's.

    Args:
        x: a tensor with tokens along `dim`.
        serial: number of the attached denoiser whose call is running.
        dim: a dimension, as in `TokenFlow`.
        enters: whether the tokens enter the denoiser's blocks; otherwise they leave them.
    """
    call = running_call(serial)
    order = None if call is None else call.order
    if order is not None:
        x = in_order(order, x, dim) if enters else order.from_tiles(x, dim)
    return x.clone(memory_format=torch.contiguous_format)


@move_tokens.register_fake
def _(x: torch.Tensor, serial: int, dim: int, enters: bool) -> torch.Tensor:
    return x.new_empty(x.shape)


def _move_autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # No call has an order while gradients are recorded: the copy is in the order of `x`.
    return grad, None, None, None


move_tokens.register_autograd(_move_autograd)
