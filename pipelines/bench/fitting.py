"""Whether a measurement fits into memory, and how long it takes, before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from diffattn import TokenGrid

from ..errors import UserError
from ..run.memory import free_memory, gib
from .cases import BACKWARD, BACKWARD_FLOPS, DTYPES, Case, Shape, bound_of
from .dense import Attend, fastest
from .timing import Call, Timer

# A call is made twice to warm up and once to see its memory, and timed in three rounds at least.
WARM_UPS, LEAST_ROUNDS = 3, 3

# Tensors of the call's dtype that live at a time: q, k and v, and in the method's order again; the
# output in both orders. In a backward pass also four gradients, in both orders.
_FORWARD_TENSORS, _BACKWARD_TENSORS = 8, 16
# While q, k and v are made there is a field in float32, twice.
_FIELDS = 2 * 4

# Tokens of the dense call by which the rate of a device is found.
_TRIAL_TOKENS = {"cpu": 1024}
_TRIAL_ELSEWHERE = 8192
_TRIALS = 2


@dataclass(frozen=True)
class Group:
    """Cases that are timed in turns, beside dense attention.

    Attributes:
        shape: the tensors.
        direction: "forward" or "backward".
        cases: the methods.
    """

    shape: Shape
    direction: str
    cases: tuple[Case, ...]


def check_memory(groups: Sequence[Group], device: torch.device) -> None:
    """Refuse shapes whose tensors alone are more than the free memory of the device.

    Raises:
        UserError: names the first such shape, and what to do.
    """
    free = free_memory(device)
    for group in groups:
        need = least_bytes(group)
        if free is None or need <= free:
            continue
        shape = group.shape
        advice = ["fewer tokens", "--heads 1"]
        if shape.batch > 1:
            advice.append("--batch 1")
        if shape.dtype == "float32":
            advice.append("--dtype bfloat16")
        raise UserError(
            f"{shape.grid.tokens:,} tokens with {shape.heads} heads of {shape.head_dim} in"
            f" {shape.dtype}, {group.direction}, need at least {gib(need)} of memory, but {device}"
            f" has {gib(free)} free: try {', '.join(advice)}, or go on anyway by --no-memory-check"
        )


def least_bytes(group: Group) -> int:
    """Bytes that a group cannot do without; there may be more."""
    size = DTYPES[group.shape.dtype].itemsize
    tensors = _BACKWARD_TENSORS if group.direction == BACKWARD else _FORWARD_TENSORS
    return group.shape.numbers * max(tensors * size, 3 * size + _FIELDS)


def least_seconds(groups: Sequence[Group], device: torch.device, timer: Timer) -> float:
    """Estimate how long warm-ups and the least number of rounds take, by the rate of a short call.

    Methods are taken to reach the bounds of their plans, and dense attention its rate.
    """
    rates: dict[Shape, float] = {}
    total = 0.0
    for group in groups:
        tried = _trial_shape(group.shape, device)
        if tried not in rates:
            rates[tried] = _rate(tried, device, timer)
        dense = group.shape.dense_flops / rates[tried]
        calls = 1.0 + sum(1 / (bound_of(c, group.shape).speed_up or 1.0) for c in group.cases)
        backward = group.direction == BACKWARD
        passes = WARM_UPS + LEAST_ROUNDS
        # One forward pass serves all backward passes of a call.
        total += dense * calls * (1 + BACKWARD_FLOPS * passes if backward else passes)
    return total


def check_time(seconds: float, minutes: float, groups: Sequence[Group], device: str) -> None:
    """Refuse what takes longer than the user wants to wait.

    Raises:
        UserError: tells the estimate, and the options that change it.
    """
    if seconds <= 60 * minutes:
        return
    tokens = max(group.shape.grid.tokens for group in groups)
    enough = round(seconds / 60 * 1.5 + 1)
    raise UserError(
        f"the least that can be measured, {WARM_UPS} warm-up calls and {LEAST_ROUNDS} rounds, takes"
        f" about {duration(seconds)} on {device}: give --minutes {enough}, or fewer tokens than"
        f" {tokens:,}, fewer heads or fewer methods"
    )


def duration(seconds: float) -> str:
    """A time for people: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _trial_shape(shape: Shape, device: torch.device) -> Shape:
    tokens = min(shape.grid.tokens, _TRIAL_TOKENS.get(device.type, _TRIAL_ELSEWHERE))
    return replace(shape, grid=TokenGrid(1, 1, tokens))


def _rate(shape: Shape, device: torch.device, timer: Timer) -> float:
    """Operations a second of dense attention.

    Raises:
        UserError: if there is no dense attention of this dtype.
    """
    size = (shape.batch, shape.heads, shape.grid.tokens, shape.head_dim)
    x = torch.randn(size, device=device, dtype=DTYPES[shape.dtype])

    def attention(attend: Attend) -> Call:
        return partial(attend, x, x, x)

    try:
        with torch.no_grad():
            _, call = fastest(attention, device, timer)
            best = min(timer.milliseconds(call) for _ in range(_TRIALS))
    except RuntimeError as error:
        raise UserError(f"{shape.dtype} on {device}: {error}") from None
    return shape.dense_flops / max(best, 1e-3) * 1000
