"""How time is measured: interleaved rounds on a cold L2, by the device's clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch

_CPU = torch.device("cpu")

# By how much the host is ahead of the device when a call begins: at first, and at most.
HEAD_START_MS = 1.0
LONGEST_HEAD_START_MS = 16.0

Clock = Callable[[], float]
Call = Callable[[], object]


class Timer(Protocol):
    def milliseconds(self, call: Call) -> float: ...


class DeviceTimer:
    """Times of the device alone, by CUDA events.

    Before every call a buffer several times as large as the L2 cache is written. No input is then
    left in the cache, and the device is busy until the host has launched the call. Where the device
    came to the call too early, its time has gaps: the call is repeated with a longer head start,
    which is kept for this call. A call that waits for the device is never launched in time: its
    time contains the host's.
    """

    def __init__(self, device: torch.device) -> None:
        size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._scratch = torch.empty(size, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._fill_ms = min(self._timed(self._scratch.zero_)[0] for _ in range(5))
        self._head_starts: WeakKeyDictionary[Call, float] = WeakKeyDictionary()
        self._waiting: WeakSet[Call] = WeakSet()

    def milliseconds(self, call: Call) -> float:
        ms, in_time = self._behind_fills(call)
        while not in_time and call not in self._waiting:
            longer = 2 * self._head_starts.get(call, HEAD_START_MS)
            if longer > LONGEST_HEAD_START_MS:
                self._waiting.add(call)
                longer = HEAD_START_MS
            self._head_starts[call] = longer
            ms, in_time = self._behind_fills(call)
        return ms

    def _behind_fills(self, call: Call) -> tuple[float, bool]:
        head_start = self._head_starts.get(call, HEAD_START_MS)
        for _ in range(max(1, math.ceil(head_start / self._fill_ms))):
            self._scratch.zero_()
        return self._timed(call)

    def _timed(self, call: Call) -> tuple[float, bool]:
        """Milliseconds of a call; whether the host had launched all of it before it began."""
        self._start.record()
        call()
        self._end.record()
        in_time = not self._start.query()
        self._end.synchronize()
        return self._start.elapsed_time(self._end), in_time


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
