"""A training on the screen: loss, learning rate, pace, time left, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffattn.lora.trainer import StepReport

# Where there is no terminal to draw a bar on, this many lines a run say where it is.
_LINES_PER_RUN = 20
# Of the running mean of the loss and the pace that are shown.
_SMOOTHING = 0.9


@contextmanager
def shown(steps: int, made: int = 0) -> Iterator[Callable[[StepReport], None]]:
    """Show a training's steps, with a bar on a terminal and by lines elsewhere.

    Args:
        steps: of the whole run.
        made: of them before, when a run goes on.

    Yields:
        What to call with the report of each step.
    """
    from rich.console import Console

    smooth = _Smoothed()
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda report: _print_line(report, smooth)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=steps, completed=made, facts="")

        def show(report: StepReport) -> None:
            smooth.add(report)
            progress.update(task, completed=report.step, facts=smooth.facts(report))

        yield show


class _Smoothed:
    """Running means of what jumps from step to step."""

    def __init__(self) -> None:
        self.loss = self.seconds = 0.0
        self._weight = 0.0

    def add(self, report: StepReport) -> None:
        self._weight = _SMOOTHING * self._weight + 1 - _SMOOTHING
        share = (1 - _SMOOTHING) / self._weight
        self.loss += share * (report.losses["loss"] - self.loss)
        self.seconds += share * (report.seconds - self.seconds)

    def facts(self, report: StepReport) -> str:
        return (
            f"loss {self.loss:.4f}  lr {report.learning_rate:.2e}  {1 / self.seconds:.2f} it/s"
            f"  {report.memory / 2**30:.1f} GiB"
        )


def _print_line(report: StepReport, smooth: _Smoothed) -> None:
    smooth.add(report)
    every = max(1, report.steps // _LINES_PER_RUN)
    if report.step % every == 0 or report.step == report.steps:
        left = round((report.steps - report.step) * smooth.seconds)
        minutes, seconds = divmod(left, 60)
        print(
            f"step {report.step}/{report.steps}  {smooth.facts(report)}  {minutes}:{seconds:02d}"
            f" left",
            flush=True,
        )
