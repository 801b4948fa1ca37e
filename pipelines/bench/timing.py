"""How time is measured: interleaved rounds on a cold L2, by the device's clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

_CPU = torch.device("cpu")
HEAD_START_MS = 1.0  # of the host over the device: launching a backward pass takes less

Clock = Callable[[], float]
Call = Callable[[], object]


class Timer(Protocol):
    def milliseconds(self, call: Call) -> float: ...


class DeviceTimer:
    """Times by CUDA events.

    Before every call a buffer several times as large as the L2 cache is written. No input is then
    left in the cache. The host launches the call before the device comes to it, so that the time
    has no gaps from launching.
    """

    def __init__(self, device: torch.device) -> None:
        size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._scratch = torch.empty(size, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        fill_ms = min(self._elapsed(self._scratch.zero_) for _ in range(5))
        self._fills = max(1, math.ceil(HEAD_START_MS / fill_ms))

    def milliseconds(self, call: Call) -> float:
        for _ in range(self._fills):
            self._scratch.zero_()
        return self._elapsed(call)

    def _elapsed(self, call: Call) -> float:
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


class HostTimer:
    """Times by the host's clock, for the CPU, and for devices without CUDA's events."""

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device = device

    def milliseconds(self, call: Call) -> float:
        synchronize(self._device)
        start = time.perf_counter()
        call()
        synchronize(self._device)
        return 1000 * (time.perf_counter() - start)


def timer_for(device: torch.device) -> Timer:
    """The timer that measures best on a device."""
    return DeviceTimer(device) if device.type == "cuda" else HostTimer(device)


def host_microseconds(call: Call, device: torch.device, calls: int = 50) -> float:
    """How long the host is busy with one call, on average, while the device lags behind."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    busy = time.perf_counter() - start
    synchronize(device)
    return 1e6 * busy / calls


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleave(
    calls: dict[str, Call],
    timer: Timer,
    *,
    least: int,
    most: int,
    seconds: float,
    clock: Clock = time.monotonic,
    times: dict[str, list[float]] | None = None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time all calls one after another, round after round.

    Every other round goes backwards, so that no call always follows the same neighbour.

    Args:
        calls: what to time, by name.
        least, most: number of rounds.
        seconds: after these no round begins, once there are `least` rounds.
        times: an empty dictionary for the times, which an interrupt then leaves to the caller.

    Returns:
        Milliseconds of every round, and the errors of calls that raised, which have no times.
    """
    times = {} if times is None else times
    times.update((name, []) for name in calls)
    failed: dict[str, str] = {}
    start = clock()
    for number in range(most):
        if number >= least and clock() - start > seconds:
            break
        names = list(times) if number % 2 == 0 else list(reversed(times))
        for name in names:
            try:
                times[name].append(timer.milliseconds(calls[name]))
            except Exception as error:
                failed[name] = describe(error)
                del times[name]
    return times, failed


def describe(error: Exception) -> str:
    """An exception in one line, with the notes on it."""
    texts = [str(error), *getattr(error, "__notes__", [])]
    lines = [text.strip().splitlines()[0] for text in texts if text.strip()]
    return f"{type(error).__name__}: {'; '.join(lines)}" if lines else type(error).__name__


@dataclass(frozen=True)
class Spread:
    """Median and the range from the 10th to the 90th percentile of some times."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return Spread(statistics.median(values), tenths[0], tenths[-1])


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios round by round: a drift of clocks does not change it."""
    return statistics.median(a / b for a, b in zip(above, below, strict=False))
