"""The display of a training: loss, learning rate, pace, time left, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffattn.lora.trainer import StepReport

# Number of lines in a run without a terminal, which has no bar.
_LINES_PER_RUN = 20
# Weight of the past in the running means of loss and pace.
_SMOOTHING = 0.9


@contextmanager
def shown(steps: int, made: int = 0) -> Iterator[Callable[[StepReport], None]]:
    """Show the steps of a training, by a bar on a terminal and by lines elsewhere.

    Args:
        steps: number of steps of the whole run.
        made: number of steps made before, in a resumed run.

    Yields:
        A function to call with the report of each step.
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
    """Running means of the loss and of the seconds per step."""

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
