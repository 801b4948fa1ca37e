"""The command line: `run` on the machine with the GPU, `report` there or anywhere."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_run import clocks, import_folder, report, table
from gpu_run.journal import end_last_line, read
from gpu_run.parent import Run, noting_signals, run_stages
from gpu_run.stages import Stage, dry_stages, real_stages

ROOT = import_folder.ROOT
# In the checkout, and ignored by git: stays on a GPU machine between two commands.
KEPT = ROOT / "gpu-run"
RESULTS, TUNED = "results.jsonl", "tuned.json"
INTERRUPTED_STATUS = 130
NO_GPU_STATUS = 2


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    if args.command == "report":
        return _report(args.folder, args.to, args.name)
    return _run(args)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_run", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, on a machine with a GPU")
    run.add_argument("--minutes", type=_minutes, default=8.0, help="when everything ends")
    run.add_argument(
        "--continue", dest="earlier", type=Path, nargs="?", const=KEPT, metavar="FOLDER",
        help="skip what an earlier run's rows settle (default: those in gpu-run/)",
    )  # fmt: skip
    run.add_argument(
        "--out", type=Path,
        help="folder for the rows, the tuned table and the page (default: $OUT, or gpu-run/; of a"
        " dry run gpu-run/dry/)",
    )  # fmt: skip
    run.add_argument(
        "--only", nargs="+", metavar="PATTERN", default=["*"], help="stages to run, as 'tune:*'"
    )
    run.add_argument(
        "--again", nargs="+", metavar="PATTERN", default=[],
        help="stages to run even if earlier rows settle them",
    )  # fmt: skip
    run.add_argument(
        "--dry-run", action="store_true",
        help="the whole program on a CPU in Triton's interpreter: measures no GPU",
    )  # fmt: skip
    run.add_argument("--revision", help="to write down where there is no git repository")
    page = commands.add_parser("report", help="make the page from a run's rows, cut off or not")
    page.add_argument("folder", type=Path, help="the folder of the run")
    page.add_argument("--to", type=Path, default=ROOT / "benchmarks", help="where to")
    page.add_argument("--name", default="gpu", help="of the two files")
    return parser.parse_args(arguments)


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _report(folder: Path, to: Path, name: str) -> int:
    if not (folder / RESULTS).exists():
        print(f"{folder} has no {RESULTS}: it is no folder of a run", file=sys.stderr)
        return 2
    print("\n".join(report.write(folder / RESULTS, to, name)))
    return 0


def _run(args: argparse.Namespace) -> int:
    gpu = clocks.asked("name")
    if not args.dry_run and not gpu:
        print(
            "gpu_run needs an NVIDIA GPU, and nvidia-smi names none; --dry-run tries the program on"
            " a CPU",
            file=sys.stderr,
        )
        return NO_GPU_STATUS
    stages = [
        stage
        for stage in (dry_stages(ROOT) if args.dry_run else real_stages(ROOT))
        if any(fnmatch.fnmatch(stage.name, pattern) for pattern in args.only)
    ]
    if not stages:
        print(f"no stage is called {' or '.join(args.only)}", file=sys.stderr)
        return 2
    out = args.out or _default_out(args.dry_run)
    out.mkdir(parents=True, exist_ok=True)
    machine = platform.machine() if args.dry_run else gpu
    _take_over(args.earlier, out, machine)
    with tempfile.TemporaryDirectory() as scratch:
        site = import_folder.make(Path(scratch) / "site", ROOT)
        (Path(scratch) / "logs").mkdir()
        run = Run(
            folder=out,
            logs=Path(scratch) / "logs",
            sources=import_folder.sources_of(ROOT),
            minutes=args.minutes,
            environment=lambda stage: _environment(stage, site, out, args.dry_run),
            after_stage=lambda: _keep(out, args.dry_run),
        )
        run.journal("run").add(
            "run",
            revision=args.revision or _revision(),
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            minutes=args.minutes,
            gpu=machine,
            dry=args.dry_run,
            continued=args.earlier is not None,
            state=clocks.asked(clocks.FIELDS),
        )
        for stage in stages:
            if any(fnmatch.fnmatch(stage.name, pattern) for pattern in args.again):
                run.journal(stage.name).forget()
        with noting_signals(run), clocks.recorded(out / "clocks.csv"):
            run_stages(stages, run)
    print("\n".join(report.write(out / RESULTS, out, "gpu-run")))
    if args.dry_run:
        print("This was a dry run on a CPU: its verdicts say nothing about any GPU")
    return INTERRUPTED_STATUS if run.stopped is not None else 0


def _default_out(dry: bool) -> Path:
    if dry:
        return KEPT / "dry"
    return Path(os.environ.get("OUT", KEPT))


def _take_over(earlier: Path | None, out: Path, machine: str) -> None:
    """Go on from the rows and the tuned table of an earlier run, or begin anew.

    Raises:
        SystemExit: if there are no such rows, or if they are of another machine.
    """
    if earlier is None:
        for name in (RESULTS, TUNED, "clocks.csv", "log.txt"):
            if (out / name).exists():
                (out / name).replace(out / f"before-{name}")
        return
    if not (earlier / RESULTS).exists():
        raise SystemExit(f"--continue: {earlier} has no {RESULTS}")
    before = {row["gpu"] for row in read(earlier / RESULTS) if row["kind"] == "run"}
    if before != {machine}:
        raise SystemExit(
            f"--continue: the rows of {earlier} are of {' and '.join(sorted(before)) or 'nothing'},"
            f" but this is {machine}: their times do not compare; leave --continue out"
        )
    if earlier.resolve() != out.resolve():
        for name in (RESULTS, TUNED):
            if (earlier / name).exists():
                shutil.copyfile(earlier / name, out / name)
    end_last_line(out / RESULTS)


def _environment(stage: Stage, site: Path, out: Path, dry: bool) -> dict[str, str]:
    environment = dict(os.environ)
    environment["PYTHONPATH"] = str(site)
    environment["TRITON_CACHE_DIR"] = str(KEPT / "triton-cache")
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(KEPT / "inductor-cache")
    if dry:
        environment["GPU_RUN_DRY"] = "1"
    # Later stages run the choices that were tuned so far; tests choose for themselves.
    if (out / TUNED).exists() and stage.waits:
        environment["DIFFATTN_TUNED_TABLE"] = str(out / TUNED)
    return environment


def _keep(out: Path, dry: bool) -> None:
    """Make the tuned table of the rows so far, and keep the rows and the table for a next run."""
    text = table.tuned_table(read(out / RESULTS))
    if text is not None:
        (out / TUNED).write_text(text)
    if out.resolve() != KEPT and not dry:
        KEPT.mkdir(exist_ok=True)
        for name in (RESULTS, TUNED):
            if (out / name).exists():
                shutil.copyfile(out / name, KEPT / name)


def _revision() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        done = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if done.returncode != 0:
        return "unknown"
    return done.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
