"""Runs the stages one after another, and outlives whatever happens to them, without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import FrameType

from gpu_run.import_folder import ROOT
from gpu_run.journal import Journal, Row, that_count
from gpu_run.stages import Stage

POLL_SECONDS = 0.05
# A killed process ends at once, unless the driver holds it.
SECONDS_TO_DIE = 10.0
# Environment variable of a stage's process: the seconds that it may take.
SECONDS_VARIABLE = "GPU_RUN_SECONDS"

TAIL = 600  # characters of a failed stage's output in its row
LOG_BYTES = 100_000  # of a stage's output in the log

TIME_OUT = "time-out"
INTERRUPTED = "interrupted"
NO_TIME = "no time"
SETTLED = "settled before"


@dataclass
class Run:
    """A run of some stages.

    Attributes:
        folder: where results.jsonl and log.txt go.
        logs: where the output of each stage goes while it runs.
        sources: digest of the kernels' source text, see `import_folder.sources_of`.
        minutes: after which everything ends.
        environment: the environment of a stage's process.
        after_stage: called when a stage, or a group of stages side by side, has ended.
        stopped: the signal that ended the run, if any.
    """

    folder: Path
    logs: Path
    sources: str
    minutes: float
    environment: Callable[[Stage], dict[str, str]] = lambda stage: dict(os.environ)
    after_stage: Callable[[], object] = lambda: None
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)
    stopped: int | None = None

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def left(self) -> float:
        """Seconds until the run ends."""
        return 60 * self.minutes - (self.clock() - self.started)

    def journal(self, stage: str) -> Journal:
        return Journal(self.folder / "results.jsonl", stage, self.sources)

    def report(self, stage: str, rc: int | str, **facts: object) -> None:
        row = self.journal(stage).add("stage", rc=rc, **facts)
        shown = {key: value for key, value in row.items() if key in ("rc", "seconds", "tail")}
        print(f"{60 * self.minutes - self.left:6.1f} s  {stage:<24} {shown}", flush=True)


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen[bytes]
    log: Path
    began: float = 0.0
    deadline: float = 0.0


def run_stages(stages: Iterable[Stage], run: Run) -> None:
    """Run the stages that are not settled, for as long as there is time, until a signal comes.

    Call this under `noting_signals`: then rows are kept, and no process is left.
    """
    earlier = run.journal("").rows()
    groups = [list(g) for _, g in groupby(stages, key=lambda stage: stage.beside or stage.name)]
    waiting: dict[str, _Running] = {}
    try:
        for number, group in enumerate(groups):
            due = [stage for stage in group if _is_due(stage, earlier, run)]
            if due:
                is_alone = any(stage.alone for stage in due)
                coming = None if is_alone else _next(groups[number + 1 :], earlier, run)
                _run_together(due, coming, waiting, run)
                run.after_stage()
    finally:
        for one in waiting.values():
            kill(one.process)


def _is_due(stage: Stage, earlier: list[Row], run: Run) -> bool:
    """Whether a stage is to be run; a row says why not."""
    if run.stopped is not None:
        run.report(stage.name, INTERRUPTED)
    elif is_settled(stage, earlier, run.sources):
        run.report(stage.name, SETTLED)
    elif run.left < stage.least:
        run.report(stage.name, NO_TIME, left=round(max(0.0, run.left), 1))
    else:
        return True
    return False


def _next(groups: list[list[Stage]], earlier: list[Row], run: Run) -> Stage | None:
    """The stage that comes next, if it can wait for its turn and none runs beside it."""
    for group in groups:
        todo = [stage for stage in group if not is_settled(stage, earlier, run.sources)]
        if todo:
            return todo[0] if len(todo) == 1 and todo[0].waits else None
    return None


def is_settled(stage: Stage, rows: list[Row], sources: str) -> bool:
    """Whether an earlier run ended the stage well, with kernels whose rows still count."""
    return any(
        row["kind"] == "stage"
        and row["rc"] == 0
        and (stage.outlives_edits or row["sources"] == sources)
        for row in that_count(rows, stage.name)
    )


@contextmanager
def noting_signals(run: Run) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run while the block runs, without an exception.

    The run looks for signals between its steps: no signal comes while a process is being started.
    """

    def note(number: int, frame: FrameType | None) -> None:
        run.stopped = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_together(
    stages: list[Stage], coming: Stage | None, waiting: dict[str, _Running], run: Run
) -> None:
    """Start all, wait for each until its limit, and kill what is left.

    Args:
        coming: a stage whose process is made meanwhile, up to where it waits for its turn.
        waiting: the stages whose processes have been made, by name.
    """
    running: list[_Running] = []
    try:
        for stage in stages:
            try:
                running.append(waiting.pop(stage.name, None) or _make(stage, run))
            except OSError as error:
                run.report(stage.name, "not started", tail=str(error))
        for one in running:
            _let_go(one, run)
        if coming is not None:
            with suppress(OSError):  # the error comes again, and is reported, when its turn comes
                waiting[coming.name] = _make(coming, run)
        while running:
            for one in list(running):
                rc: int | str | None = one.process.poll()
                if rc is None and run.stopped is not None:
                    rc = INTERRUPTED
                elif rc is None and run.left <= 0:
                    rc = NO_TIME
                elif rc is None and run.clock() > one.deadline:
                    rc = TIME_OUT
                if rc is not None:
                    running.remove(one)
                    _end(one, rc, run)
            time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            kill(one.process)


def _make(stage: Stage, run: Run) -> _Running:
    log = run.logs / f"{stage.name.replace(':', '-').replace('/', '-')}.log"
    environment = run.environment(stage) | run.journal(stage.name).environment()
    environment |= {SECONDS_VARIABLE: str(stage.limit), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        # A session of its own, so that all it starts can be killed with it.
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            stdin=subprocess.PIPE if stage.waits else subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return _Running(stage, process, log)


def _let_go(one: _Running, run: Run) -> None:
    """Begin a stage: a stage that waits is passed its environment as it is now."""
    one.began = run.clock()
    one.deadline = one.began + one.stage.limit
    if one.process.stdin is None:
        return
    changed = run.environment(one.stage)
    changed |= {SECONDS_VARIABLE: f"{min(one.stage.limit, run.left):.1f}"}
    with suppress(BrokenPipeError):  # the process has ended: its status says why
        one.process.stdin.write(json.dumps(changed).encode() + b"\n")
        one.process.stdin.close()


def _end(one: _Running, rc: int | str, run: Run) -> None:
    """Kill what is left of a stage, and record its outcome."""
    dies = kill(one.process)
    facts: dict[str, object] = {"seconds": round(run.clock() - one.began, 1)}
    if not dies:
        facts["alive"] = f"process {one.process.pid} does not die"
    text = one.log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
    if rc != 0:
        facts["tail"] = text[-TAIL:]
    with (run.folder / "log.txt").open("a") as file:
        file.write(f"==== {one.stage.name}: {rc}\n{text}\n")
    run.report(one.stage.name, rc, **facts)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Kill a process with all that it has started; the result says whether it ended.

    SIGKILL, because Python sees no other signal inside of a call that waits for a GPU.
    """
    with suppress(ProcessLookupError):  # the process left nothing behind
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    try:
        process.wait(SECONDS_TO_DIE)
    except subprocess.TimeoutExpired:
        return False
    return True
