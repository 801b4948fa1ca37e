"""The denoising loop on the screen and on the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Without a terminal to draw a bar on, so many lines a run report the progress.
_LINES_PER_RUN = 4


def clock() -> float:
    """The time in seconds, once the accelerator has done all its work."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@dataclass
class LoopTimes:
    """The time in seconds that the denoising loop of a run took, and that each step took."""

    loop_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)


@contextmanager
def watched(pipe: DiffusionPipeline, *labels: str, shown: bool = True) -> Iterator[LoopTimes]:
    """Time the pipeline's denoising loops and show their progress.

    The pipeline's own progress bar is replaced while the block runs. In every pipeline the bar
    opens when a loop starts, moves once a step, and closes when the loop ends.

    Args:
        pipe: the pipeline.
        labels: names of the loops in turn; the last name is also that of all further loops.
        shown: whether progress is shown.
    """
    times = LoopTimes()
    names = iter(labels)
    with _display() if shown else nullcontext(_say_nothing) as show:

        def progress_bar(iterable: Any = None, total: int | None = None) -> Any:
            if total is None:
                return iterable
            return _Loop(times, total, partial(show, next(names, labels[-1])))

        pipe.progress_bar = progress_bar
        try:
            yield times
        finally:
            del pipe.progress_bar


class _Loop:
    """Stands in for the pipeline's progress bar."""

    def __init__(
        self, times: LoopTimes, total: int, show: Callable[[int, int, float], None]
    ) -> None:
        self._times = times
        self._total = total
        self._show = show

    def __enter__(self) -> _Loop:
        self._done = 0
        self._start = self._last = clock()
        self._show(0, self._total, 0.0)
        return self

    def update(self, steps: int = 1) -> None:
        now = clock()
        self._times.step_seconds.append((now - self._last) / steps)
        self._last = now
        self._done += 1
        self._show(self._done, self._total, self._times.step_seconds[-1])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._times.loop_seconds += clock() - self._start


@contextmanager
def _display() -> Iterator[Callable[[str, int, int, float], None]]:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_lines
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[step]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, step="")

        def show(label: str, done: int, total: int, seconds: float) -> None:
            step = f"{seconds:.2f} s/step" if done else ""
            progress.update(task, description=label, completed=done, total=total, step=step)

        yield show


def _say_nothing(label: str, done: int, total: int, seconds: float) -> None:
    """Show no progress."""


def _print_lines(label: str, done: int, total: int, seconds: float) -> None:
    every = max(1, total // _LINES_PER_RUN)
    if done and (done % every == 0 or done == total):
        print(f"{label}: step {done}/{total}, {seconds:.2f} s/step", flush=True)
