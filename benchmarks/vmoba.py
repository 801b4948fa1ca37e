"""Time of VMoBA's parts against dense attention in the same run, at its paper's shapes.

    python benchmarks/vmoba.py --output benchmarks/

writes vmoba.json and vmoba.md (vmoba_gpu.json and vmoba_gpu.md on a GPU). How the figures are made:

- Every line is one layer's attention of one sample. "total" is the whole cost of a layer: q, k and
  v are put into the order of the blocks and the output is put back, blocks are selected, and the
  selected blocks are attended to. Dense is torch's scaled_dot_product_attention on the same
  tensors.
- Every repetition times dense attention and all settings one after another, so that other load on
  the machine falls on all of them. Times are the best of the repetitions; the first call of each
  setting is not counted. With `--clock cpu` times are CPU seconds of the process, of use with
  `--threads 1` on a machine that is busy with other work.
- Queries, keys and values are smooth random fields over the grid. Noise is added to the queries,
  with the standard deviation `--noise` in units of the field's. Queries and keys of real models are
  different, and the union is the smaller, the more neighbours agree.
- "ideal" is 1 / density. "union" is the share of the pairs that a kernel computes if it works on
  whole tiles: 128 queries, and the keys of each block that any query of the tile has selected.
- "fwd+bwd" is a forward pass and the gradients of q, k and v.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from diffattn import TokenGrid, VMoBAAttn
from diffattn.methods import Site
from diffattn.methods.vmoba.selection import select_blocks
from diffattn.selected.attention import selected_attention
from diffattn.selected.tiles import selected_pairs, union_pairs

SHAPES = {
    "6K": TokenGrid(4, 30, 52),
    "17K": TokenGrid(11, 30, 52),
    "33K": TokenGrid(21, 30, 52),
    "55K": TokenGrid(24, 36, 64),
    "76K": TokenGrid(21, 45, 80),
}
QUICK = ["6K"]
SETTINGS = {
    "training-free": VMoBAAttn(),
    "training": VMoBAAttn(preset="training"),
    "training, tiles of 128": VMoBAAttn(preset="training", granularity="tile"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Row:
    """One line of the table; times in ms, the best of the repetitions unless named median."""

    tokens: int
    dtype: str
    direction: str
    setting: str
    partition: str
    blocks: int
    density: float
    union: float
    dense_ms: float
    order_ms: float
    select_ms: float
    attention_ms: float
    total_ms: float
    dense_median_ms: float
    total_median_ms: float

    @property
    def speed_up(self) -> float:
        return self.dense_ms / self.total_ms


def smooth_inputs(
    grid: TokenGrid, heads: int, head_dim: int, noise: float, device: torch.device
) -> list[torch.Tensor]:
    """q, k and v: smooth fields over the grid of standard deviation 1, and noise on q."""
    torch.manual_seed(0)
    sizes = (grid.frames, grid.height, grid.width)
    fields = []
    for _ in range(3):
        coarse = torch.randn(1, heads * head_dim, *(max(2, size // 4) for size in sizes))
        field = F.interpolate(coarse.to(device), size=sizes, mode="trilinear", align_corners=True)
        # Torch's fused kernel for dense attention takes contiguous tensors only.
        field = field.flatten(2).transpose(1, 2).contiguous().unflatten(2, (heads, head_dim))
        fields.append(field / field.std())
    fields[0] = fields[0] + noise * torch.randn_like(fields[0])
    return fields


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def milliseconds(call: Callable[[], object], clock: str, device: torch.device) -> float:
    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return CLOCKS[clock]()

    start = now()
    call()
    return 1000 * (now() - start)


@dataclass(frozen=True)
class Parts:
    """The parts of one layer's attention, each as a call by itself, and the whole."""

    order: Callable[[], object]
    select: Callable[[], object]
    attention: Callable[[], object]
    total: Callable[[], object]


