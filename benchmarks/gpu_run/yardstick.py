"""The rates of this GPU today: a copy, a matrix product, and dense attention of every head size."""

from __future__ import annotations

from functools import partial

import torch

from diffattn.pipelines.bench.timing import Call, Spread, interleave
from gpu_run.rates import dense, measure
from gpu_run.setting import Setting
from gpu_run.shapes import BACKWARD, FORWARD

SHAPES = ("wan-1.3b-480p", "cogvideox-5b", "wan-14b-720p")


def run(what: str, setting: Setting) -> None:
    _ceilings(setting)
    names = ("flash",) if setting.dry else ("cudnn", "flash")
    for name in SHAPES:
        for direction in (FORWARD, BACKWARD):
            shape = setting.shape(name)
            measure(shape, direction, [dense(x) for x in names], setting, seconds=3.0)


def _ceilings(setting: Setting) -> None:
    """A copy from device to device, and a product of two square matrices."""
    size, n = (2**31, 8192) if not setting.dry else (2**20, 64)
    source = torch.zeros(size, dtype=torch.uint8, device=setting.device).random_()
    target = torch.empty_like(source)
    a, b = setting.random(n, n, seed=0), setting.random(n, n, seed=1)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "gemm": partial(torch.mm, a, b)}
    for call in calls.values():
        call()
    times, _ = interleave(calls, setting.timer, **setting.rounds(2.0))
    copy, product = (Spread.of(times[name]).median for name in ("copy", "gemm"))
    # Bytes read and bytes written both count.
    setting.journal.add("yardstick", name="copy", ms=copy, gb_per_s=2 * size / copy / 1e6)
    setting.journal.add("yardstick", name=f"gemm {n}", ms=product, tflops=2 * n**3 / product / 1e9)
