"""The rate of attention at a model's shape, forward and backward, beside dense attention by cuDNN.

Inputs are random. All calls of a direction are timed one after another, round after round, on a
cold L2 (`timing`); `ms` is the median of the rounds, and ratios are medians of the ratios of the
rounds. TFLOP/s are effective: 4 * heads * pairs * head_dim forward and 2.5 times that backward,
where pairs are the token pairs that attend. Backward is the backward pass alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from diffattn import attention
from diffattn.pipelines.bench.dense import dense_attention
from diffattn.pipelines.bench.timing import (
    Call,
    Spread,
    describe,
    host_microseconds,
    interleave,
    median_ratio,
)
from gpu_run.accuracy import check_gradients, check_output, worst
from gpu_run.masks import ALIGNED, EXACT, Mask, attended_pairs, make_mask, tile_order
from gpu_run.setting import Setting
from gpu_run.shapes import BACKWARD, FORWARD, Shape

OURS = "diffattn"
DENSE = ("cudnn", "flash")
SECONDS = 12.0  # of the rounds of a direction


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """A view, `(batch, tokens, heads, d)` to `(batch, heads, tokens, d)` or the way back."""
    return x.transpose(1, 2)


@dataclass(frozen=True)
class Attention:
    """One attention over one mask, ready to be called.

    Attributes:
        name: of the implementation.
        mask: None for dense attention.
        attend: takes q, k, v as `arrange` leaves them.
        arrange: changes the order of dimensions from `(batch, tokens, heads, head_dim)` to what
            `attend` takes, and that of the output back; not timed.
    """

    name: str
    mask: Mask | None
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    arrange: Callable[[torch.Tensor], torch.Tensor] = _unchanged

    @property
    def label(self) -> str:
        return self.name if self.mask is None else f"{self.name} {self.mask.name}"


def dense(name: str) -> Attention:
    """torch's dense attention by one of its backends and no other."""
    return Attention(name, None, dense_attention(name), heads_first)


def ours(mask: Mask) -> Attention:
    """This package, through the function that users call."""
    return Attention(OURS, mask, partial(attention, mask=mask.layout, backend="triton"))


def masks_of(shape: Shape, densities: tuple[float, ...], setting: Setting) -> list[Mask]:
    """Masks of both kinds at every density; at density 1 both kinds are the same mask."""
    return [
        make_mask(shape.grid, kind, density, setting.device)
        for density in densities
        for kind in (ALIGNED, EXACT)
        if kind == ALIGNED or density < 1
    ]


def run(what: str, setting: Setting) -> None:
    """The rates of one shape at all densities."""
    shape = setting.shape(what)
    masks = masks_of(shape, setting.densities, setting)
    for direction in (FORWARD, BACKWARD):
        attentions = [dense("cudnn"), *map(ours, masks)]
        if setting.dry:
            attentions[0] = dense("flash")  # the CPU has no cuDNN
        measure(shape, direction, attentions, setting)
    sparsest = [mask for mask in masks if mask.kind == ALIGNED][-1]
    if not setting.journal.is_finished(f"{shape.name} calls"):
        setting.journal.add("call", **around(shape, sparsest, setting))
        setting.journal.finish(f"{shape.name} calls")


def measure(
    shape: Shape,
    direction: str,
    attentions: list[Attention],
    setting: Setting,
    seconds: float = SECONDS,
) -> None:
    """Add a row for each attention, with its time or with its error.

    Args:
        seconds: time for the rounds.
    """
    unit = f"{shape.name} {direction}"
    if setting.journal.is_finished(unit):
        return
    tensors = setting.inputs(shape)
    calls: dict[str, Call] = {}
    facts: dict[str, dict[str, object]] = {}
    for one in attentions:
        common = _facts(one, shape, direction)
        try:
            calls[one.label], checked = _ready(one, direction, tensors, setting)
            facts[one.label] = common | checked
        except Exception as error:
            if "CUDA error" in str(error):
                raise  # nothing works any more in this process
            setting.journal.add("rate", **common, failed=describe(error))
    times, failed = interleave(calls, setting.timer, **setting.rounds(seconds))
    for label, why in failed.items():
        setting.journal.add("rate", **facts[label], failed=why)
    for label, rounds in times.items():
        spread = Spread.of(rounds)
        pairs = facts[label]["pairs"]
        assert isinstance(pairs, int)
        setting.journal.add(
            "rate", **facts[label],
            ms=spread.median, low=spread.low, high=spread.high, rounds=rounds,
            tflops=shape.flops(pairs, direction) / spread.median / 1e9,
            **{f"of_{name}": pairs / shape.tokens**2 * median_ratio(times[name], rounds)
               for name in DENSE if name in times},
        )  # fmt: skip
    setting.journal.finish(unit)


def _facts(one: Attention, shape: Shape, direction: str) -> dict[str, object]:
    mask = one.mask
    return {
        "shape": shape.name,
        "direction": direction,
        "candidate": one.name,
        "head_dim": shape.head_dim,
        "tokens": shape.tokens,
        "mask": mask.kind if mask else "dense",
        "asked": mask.asked if mask else 1.0,
        "density": mask.layout.density if mask else 1.0,
        "pairs": attended_pairs(mask.layout) if mask else shape.tokens**2,
    }


def _ready(
    one: Attention, direction: str, tensors: list[torch.Tensor], setting: Setting
) -> tuple[Call, dict[str, object]]:
    """The call to time; the seconds of its first call, and how far its results are off."""
    *qkv, grad = tensors
    rule = one.mask.rule if one.mask else None
    backward = direction == BACKWARD
    leaves = [one.arrange(x).detach().requires_grad_(backward) for x in qkv]
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = one.attend(*leaves)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return one.attend(*leaves)

    def gradients(grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, one.arrange(grad), retain_graph=True)

    if backward:
        found = check_gradients(lambda g: [one.arrange(x) for x in gradients(g)], qkv, rule)
    else:
        del out
        found = check_output(lambda: one.arrange(forward()), qkv, rule)
    setting.synchronize()
    facts = {"first_call_s": round(time.perf_counter() - start, 2), **worst(found)}
    return (partial(gradients, grad) if backward else forward), facts


def around(shape: Shape, mask: Mask, setting: Setting) -> dict[str, object]:
    """Time of the host for a call, and time to put tokens into tile order and the output back.

    The host's time is that of a call without gradients, of one that autograd records, and of the
    backward pass.
    """
    q, k, v, grad = setting.inputs(shape)
    order = tile_order(shape.grid, setting.device)
    back = order.argsort()
    attend = ours(mask).attend

    def permute() -> list[torch.Tensor]:
        return [*(x.index_select(1, order) for x in (q, k, v)), q.index_select(1, back)]

    number = 1 if setting.dry else 20
    with torch.no_grad():
        calls: dict[str, Call] = {"call": lambda: attend(q, k, v), "permute": permute}
        times, _ = interleave(calls, setting.timer, **setting.rounds(1.0))
        host = host_microseconds(calls["call"], setting.device, number)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    recorded = host_microseconds(lambda: attend(*leaves), setting.device, number)
    out = attend(*leaves)
    backward = host_microseconds(
        lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), setting.device, number
    )
    return {
        "shape": shape.name,
        "asked": mask.asked,
        "host_us": host,
        "host_us_recorded": recorded,
        "host_us_backward": backward,
        "permute_ms": Spread.of(times["permute"]).median,
        "permute_of_call": median_ratio(times["permute"], times["call"]),
    }
