"""The memory that a call needs."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak of live bytes of torch's allocator during a call, in MiB above the start.

    On the CPU the profiler counts, and does not see scratch space inside of oneDNN and MKL.

    Returns:
        None for a device whose allocator does not tell.
    """
    if device.type == "cpu":
        return _on_cpu(call) / 2**20
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _on_cpu(call: Callable[[], object]) -> int:
    # The profiler's library writes a line on stderr for each start and stop otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    results = profile.profiler.kineto_results
    changes = [e for e in results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest
