"""Tokens put in a tile order once per forward of a denoiser, not once per attention call.

The order of a forward is that of the method of its denoising step, and may differ in the next.

`order_throughout` chooses the order of a forward. Gates are hooks on the modules where tokens enter
the denoiser's blocks and leave them. Gates stay in place while a method is attached: hooks that
came and went with each forward would act on the forwards of other threads, and would make compiled
code compile again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from diffattn import _compat
from diffattn.attach.backend import Group
from diffattn.attach.compiled import move_tokens
from diffattn.attach.running_call import running_call
from diffattn.attach.sites import AttachedSite
from diffattn.attach.watched import is_watched
from diffattn.grid import TokenGrid
from diffattn.methods.base import (
    Method,
    StaticMaskMethod,
    attends_by_mask_alone,
    attends_by_mask_throughout,
)
from diffattn.models import Family
from diffattn.models.base import argument
from diffattn.models.token_flow import TokenFlow, in_order
from diffattn.orders import TileOrder

# Threads put gates in place one after another.
_placing = threading.Lock()


class Numbered(Protocol):
    """An attached denoiser, whose running calls are found by its serial number."""

    serial: int


@dataclass(frozen=True, eq=False)
class _Gate:
    """The hook of one module, see `TokenFlow.places`."""

    attached: Numbered
    dim: int
    enters: bool

    def move(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._move_when_it_runs(output)
        call = running_call(self.attached.serial)
        if call is None or call.order is None:
            return None
        if self.enters:
            return in_order(call.order, output, self.dim)
        return call.order.from_tiles(output, self.dim)

    def _move_when_it_runs(self, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return tuple(self._move_when_it_runs(part) for part in output)
        return move_tokens(output, self.attached.serial, self.dim, self.enters)


@dataclass(eq=False)
class Gates:
    """The gates of a denoiser.

    Attributes:
        attached: the attached denoiser.
        flow: where tokens enter and leave.
    """

    attached: Numbered
    flow: TokenFlow
    _placed: dict[str, tuple[torch.nn.Module, RemovableHandle]] = field(default_factory=dict)

    def put_in_place(self, model: torch.nn.Module) -> None:
        """Put a gate on each module, also where a LoRA has replaced a module since."""
        with _placing:
            for name, dim, enters in self.flow.places:
                module = model.get_submodule(name)
                if name in self._placed:
                    placed_on, handle = self._placed[name]
                    if placed_on is module:
                        continue
                    handle.remove()
                handle = module.register_forward_hook(_Gate(self.attached, dim, enters).move)
                self._placed[name] = module, handle

    def remove(self) -> None:
        for _, handle in self._placed.values():
            handle.remove()
        self._placed.clear()

    @property
    def hooks(self) -> set[int]:
        """The numbers of the gates among the hooks of their modules."""
        return {handle.id for _, handle in self._placed.values()}


def may_permute(model: torch.nn.Module, family: Family, groups: Sequence[Group]) -> bool:
    """Whether there are sizes for which the tokens of a whole forward can be permuted."""
    return (
        family.flow is not None
        and type(model).__name__ == family.flow.model_class
        and all(attends_by_mask_throughout(group.chosen) for group in groups)
        and any(_may_have_order(group.chosen) for group in groups)
    )


def _may_have_order(method: Method) -> bool:
    own: Any = type(method)
    return own.order_on is not StaticMaskMethod.order_on


def order_throughout(
    model: torch.nn.Module,
    gates: Gates,
    family: Family,
    groups: Sequence[Group],
    sites: Iterable[AttachedSite],
    grid: TokenGrid,
    args: Any,
    kwargs: Any,
) -> TileOrder | None:
    """The order that the tokens of a whole forward can be in; None where each call permutes.

    Args:
        model: the denoiser, which has diffattn's hooks and perhaps others.
        gates: the denoiser's gates.
        groups, sites: the denoiser's groups and its attached sites.
        grid: the video tokens of the forward.
        args, kwargs: the arguments of the forward.
    """
    flow = gates.flow
    if (
        # Checkpointing of any kind runs modules again in the backward pass, when the order of
        # their tokens is no longer known.
        torch.is_grad_enabled()
        # A flow knows the places of pictures and of text, but of no other tokens.
        or grid.pictures != slice(0, grid.tokens)
        or type(model).__name__ != flow.model_class
        or not any(group.sparse for group in groups)
        or (flow.interrupted is not None and flow.interrupted(model, args, kwargs))
    ):
        return None
    if flow.text is not None:
        text = argument(args, kwargs, *flow.text).shape[1]
        grid = grid.beside(**{family.text or "after": text})
    order = _common_order(groups, grid)
    if order is None or is_watched(model, groups, gates.hooks) or _is_parallel(sites):
        return None
    return order


def _common_order(groups: Sequence[Group], grid: TokenGrid) -> TileOrder | None:
    """The one order that all attached methods want the tokens of `grid` in; else None."""
    orders = set()
    for group in groups:
        if not attends_by_mask_alone(group.method):
            return None
        if not group.method.any_order:
            orders.add(group.method.order(grid))
    return orders.pop() if len(orders) == 1 else None


def _is_parallel(sites: Iterable[AttachedSite]) -> bool:
    """Whether the sequence is spread over processes."""
    processor = next(iter(sites)).processor
    config = _compat.processor_parallelism(processor)
    return _compat.context_parallel(config) is not None
