"""What becomes of a run whose stages hang, abort and fail, or which is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_run
import pytest
from gpu_run.command import _take_over
from gpu_run.import_folder import ROOT, make, sources_of
from gpu_run.journal import Journal, end_last_line, latest, read, that_count
from gpu_run.parent import (
    INTERRUPTED,
    NO_TIME,
    SETTLED,
    TIME_OUT,
    Run,
    is_settled,
    noting_signals,
    run_stages,
)
from gpu_run.stages import Stage

FOLDER = Path(gpu_run.__file__).parent
ROW = "from gpu_run.journal import Journal; Journal.of_environment().add('found', x=1);"
SLEEP = "import time; time.sleep(1000);"
# Starts a process of its own, which leaves its id behind and ends with nobody.
GRANDCHILD = (
    "import subprocess, sys, os, pathlib;"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']);"
    "pathlib.Path(os.environ['PIDS']).open('a').write(f'{os.getpid()} {p.pid} ');"
)


def stage(name: str, code: str, **more: Any) -> Stage:
    facts = {"limit": 20.0, "least": 0.0} | more
    return Stage(name, command=(sys.executable, "-S", "-c", code), **facts)


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    return tmp_path / "pids"


@pytest.fixture
def run(tmp_path: Path, pids: Path) -> Run:
    return a_run(tmp_path, pids)


def a_run(tmp_path: Path, pids: Path, minutes: float = 1.0, sources: str = "abc") -> Run:
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "PIDS": str(pids)}
    # This process may be a worker of pytest-xdist; that of a stage is none.
    environment.pop("PYTEST_XDIST_WORKER", None)
    (tmp_path / "logs").mkdir(exist_ok=True)
    return Run(tmp_path, tmp_path / "logs", sources, minutes, lambda stage: dict(environment))


def outcomes(run: Run) -> dict[str, int | str]:
    rows = read(run.folder / "results.jsonl")
    return {row["stage"]: row["rc"] for row in rows if row["kind"] == "stage"}


def found(run: Run) -> list[str]:
    """The stages whose own rows are there."""
    rows = read(run.folder / "results.jsonl")
    return [row["stage"] for row in rows if row["kind"] == "found"]


def assert_all_gone(pids: Path) -> None:
    for pid in map(int, pids.read_text().split()):
        # A killed orphan may take its time to be reaped by init.
        wait_for(lambda pid=pid: not is_alive(pid))


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.02)


def test_rows_of_every_stage_are_kept_and_its_output_is_in_the_log(run: Run) -> None:
    run_stages([stage("a", ROW + "print('hello')"), stage("b", ROW)], run)
    assert outcomes(run) == {"a": 0, "b": 0}
    assert found(run) == ["a", "b"]
    assert "==== a: 0\nhello\n" in (run.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    "stubborn", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"]
)
def test_a_stage_that_hangs_is_killed_with_all_it_started(
    stubborn: str, run: Run, pids: Path
) -> None:
    hangs = stage("hangs", stubborn + ROW + GRANDCHILD + SLEEP, limit=1.0)
    start = time.monotonic()
    run_stages([hangs, stage("after", ROW)], run)
    assert time.monotonic() - start < 15
    assert outcomes(run) == {"hangs": TIME_OUT, "after": 0}
    assert found(run) == ["hangs", "after"]
    assert len(pids.read_text().split()) == 2
    assert_all_gone(pids)


def test_what_a_stage_leaves_running_is_killed_when_it_ends(run: Run, pids: Path) -> None:
    run_stages([stage("leaves", GRANDCHILD)], run)
    assert outcomes(run) == {"leaves": 0}
    assert_all_gone(pids)


def test_a_stage_that_aborts(run: Run) -> None:
    run_stages([stage("aborts", ROW + "import os; os.abort()"), stage("after", ROW)], run)
    assert outcomes(run) == {"aborts": -signal.SIGABRT, "after": 0}
    assert found(run) == ["aborts", "after"]


def test_a_stage_that_fails_to_compile_says_why(run: Run) -> None:
    fails = stage("fails", ROW + "raise RuntimeError('PassManager::run failed')")
    run_stages([fails, stage("after", ROW)], run)
    assert outcomes(run) == {"fails": 1, "after": 0}
    assert found(run) == ["fails", "after"]
    row = next(r for r in read(run.folder / "results.jsonl") if r.get("rc") == 1)
    assert row["tail"].endswith("RuntimeError: PassManager::run failed\n")


def test_a_stage_that_cannot_be_started(run: Run) -> None:
    run_stages([Stage("none", 1, 0, command=("/no/such/program",)), stage("after", ROW)], run)
    assert outcomes(run) == {"none": "not started", "after": 0}


def test_stages_side_by_side_run_at_once_and_end_apart(run: Run, pids: Path) -> None:
    meet = (
        "import os, pathlib, time; f = pathlib.Path(os.environ['PIDS']);"
        "f.open('a').write('x');\n"
        "while len(f.read_text()) < 3: time.sleep(.01)\n"
    )
    beside = [stage(f"together:{i}", meet + ROW, beside="together") for i in range(2)]
    hangs = stage("together:2", meet + SLEEP, beside="together", limit=1.5)
    run_stages([*beside, hangs, stage("after", ROW)], run)
    assert outcomes(run) == {"together:0": 0, "together:1": 0, "together:2": TIME_OUT, "after": 0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_rows_and_leaves_no_process(
    number: int, tmp_path: Path, pids: Path
) -> None:
    stages = [stage("first", ROW), stage("hangs", ROW + GRANDCHILD + SLEEP), stage("after", ROW)]
    program = (
        "from pathlib import Path; import os, sys; from gpu_run.parent import *\n"
        "from gpu_run.stages import Stage\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "run = Run(folder, folder / 'logs', 'abc', 1.0)\n"
        f"with noting_signals(run): run_stages({stages!r}, run)\n"
        "sys.exit(130 if run.stopped else 0)\n"
    )
    (tmp_path / "logs").mkdir()
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "PIDS": str(pids)}
    # This process may be a worker of pytest-xdist; that of a stage is none.
    environment.pop("PYTEST_XDIST_WORKER", None)
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    try:
        wait_for(pids.exists)
        wait_for(lambda: len(pids.read_text().split()) == 2)
        parent.send_signal(number)
        assert parent.wait(20) == 130
    finally:
        parent.kill()
    run = a_run(tmp_path, pids)
    assert outcomes(run) == {"first": 0, "hangs": INTERRUPTED, "after": INTERRUPTED}
    assert found(run) == ["first", "hangs"]
    assert_all_gone(pids)


def test_handlers_of_signals_are_put_back(run: Run) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with noting_signals(run):
        os.kill(os.getpid(), signal.SIGTERM)
        run_stages([stage("a", ROW)], run)
    assert outcomes(run) == {"a": INTERRUPTED}
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_stages_that_do_not_fit_are_not_begun(tmp_path: Path, pids: Path) -> None:
    run = a_run(tmp_path, pids, minutes=0.5)
    run_stages([stage("long", ROW, least=40.0), stage("short", ROW)], run)
    assert outcomes(run) == {"long": NO_TIME, "short": 0}


def test_the_end_of_the_minutes_ends_the_stage_that_runs(tmp_path: Path, pids: Path) -> None:
    run = a_run(tmp_path, pids, minutes=0.02)
    run_stages([stage("hangs", ROW + SLEEP), stage("after", ROW)], run)
    assert outcomes(run) == {"hangs": NO_TIME, "after": 0 if run.left > 0 else NO_TIME}


def test_a_stage_is_told_how_long_it_may_take(run: Run) -> None:
    code = "import os; print(os.environ['GPU_RUN_SECONDS'])"
    run_stages([stage("a", code, limit=12.5)], run)
    assert "==== a: 0\n12.5\n" in (run.folder / "log.txt").read_text()


# ---------------------------------------------------------------- stages that wait

NOTE = "import os, pathlib; pathlib.Path(os.environ['PIDS']).open('a').write({!r});"
TURN = "import sys, json; os.environ.update(json.loads(sys.stdin.readline()));"


def test_the_next_stage_is_made_meanwhile_and_waits_for_its_turn(run: Run, pids: Path) -> None:
    first = (
        NOTE.format("first ") + "import time\n"
        "while 'ready' not in pathlib.Path(os.environ['PIDS']).read_text(): time.sleep(.01)\n"
        "time.sleep(.2)\n" + NOTE.format("done ") + ROW
    )
    second = NOTE.format("ready ") + TURN + NOTE.format("turn ") + ROW
    run_stages([stage("first", first), stage("second", second, waits=True)], run)
    assert outcomes(run) == {"first": 0, "second": 0}
    notes = pids.read_text().split()
    assert set(notes[:2]) == {"first", "ready"}
    assert notes[2:] == ["done", "turn"]


def test_no_other_stage_is_made_while_a_stage_is_alone(run: Run, pids: Path) -> None:
    first = "import time; time.sleep(1);" + NOTE.format("done ") + ROW
    second = NOTE.format("ready ") + TURN + NOTE.format("turn ") + ROW
    run_stages([stage("first", first, alone=True), stage("second", second, waits=True)], run)
    assert outcomes(run) == {"first": 0, "second": 0}
    assert pids.read_text().split() == ["done", "ready", "turn"]


def test_a_stage_that_waits_has_its_limit_from_its_turn_on_and_hears_what_is_new(
    run: Run, pids: Path
) -> None:
    environment = run.environment
    run.environment = lambda stage: environment(stage) | {"TUNED": str(pids.exists())}
    first = "import time; time.sleep(1.5);" + NOTE.format("x")
    second = "import os, time;" + TURN + "print(os.environ['TUNED'], os.environ['GPU_RUN_SECONDS'])"
    run_stages([stage("first", first), stage("second", second, waits=True, limit=1.0)], run)
    assert outcomes(run) == {"first": 0, "second": 0}
    assert "==== second: 0\nTrue 1.0\n" in (run.folder / "log.txt").read_text()


def test_a_stage_that_waits_is_killed_when_its_turn_does_not_come(
    tmp_path: Path, pids: Path
) -> None:
    run = a_run(tmp_path, pids, minutes=0.5)
    waits = stage("waits", GRANDCHILD + TURN + ROW, waits=True, least=29.9)
    first = "import os, pathlib, time\nwhile not pathlib.Path(os.environ['PIDS']).exists(): pass\n"
    run_stages([stage("first", first + "time.sleep(.3)"), waits], run)
    assert outcomes(run) == {"first": 0, "waits": NO_TIME}
    assert found(run) == []
    assert len(pids.read_text().split()) == 2
    assert_all_gone(pids)


def test_a_stage_that_ends_before_its_turn_says_why(run: Run) -> None:
    first = stage("first", "import time; time.sleep(1)")
    broken = stage("broken", "raise ImportError('no torch')", waits=True)
    run_stages([first, broken, stage("after", ROW)], run)
    assert outcomes(run) == {"first": 0, "broken": 1, "after": 0}
    assert "ImportError: no torch" in (run.folder / "log.txt").read_text()


def test_stages_that_are_settled_are_not_made(tmp_path: Path, pids: Path) -> None:
    b = stage("b", "import os;" + TURN + ROW, waits=True)
    stages = [stage("a", "import time; time.sleep(.5)"), b]
    run_stages(stages, a_run(tmp_path, pids))
    again = a_run(tmp_path, pids)
    again.journal("a").forget()
    run_stages(stages, again)
    assert outcomes(again) == {"a": 0, "b": SETTLED}
    assert found(again) == ["b"]


# ---------------------------------------------------------------- going on


def test_what_earlier_rows_settle_is_skipped(tmp_path: Path, pids: Path) -> None:
    stages = [stage("good", ROW), stage("bad", ROW + "raise SystemExit(3)")]
    run_stages(stages, a_run(tmp_path, pids))
    again = a_run(tmp_path, pids)
    run_stages(stages, again)
    assert outcomes(again) == {"good": SETTLED, "bad": 3}
    assert found(again) == ["good", "bad", "bad"]


def test_other_kernels_unsettle_what_ran_them(tmp_path: Path, pids: Path) -> None:
    stages = [stage("rates", ROW), stage("yardstick", ROW, outlives_edits=True)]
    run_stages(stages, a_run(tmp_path, pids))
    again = a_run(tmp_path, pids, sources="def")
    run_stages(stages, again)
    assert outcomes(again) == {"rates": 0, "yardstick": SETTLED}


def test_what_is_to_run_again_runs_again(tmp_path: Path, pids: Path) -> None:
    stages = [stage("a", ROW), stage("b", ROW)]
    first = a_run(tmp_path, pids)
    run_stages(stages, first)
    first.journal("a").forget()
    again = a_run(tmp_path, pids)
    run_stages(stages, again)
    assert found(again) == ["a", "b", "a"]
    assert is_settled(stages[0], read(tmp_path / "results.jsonl"), "abc")


def test_units_are_finished_for_the_same_kernels_only(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    journal = Journal(path, "rates", "abc")
    assert not journal.is_finished("forward")
    journal.finish("forward")
    assert journal.is_finished("forward")
    assert not journal.is_finished("backward")
    assert not Journal(path, "flex", "abc").is_finished("forward")
    assert not Journal(path, "rates", "def").is_finished("forward")
    journal.forget()
    assert not journal.is_finished("forward")
    assert len(that_count(journal.rows(), "rates")) == 0


# ---------------------------------------------------------------- rows


def test_a_row_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    journal = Journal(path, "a", "abc")
    journal.add("found", x=1)
    with path.open("a") as file:
        file.write('{"stage": "a", "kind": "fou')
    assert [row["x"] for row in read(path)] == [1]
    end_last_line(path)
    journal.add("found", x=2)
    assert [row["x"] for row in read(path)] == [1, 2]


def test_rows_of_many_processes_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER.parent)!r}); from pathlib import Path\n"
        "from gpu_run.journal import Journal\n"
        f"journal = Journal(Path({str(path)!r}), sys.argv[1], 'abc')\n"
        "for i in range(50): journal.add('found', i=i, filling='x' * 5000)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-S", "-c", code, str(n)]) for n in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(path.read_text().splitlines()) == 150
    assert len(read(path)) == 150


def test_the_last_of_equal_rows_counts() -> None:
    rows = [
        {"kernel": "a", "tiles": {"m": 1}, "ms": 1}, {"kernel": "b", "tiles": {"m": 1}, "ms": 2},
        {"kernel": "a", "tiles": {"m": 2}, "ms": 3}, {"kernel": "a", "tiles": {"m": 1}, "ms": 4},
    ]  # fmt: skip
    assert [row["ms"] for row in latest(rows, "kernel", "tiles")] == [4, 2, 3]


# ---------------------------------------------------------------- the folder to import from


def test_a_bare_checkout_can_be_imported_through_the_links(tmp_path: Path) -> None:
    site = make(tmp_path / "site", ROOT)
    code = (
        "import diffattn, diffattn.kernels.common.tuned, diffattn.lora, gpu_run.worker;"
        "print(diffattn.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": str(site)}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "diffattn" / "__init__.py")


def test_sources_are_those_of_the_kernels_and_not_of_tables(tmp_path: Path) -> None:
    for name, text in (("kernels/a.py", "1"), ("diffattn/b.py", "2"), ("lora/c.py", "3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = sources_of(tmp_path)
    (tmp_path / "kernels" / "table.json").write_text("{}")
    (tmp_path / "lora" / "c.py").write_text("4")
    assert sources_of(tmp_path) == before
    (tmp_path / "kernels" / "a.py").write_text("5")
    assert sources_of(tmp_path) != before


# ---------------------------------------------------------------- the command


def test_an_interrupted_program_leaves_rows_a_page_and_no_process(tmp_path: Path) -> None:
    options = ("--dry-run", "--only", "compile:*", "building:*", "--out", str(tmp_path))
    program = subprocess.Popen(
        [sys.executable, FOLDER, "run", *options], stdout=subprocess.PIPE, text=True
    )
    rows = tmp_path / "results.jsonl"
    try:
        wait_for(lambda: any(row["kind"] == "facts" for row in read(rows)), 60)
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        assert len(children) >= 2  # the stage, and the one that waits for its turn
        program.send_signal(signal.SIGTERM)
        out, _ = program.communicate(timeout=30)
    finally:
        program.kill()
    assert program.returncode == 130
    assert "not measured: forward" in out
    ended = {row["stage"]: row["rc"] for row in read(rows) if row["kind"] == "stage"}
    assert ended == {"compile:0/1": INTERRUPTED, "building:hunyuan-720p": INTERRUPTED}
    assert (tmp_path / "gpu-run.md").exists()
    wait_for(lambda: not any(is_alive(int(pid)) for pid in children))


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FOLDER, *arguments],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


def test_the_parent_needs_no_torch() -> None:
    code = "import sys; import gpu_run.command; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "False\n", done.stderr


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = command("run", PATH="/nowhere")
    assert done.returncode == 2
    assert done.stderr == (
        "gpu_run needs an NVIDIA GPU, and nvidia-smi names none; --dry-run tries the program on a"
        " CPU\n"
    )


def test_stages_that_nobody_knows(tmp_path: Path) -> None:
    done = command("run", "--dry-run", "--only", "sideways", "--out", str(tmp_path))
    assert (done.returncode, done.stderr) == (2, "no stage is called sideways\n")


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_that_are_none(minutes: str) -> None:
    done = command("run", f"--minutes={minutes}")
    assert done.returncode == 2
    assert f"{minutes} is not above 0" in done.stderr


def test_there_is_nothing_to_continue(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = command("run", "--dry-run", "--continue", str(tmp_path), "--out", out)
    assert done.returncode == 1
    assert done.stderr == f"--continue: {tmp_path} has no results.jsonl\n"


def test_rows_of_another_machine_are_not_continued(tmp_path: Path) -> None:
    Journal(tmp_path / "results.jsonl", "run", "abc").add("run", gpu="NVIDIA H200")
    out = str(tmp_path / "out")
    done = command("run", "--dry-run", "--continue", str(tmp_path), "--out", out)
    assert done.returncode == 1
    assert "are of NVIDIA H200, but this is" in done.stderr


def test_a_report_of_no_run(tmp_path: Path) -> None:
    done = command("report", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path} has no results.jsonl: it is no folder of a run\n"


def test_a_dry_run_of_one_stage_goes_on_where_another_ended(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    arguments = ("run", "--dry-run", "--minutes", "3", "--only", "building:*", "--out", out)
    done = command(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not measured: forward" in done.stdout
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"results.jsonl", "log.txt", "clocks.csv", "gpu-run.json", "gpu-run.md"}
    page = (tmp_path / "out" / "gpu-run.md").read_text()
    assert "A dry run on a CPU" in page
    assert "| hunyuan-720p | gna |" in page
    done = command(*arguments, "--continue", out)
    assert "settled before" in done.stdout
    rows = read(tmp_path / "out" / "results.jsonl")
    assert [row["rc"] for row in rows if row["kind"] == "stage"] == [0, SETTLED]
    record = json.loads((tmp_path / "out" / "gpu-run.json").read_text())
    assert [one["continued"] for one in record["runs"]] == [False, True]


def test_a_new_run_begins_anew_and_keeps_what_was_there(tmp_path: Path) -> None:
    Journal(tmp_path / "results.jsonl", "run", "abc").add("run", gpu="NVIDIA H100")
    (tmp_path / "tuned.json").write_text("{}")
    _take_over(None, tmp_path, "NVIDIA H100")
    assert {path.name for path in tmp_path.iterdir()} == {
        "before-results.jsonl", "before-tuned.json",
    }  # fmt: skip


def test_going_on_takes_rows_and_table_along_to_another_folder(tmp_path: Path) -> None:
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    earlier.mkdir()
    out.mkdir()
    Journal(earlier / "results.jsonl", "run", "abc").add("run", gpu="NVIDIA H100")
    with (earlier / "results.jsonl").open("a") as file:
        file.write('{"cut')
    (earlier / "tuned.json").write_text("{}")
    _take_over(earlier, out, "NVIDIA H100")
    Journal(out / "results.jsonl", "run", "abc").add("run", gpu="NVIDIA H100")
    assert len(read(out / "results.jsonl")) == 2
    assert (out / "tuned.json").read_text() == "{}"


def test_a_plugin_writes_a_row_for_every_test(run: Run, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'why'\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('gone')\n"
        "def test_worse(broken): pass\n"
    )
    (tmp_path / "test_none.py").write_text("import no_such_module\n")
    pytest_ = (sys.executable, "-P", "-m", "pytest", "-p", "gpu_run.pytest_rows", "-q")
    options = ("--rootdir", str(tmp_path), "-c", "/dev/null", "--continue-on-collection-errors")
    run_stages([Stage("tests", 60, 0, command=(*pytest_, *options, str(tmp_path)))], run)
    rows = [row for row in read(run.folder / "results.jsonl") if row["kind"] == "test"]
    ended = {row["test"].rpartition("::")[2]: row["outcome"] for row in rows}
    assert ended == {
        "test_none.py": "not collected", "test_good": "passed", "test_bad": "failed",
        "test_left_out": "skipped", "test_worse": "failed",
    }  # fmt: skip
    assert "why" in next(row["error"] for row in rows if row["test"].endswith("test_bad"))
