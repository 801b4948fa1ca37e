"""Tokens put in a tile order once per forward of a denoiser, not once per attention call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from diffattn import _compat
from diffattn.attach.backend import Group
from diffattn.attach.sites import AttachedSite
from diffattn.grid import TokenGrid
from diffattn.methods.base import attends_by_mask_alone
from diffattn.models import Family
from diffattn.models.base import argument
from diffattn.orders import TileOrder


def order_throughout(
    model: torch.nn.Module,
    family: Family,
    groups: Sequence[Group],
    sites: Iterable[AttachedSite],
    grid: TokenGrid | None,
    args: Any,
    kwargs: Any,
) -> TileOrder | None:
    """The order that the tokens of a whole forward can be in; None where each call permutes.

    Args:
        model: the denoiser, which has diffattn's hooks and perhaps others.
        groups, sites: the denoiser's groups and its attached sites.
        grid: the video tokens of the forward.
        args, kwargs: the arguments of the forward.
    """
    flow = family.flow
    if (
        flow is None
        or grid is None
        or type(model).__name__ != flow.model_class
        # Checkpointing of any kind runs modules again in the backward pass, when the order of
        # their tokens is no longer known.
        or torch.is_grad_enabled()
        or not any(group.sparse for group in groups)
        or (flow.interrupted is not None and flow.interrupted(model, args, kwargs))
    ):
        return None
    if flow.text is not None:
        text = argument(args, kwargs, *flow.text).shape[1]
        before = text if family.text == "before" else 0
        grid = replace(grid, text_before=before, text_after=text - before)
    order = _common_order(groups, grid)
    return None if order is None or _is_watched(model) or _is_parallel(sites) else order


def _common_order(groups: Sequence[Group], grid: TokenGrid) -> TileOrder | None:
    """The one order that all attached methods want the tokens of `grid` in; else None."""
    orders = set()
    for group in groups:
        if not attends_by_mask_alone(group.method):
            return None
        if not group.method.any_order:
            orders.add(group.method.order(grid))
    return orders.pop() if len(orders) == 1 else None


def _is_watched(model: torch.nn.Module) -> bool:
    """Whether code that relies on the model's own order sees tensors between its modules."""
    inside = (module for module in model.modules() if module is not model)
    return (
        len(model._forward_pre_hooks) > 1  # one hook is diffattn's
        or _compat.is_watched(model)
        or any(
            module._forward_pre_hooks
            or module._forward_hooks
            or _compat.is_watched(module)
            or _has_foreign_processor(module)
            for module in inside
        )
    )


def _is_parallel(sites: Iterable[AttachedSite]) -> bool:
    """Whether the sequence is spread over processes."""
    processor = next(iter(sites)).processor
    config = _compat.processor_parallelism(processor)
    return _compat.context_parallel(config) is not None


def _has_foreign_processor(module: torch.nn.Module) -> bool:
    """Whether a module attends by code of neither diffusers nor diffattn."""
    processor = module.__dict__.get("processor") or module._modules.get("processor")
    package = type(processor).__module__.partition(".")[0]
    return processor is not None and package not in ("diffusers", "diffattn")
