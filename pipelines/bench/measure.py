"""Measuring: dense attention and all methods of a shape in turns, round after round."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from diffattn.operator import choose_backend

from .cases import BACKWARD, DTYPES, Bound, attention_call, bound_of, selection_call
from .dense import Attend, fastest
from .fitting import LEAST_ROUNDS, Group
from .inputs import smooth_fields
from .peak import peak_mib
from .rows import Row, new_row
from .timing import Call, Timer, describe, interleave, synchronize

_DENSE = "dense"


@dataclass(frozen=True)
class Limits:
    """How long to measure a group.

    Attributes:
        rounds: the most rounds.
        seconds: after these no round begins, once there are `LEAST_ROUNDS`.
    """

    rounds: int
    seconds: float


@dataclass
class _Part:
    """A row in the making."""

    row: Callable[..., Row]
    facts: dict[str, Any]


def measure(
    group: Group, device: torch.device, timer: Timer, limits: Limits, rows: list[Row]
) -> None:
    """Measure a group, and add a row for dense attention and one for each case.

    A case that fails has a row that says why. After an interrupt in the rounds, the times of the
    rounds so far are rows, too.

    Args:
        group: what to measure.
        device: where to measure.
        timer: of the device.
        limits: how long.
        rows: the rows are added here.

    Raises:
        RuntimeError: if dense attention does not work; there is nothing to compare with then.
    """
    shape = group.shape
    qkv = smooth_fields(
        shape.grid, shape.heads, shape.head_dim, DTYPES[shape.dtype], device, shape.batch
    )
    grad = torch.randn_like(qkv[0]) if group.direction == BACKWARD else None
    ready = partial(_ready, qkv=qkv, grad=grad)
    backend, dense = fastest(
        lambda attend: ready(partial(_by_heads, attend)), device=device, timer=timer
    )
    calls: dict[str, Call] = {_DENSE: dense}
    parts = {
        _DENSE: _Part(
            partial(new_row, shape, group.direction, None, Bound(1.0, 1.0)),
            {"backend": f"torch {backend}", "peak_mib": peak_mib(dense, device)},
        )
    }
    selections: dict[str, str] = {}
    for number, case in enumerate(group.cases):
        name = f"case {number}"
        part = _Part(
            partial(new_row, shape, group.direction, case, bound_of(case, shape)),
            {"backend": choose_backend(device)},
        )
        try:
            start = time.perf_counter()
            call = ready(attention_call(case, shape, device))
            call()
            synchronize(device)
            part.facts["first_ms"] = 1000 * (time.perf_counter() - start)
            call()  # a method may choose its kernel by what the first calls selected
            part.facts["peak_mib"] = peak_mib(call, device)
            selection = None if grad is not None else selection_call(case, shape, qkv)
            if selection is not None:
                selection()
                calls[f"{name}, selection"] = selection
                selections[name] = f"{name}, selection"
            calls[name], parts[name] = call, part
        except Exception as error:  # kernels, compilers and allocators raise errors of many types
            rows.append(part.row(**part.facts, failed=describe(error)))
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    try:
        with torch.no_grad() if grad is None else torch.enable_grad():
            _, failed = interleave(
                calls, timer, least=LEAST_ROUNDS, most=limits.rounds, seconds=limits.seconds,
                times=times,
            )  # fmt: skip
    finally:
        dense_rounds = tuple(times.get(_DENSE, ()))
        for name, part in parts.items():
            rounds = tuple(times.get(name, ()))
            why = failed.get(name, "")
            if not rounds and not why:
                continue  # interrupted before the first round
            selected = tuple(times.get(selections.get(name, ""), ()))
            rows.append(
                part.row(
                    **part.facts,
                    rounds=() if why else rounds,
                    dense_rounds=dense_rounds,
                    selection_rounds=selected,
                    failed=why,
                )
            )


def _by_heads(attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of tensors (batch, tokens, heads, head_dim), as diffusers calls torch's."""
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _ready(attend: Attend, qkv: list[torch.Tensor], grad: torch.Tensor | None) -> Call:
    """A call to time: the forward pass, or the backward pass alone after one forward pass."""
    if grad is None:
        return partial(_without_grad, attend, *qkv)
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(leaves[0], leaves[1], leaves[2])
    return partial(torch.autograd.grad, out, leaves, grad, retain_graph=True)


def _without_grad(
    attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        return attend(q, k, v)
