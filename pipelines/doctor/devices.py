"""The processor and the GPUs: drivers, compute capability and free memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

from ..errors import one_line
from ..run.machine import cpu_name
from ..run.memory import free_memory, gib
from .findings import Check, Finding

# Triton's kernels are compiled for this capability and later ones in every test run.
_OLDEST = (8, 0)
_LITTLE = 2 << 30
_DRIVER_SECONDS = 20


def check_processor() -> Iterator[Finding]:
    """The processor, its threads and the free memory."""
    import torch

    free = free_memory(torch.device("cpu"))
    said = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if free is None:
        yield Finding("ok", "cpu", said)
        return
    said = f"{said}, {gib(free)} of memory free"
    if free < _LITTLE:
        yield Finding("warning", "cpu", said, "end other programs before a run")
    else:
        yield Finding("ok", "cpu", said)


def check_gpus() -> Iterator[Finding]:
    """Every GPU that torch sees, with a small computation on each, or that only a driver sees."""
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        yield _without_cuda(driver)
        return
    if driver:
        yield Finding("ok", "driver", f"NVIDIA {driver[0].rpartition(',')[2].strip()}")
    for number in range(torch.cuda.device_count()):
        yield _gpu(number)


def _gpu(number: int) -> Finding:
    import torch

    subject = f"cuda:{number}"
    try:
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        two = torch.ones(1, device=subject) + 1
        if two.item() != 2:
            return Finding("problem", subject, "1 + 1 is not 2 there", "the GPU may be damaged")
    except Exception as error:  # drivers raise errors of many types
        return Finding(
            "problem",
            subject,
            f"torch reports it, but it fails: {type(error).__name__}: {one_line(error)[:200]}",
            "look at nvidia-smi for the driver and for programs on the GPU; a restart of the"
            " machine or container often helps; CUDA_VISIBLE_DEVICES= runs on the CPU",
        )
    major, minor = properties.major, properties.minor
    said = (
        f"{properties.name}, compute capability {major}.{minor}, {gib(free)} of {gib(total)} free"
    )
    if torch.version.hip is None and (major, minor) < _OLDEST:
        return Finding(
            "warning", subject, said, "the kernels are made and tested for 8.0 (Ampere) and later"
        )
    if free < _LITTLE:
        return Finding(
            "warning", subject, said, "another program holds its memory: look at nvidia-smi"
        )
    return Finding("ok", subject, said)


def _without_cuda(driver: list[str]) -> Finding:
    import torch

    if driver:
        said = f"the driver sees {driver[0]}, but torch {torch.__version__} does not"
        if torch.version.cuda is None:
            advice = "this torch is built for the CPU: choose CUDA at https://pytorch.org"
        elif "CUDA_VISIBLE_DEVICES" in os.environ:
            hidden = os.environ["CUDA_VISIBLE_DEVICES"]
            advice = f"CUDA_VISIBLE_DEVICES is {hidden!r}, which hides GPUs: unset it"
        else:
            advice = f"the driver may be too old for CUDA {torch.version.cuda}: update it"
        return Finding("warning", "gpu", said, advice)
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is None:
        return Finding("ok", "gpu", "none: everything runs on the CPU")
    if other.type == "xpu":
        return Finding("ok", "gpu", "xpu: Triton's kernels run there, without tests of ours")
    return Finding(
        "warning", "gpu", f"{other.type} has no sparse kernels", "use --device cpu, or a CUDA GPU"
    )


def _driver() -> list[str]:
    """The name and the driver's version of each GPU, as nvidia-smi says; empty without any."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_DRIVER_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


CHECKS: tuple[Check, ...] = (check_processor, check_gpus)
