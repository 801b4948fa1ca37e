"""Compiles the kernels that later stages launch, in many processes into one cache.

The launch code itself runs, on tensors of the GPU (or, in a dry run, on a driver that knows sm_90
and cannot load a kernel), up to the point where a kernel would start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from diffattn.pipelines.bench.timing import describe
from gpu_run import selecting, smoke, tune
from gpu_run.adapter import NotTakenError
from gpu_run.candidates import RISKY
from gpu_run.setting import Setting

DRY_ARCH = 90
DRY_LAUNCHES = 4


def run(what: str, setting: Setting) -> None:
    """Compile every n-th launch.

    Args:
        what: "i/n".
    """
    number, of = map(int, what.split("/"))
    if setting.dry:
        triton.runtime.driver.set_active(CompileOnlyDriver(DRY_ARCH))
    every = [*tune.launches(setting), *smoke.launches(setting), *selecting.launches(setting)]
    # A compiler that crashes ends its process: launches that might make it crash come last.
    mine = sorted(every[number::of], key=lambda launch: any(form in launch[0] for form in RISKY))
    if setting.dry:
        mine = mine[:: max(1, len(mine) // DRY_LAUNCHES)]
    failed: dict[str, str] = {}
    start = time.perf_counter()
    with compile_only() as kernels:
        for name, launch in mine:
            try:
                launch()
            except NotTakenError:
                continue
            except Exception as error:  # a form that does not compile: later stages say so too
                failed[name] = describe(error)
    loaded = {kernel.hash: kernel for kernel in kernels}
    if not setting.dry:
        for kernel in loaded.values():
            try:
                _ = kernel.run  # loads it, and builds its launcher
            except Exception as error:  # the kernel needs more than the GPU has
                failed[kernel.metadata.name] = describe(error)
    setting.journal.add(
        "compile", launches=len(mine), kernels=len(loaded),
        failed=failed, seconds=round(time.perf_counter() - start, 1),
    )  # fmt: skip


class CompileOnlyDriver:
    """Stands in for a GPU's driver up to the point where a kernel would be loaded."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compile_only() -> Iterator[list[Any]]:
    """Compile kernels instead of launching them while the block runs, and add them to the list."""
    kernels: list[Any] = []
    run = triton.JITFunction.run

    def warm_up(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, warmup=True, **kwargs))
        return kernels[-1]

    with mock.patch.object(triton.JITFunction, "run", warm_up):
        yield kernels
