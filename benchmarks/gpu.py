"""Time of block-sparse attention on a GPU against dense attention and other sparse kernels.

    python benchmarks/gpu.py --output benchmarks/

writes gpu.json and gpu.md, anew after every group of measurements; an interrupt keeps what is
done. How the figures are made:

- A group is one shape in one direction: dense attention, this package and the others at all
  densities are timed one after another, round after round, so that their ratios come from the same
  seconds. `ms` is the median of the rounds, by CUDA events; ratios are medians of the ratios of the
  rounds. Groups follow each other by importance until the minutes are spent, and what was left out
  is listed.
- Inputs are random, in several sets used in turn, and a buffer larger than the L2 cache is written
  before every call.
- TFLOP/s are effective: 4 * heads * pairs * head_dim forward and 2.5 times that backward, where
  pairs are the token pairs that attend. Backward is the backward pass alone.
- "block-aligned" masks have full blocks only: every block sees the nearest ones in space and time.
  "token-exact" ones are 3-D windows over single tokens in tile order. The density of both is the
  fraction of blocks visited; "attended" is the fraction of token pairs, which for token-exact
  windows is much less, because their edges cut blocks.
- Errors are |got - truth| / |truth| against float64 for some queries, of the output or the worst of
  the three gradients. Mask-building time is that of this benchmark's masks: the second of two
  builds, search for the window not counted.
- "permute" puts q, k and v into tile order and the output back.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from gpu_candidates import VARIANTS
from gpu_measure import LEAST_ROUNDS, Run, measure_group, run_groups
from gpu_report import LeftOut, Results, summary_table, verdicts, write
from gpu_shapes import BACKWARD, DENSITIES, FORWARD, SHAPES, TINY_SHAPES, groups
from gpu_timing import Budget, DeviceTimer, HostTimer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PACKAGES = ("torch", "triton", "flashinfer-python", "fastvideo-kernel", "natten")


def environment(device: torch.device, args: argparse.Namespace) -> dict[str, object]:
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    changed = output([*git, "status", "--porcelain", "diffattn", "kernels"]).splitlines()
    info: dict[str, object] = {
        "revision": args.revision or output([*git, "rev-parse", "HEAD"]) or "unknown",
        "changed files": ", ".join(line.split()[-1] for line in changed) or "none known",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        **versions(),
        "dtype": args.dtype,
        "minutes": args.minutes,
        "device": platform.machine(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "L2 MiB": properties.L2_cache_size / 2**20,
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
            "cudnn": torch.backends.cudnn.version(),
            "state before": gpu_state(),
        }
    return info


def versions() -> dict[str, str]:
    """Of the packages that take part and are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def gpu_state() -> str:
    """Clocks, power and temperature, only read."""
    fields = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"
    values = output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])
    if not values:
        return "nvidia-smi does not answer"
    pairs = zip(fields.split(","), values.splitlines()[0].split(","), strict=False)
    return ", ".join(f"{key} {value.strip()}" for key, value in pairs)


def output(command: list[str]) -> str:
    """What a command prints; empty if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def density(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop, set-up included")
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES])
    parser.add_argument("--directions", nargs="+", choices=[FORWARD, BACKWARD])
    parser.add_argument("--densities", type=density, nargs="+", default=list(DENSITIES))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=[],
        help="forward kernels to measure beside the one that is chosen by itself",
    )  # fmt: skip
    parser.add_argument(
        "--sweep", action="store_true",
        help="measure many tile sizes of our kernels instead of others' kernels",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="at most so many")
    parser.add_argument(
        "--group-seconds", type=float, default=15.0,
        help=f"for the rounds of a group, beyond the first {LEAST_ROUNDS}",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true",
        help="the whole program with tiny shapes on the CPU: checks it, measures no GPU",
    )  # fmt: skip
    parser.add_argument("--revision", help="to write down where there is no git repository")
    parser.add_argument("--output", type=Path, help="folder for gpu.json and gpu.md")
    return parser.parse_args(arguments)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py needs a GPU that torch can use (CUDA or ROCm), and there is none;"
            " --dry-run tries the program on the CPU",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cpu" if args.dry_run else f"cuda:{torch.cuda.current_device()}")
    title, stem = "Block-sparse attention on a GPU", "gpu"
    shapes = [shape for shape in SHAPES if not args.shapes or shape.name in args.shapes]
    if args.dry_run:
        title = "Dry run of benchmarks/gpu.py on the CPU: these figures say nothing about any GPU"
        stem, shapes = "gpu-dry-run", list(TINY_SHAPES)
        args.dtype, args.variants, args.sweep, args.rounds = "fp32", [], False, LEAST_ROUNDS
    todo = [g for g in groups(shapes) if g.direction in (args.directions or (FORWARD, BACKWARD))]
    results = Results(
        info={"title": title, **environment(device, args)},
        planned=[(g.shape.name, g.direction, g.shape.head_dim) for g in todo],
        densities=tuple(args.densities),
    )
    run = Run(
        device=device,
        dtype=DTYPES[args.dtype],
        timer=HostTimer() if args.dry_run else DeviceTimer(device),
        budget=Budget(args.minutes),
        results=results,
        densities=results.densities,
        variants=args.variants,
        sweep=args.sweep,
        rounds=args.rounds,
        group_seconds=args.group_seconds,
    )
    about = (__doc__ or "").split("How the figures are made:")[1]

    def save() -> None:
        results.info["seconds"] = round(run.budget.spent)
        if device.type == "cuda":
            results.info["state after"] = gpu_state()
        if args.output:
            write(args.output, stem, title, about, results)
        print(f"{run.budget.spent:.0f} s: {len(results.rows)} rows", flush=True)

    # A time limit ends a process with SIGTERM: keep what is done then, too.
    signal.signal(signal.SIGTERM, interrupt)
    status = 0
    try:
        run_groups(todo, run, measure_group, save)
    except KeyboardInterrupt:
        results.info["interrupted"] = f"after {run.budget.spent:.0f} s"
        settled = {f"{row.shape} {row.direction}" for row in results.rows}
        settled |= {x.what for x in results.left_out}
        results.left_out += [
            LeftOut(group.name, "interrupted") for group in todo if group.name not in settled
        ]
        save()
        status = 130
    print(title, summary_table(results.rows), *verdicts(results), sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
