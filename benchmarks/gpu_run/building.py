"""How long the project's static masks take to build on the device, at a large shape."""

from __future__ import annotations

import time
from statistics import median

import torch

from diffattn.methods import METHODS
from diffattn.methods.base import StaticMaskMethod
from diffattn.pipelines.bench.timing import describe
from gpu_run.setting import Setting

BUILDS = 5

FAMILIES = {"hunyuan-720p": "hunyuanvideo", "wan-14b-720p": "wan"}


def run(what: str, setting: Setting) -> None:
    """Build each method's blocks, as a first call does; the median after the first time counts."""
    shape = setting.shape(what)
    for name, kind in METHODS.items():
        if not issubclass(kind, StaticMaskMethod) or name == "dense":
            continue
        facts = {"shape": shape.name, "method": name, "tokens": shape.tokens}
        try:
            times, orders, peak = [], [], 0
            for _ in range(BUILDS):
                method = kind().for_model(FAMILIES[what], shape.grid)
                setting.synchronize()
                if not setting.dry:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                start = time.perf_counter()
                order = method.order(shape.grid)
                orders.append(1000 * (time.perf_counter() - start))
                layout = method.layout(shape.grid, setting.device, order)
                setting.synchronize()
                times.append(1000 * (time.perf_counter() - start))
                if not setting.dry:
                    peak = torch.cuda.max_memory_allocated() - before
        except Exception as error:
            setting.journal.add("building", **facts, failed=describe(error))
            continue
        setting.journal.add(
            "building", **facts, first_ms=times[0], ms=median(times[1:]),
            order_ms=median(orders[1:]), peak_bytes=peak, nbytes=layout.nbytes,
            density=layout.density, partial_blocks=layout.partial_blocks,
            bit_masks=layout.bit_masks.shape[0],
        )  # fmt: skip
