"""Linear attention in Triton, forward and backward, beside dense attention by cuDNN."""

from __future__ import annotations

from functools import partial

import torch

from diffattn.kernels.linear import linear_attention
from diffattn.pipelines.bench.timing import Call, Spread, interleave, median_ratio
from gpu_run.rates import dense
from gpu_run.setting import Setting
from gpu_run.shapes import BACKWARD, FORWARD, Shape

SHAPES = ("wan-1.3b-480p", "cogvideox-5b")


def run(what: str, setting: Setting) -> None:
    for name in SHAPES:
        for direction in (FORWARD, BACKWARD):
            unit = f"{name} {direction}"
            if not setting.journal.is_finished(unit):
                _measure(setting.shape(name), direction, setting)
                setting.journal.finish(unit)


def _measure(shape: Shape, direction: str, setting: Setting) -> None:
    *qkv, grad = setting.inputs(shape)
    reference = dense("flash" if setting.dry else "cudnn")

    def prepared(attend: Call, leaves: list[torch.Tensor], grad: torch.Tensor) -> Call:
        if direction == FORWARD:
            return attend
        out = attend()
        assert isinstance(out, torch.Tensor)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    with torch.set_grad_enabled(direction == BACKWARD):
        leaves = [x.detach().requires_grad_(direction == BACKWARD) for x in qkv]
        firsts = [reference.arrange(x).detach().requires_grad_(x.requires_grad) for x in leaves]
        linear = partial(linear_attention, *leaves, backend="triton")
        calls = {
            "dense": prepared(partial(reference.attend, *firsts), firsts, reference.arrange(grad)),
            "linear": prepared(linear, leaves, grad),
        }
        for call in calls.values():
            call()
        times, failed = interleave(calls, setting.timer, **setting.rounds(2.0))
    facts = {"shape": shape.name, "direction": direction, "tokens": shape.tokens}
    if failed:
        setting.journal.add("linear", **facts, failed="; ".join(failed.values()))
        return
    setting.journal.add(
        "linear", **facts, ms=Spread.of(times["linear"]).median,
        dense_ms=Spread.of(times["dense"]).median,
        speed_up=median_ratio(times["dense"], times["linear"]),
    )  # fmt: skip
