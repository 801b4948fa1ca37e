"""The peak of memory while a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_GIB = 1 << 30
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """The peak in GiB, once the block has ended; words where it is not known."""

    gib: float | str = "not known"


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Measure the most memory that the device, or the process on a CPU, holds at a time.

    Args:
        device: of the computation, such as "cpu" or "cuda:0".
    """
    import torch

    peak = Peak()
    kind = torch.device(device).type
    if kind == "cpu":
        known = _forget_peak()
        yield peak
        if known:
            peak.gib = _resident_peak()
        return
    # CUDA, XPU and others have the same two functions.
    module = getattr(torch, kind)
    if not hasattr(module, "max_memory_allocated"):
        yield peak
        return
    module.reset_peak_memory_stats(device)
    yield peak
    peak.gib = module.max_memory_allocated(device) / _GIB


def _forget_peak() -> bool:
    """Have Linux count the peak of this process anew; False where it cannot."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()


def _resident_peak() -> float | str:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / _GIB
    return "not known"