def parts_of(
    method: VMoBAAttn,
    grid: TokenGrid,
    layer: int,
    qkv: list[torch.Tensor],
    grad: torch.Tensor | None,
) -> tuple[Parts, torch.Tensor]:
    """The parts of a layer, and the bits of the selection.

    With `grad`, the gradient of the output, the calls compute the gradients of q, k and v too.
    """
    partition, rule = method.partition(grid, layer), method.rule(grid, layer)
    blocks = partition.key_blocks(qkv[0].device)
    inside = [partition.to_blocks(x).detach().requires_grad_(grad is not None) for x in qkv]
    bits = select_blocks(inside[0], inside[1], blocks, rule)
    site = Site("", layer, 3, grid)

    def order() -> None:
        moved = [partition.to_blocks(x) for x in qkv]
        partition.from_blocks(moved[0])

    def run(attend: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
        out = attend()
        if grad is not None:
            torch.autograd.grad(out, leaves, grad)

    return Parts(
        order=order,
        select=lambda: select_blocks(inside[0], inside[1], blocks, rule),
        attention=lambda: run(
            lambda: selected_attention(inside[0], inside[1], inside[2], blocks, bits), inside
        ),
        total=lambda: run(lambda: method.attend(qkv[0], qkv[1], qkv[2], site), qkv),
    ), bits


def measure(
    shape: str, dtype: str, direction: str, args: argparse.Namespace, device: torch.device
) -> Iterator[Row]:
    """All rows of one shape, dtype and direction; dense and the settings take turns."""
    grid = SHAPES[shape]
    inputs = smooth_inputs(grid, args.heads, args.head_dim, args.noise, device)
    qkv = [x.to(DTYPES[dtype]).requires_grad_(direction != "fwd") for x in inputs]
    grad = None if direction == "fwd" else torch.randn_like(qkv[0])

    def dense() -> None:
        out = dense_attention(*qkv)
        if grad is not None:
            torch.autograd.grad(out, qkv, grad)

    calls: dict[tuple[str, int, str], Callable[[], object]] = {("dense", 0, "total"): dense}
    selections = {}
    fitted = {name: SETTINGS[name].for_model("", grid) for name in args.settings}
    for name, method in fitted.items():
        for layer in range(3):
            parts, bits = parts_of(method, grid, layer, qkv, grad)
            selections[name, layer] = bits
            for part, call in vars(parts).items():
                calls[name, layer, part] = call
    times: dict[tuple[str, int, str], list[float]] = {name: [] for name in calls}
    for repetition in range(args.repeats + 1):
        for name, call in calls.items():
            taken = milliseconds(call, args.clock, device)
            if repetition:
                times[name].append(taken)
    best = {name: min(taken) for name, taken in times.items()}
    for (name, layer), bits in selections.items():
        method = fitted[name]
        blocks = method.partition(grid, layer).key_blocks(device)
        yield Row(
            tokens=grid.tokens,
            dtype=dtype,
            direction=direction,
            setting=name,
            partition=method.partitions[layer],
            blocks=blocks.blocks,
            density=float(selected_pairs(blocks, bits)),
            union=float(union_pairs(blocks, bits)),
            dense_ms=best["dense", 0, "total"],
            order_ms=best[name, layer, "order"],
            select_ms=best[name, layer, "select"],
            attention_ms=best[name, layer, "attention"],
            total_ms=best[name, layer, "total"],
            dense_median_ms=statistics.median(times["dense", 0, "total"]),
            total_median_ms=statistics.median(times[name, layer, "total"]),
        )


def environment(args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "revision": revision.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{device.type}, {name}",
        "threads": torch.get_num_threads(),
        "load average at start": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "heads": args.heads,
        "head_dim": args.head_dim,
        "noise": args.noise,
        "repeats": args.repeats,
        "clock": args.clock,
    }


HEADER = (
    "| tokens | dtype | direction | setting | partition | blocks | density | union"
    " | dense ms | order ms | select ms | attention ms | total ms | speed-up | ideal |\n|"
    + "---|"
    * 15
)


def line(row: Row) -> str:
    return (
        f"| {row.tokens} | {row.dtype} | {row.direction} | {row.setting} | {row.partition}"
        f" | {row.blocks} | {row.density:.3f} | {row.union:.2f}"
        f" | {row.dense_ms:.1f} | {row.order_ms:.1f} | {row.select_ms:.1f}"
        f" | {row.attention_ms:.1f} | {row.total_ms:.1f} | {row.speed_up:.2f}"
        f" | {1 / row.density:.2f} |"
    )


def write(folder: Path, name: str, info: dict[str, object], rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = [{**asdict(r), "speed_up": r.speed_up} for r in rows]
    (folder / f"{name}.json").write_text(json.dumps({**info, "rows": records}, indent=1) + "\n")
    facts = "\n".join(f"- {fact}: {value}" for fact, value in info.items())
    about = (__doc__ or "").split("How the figures are made:")[1].strip()
    table = "\n".join([HEADER, *map(line, rows)])
    (folder / f"{name}.md").write_text(
        f"# VMoBA's attention\n\nWritten by benchmarks/vmoba.py.\n\n{facts}\n\n{about}\n\n{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--directions", nargs="+", choices=["fwd", "fwd+bwd"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, help="default: 12 on a GPU, else 2")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--repeats", type=int, help="default: 10 on a GPU, else 2")
    parser.add_argument("--quick", action="store_true", help="6K tokens unless --shapes is given")
    parser.add_argument("--output", type=Path, help="folder for the JSON and the Markdown")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type != "cpu"
    args.heads = args.heads or (12 if on_gpu else 2)
    args.repeats = args.repeats or (10 if on_gpu else 2)
    torch.set_num_threads(args.threads)
    info = environment(args, device)
    print(*(f"{name}: {value}" for name, value in info.items()), sep="\n")
    print(HEADER)
    rows: list[Row] = []
    finish = partial(write, args.output, "vmoba_gpu" if on_gpu else "vmoba", info)
    for shape in args.shapes or (QUICK if args.quick else ["17K", "33K", "55K", "76K"]):
        for dtype in args.dtypes or (["bf16"] if on_gpu else list(DTYPES)):
            for direction in args.directions or (["fwd", "fwd+bwd"] if on_gpu else ["fwd"]):
                for row in measure(shape, dtype, direction, args, device):
                    rows.append(row)
                    print(line(row), flush=True)
                if args.output:
                    # A run of hours writes the rows that it has so far.
                    finish(rows)


if __name__ == "__main__":
    main()
