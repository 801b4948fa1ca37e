"""Cost of selecting methods beside their attention: order, pooling, scores, rule, lists.

    python benchmarks/selection.py --output benchmarks

writes benchmarks/selection.json and benchmarks/selection.md. How the figures are made:

- "around" is everything that a method's `attend` does outside of its kernels: tokens put in order
  and back, pooling, scores, the rule, lists of blocks, means for summaries.
- The first table is counted at 75,600 tokens, 40 heads of 128 in bfloat16: Wan 14B at 720p. The
  code itself runs there, on tensors without memory, and every torch operation is counted. FLOPs
  are those of matrix products; "other" is one operation for each number that all else handles.
  Bytes are what eager torch moves: every operation reads its tensors and writes its results once;
  a sort counts as one pass, and costs more.
- The attention's FLOPs are those of `Method.work` without the selection. The attention's bytes are
  what a kernel loads: each tile of 128 queries loads the keys and values that its queries see, and
  q, k, v and the output pass through memory once. Most of these loads come from the L2 cache of a
  GPU, while "around" moves its bytes through memory. So the modelled share of time takes the
  bytes of "around" at 3.35 TB/s, and the FLOPs of the attention at 500 TFLOP/s: an H100, untested.
- PASS and FAIL are against 5 % of the attention.
- "MiB" is the most that tensors made by the call take at a time, results included. "growth" is the
  memory at 151,200 tokens over that at 75,600: 2 is linear.
- The second table is measured on the CPU, with queries and keys that are smooth fields, in float32.
  "around" is the time of a call whose kernels are left out, "total" of the whole call. Times are
  the best of the repetitions. All methods take turns in each repetition.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from cpu import CLOCKS, dense_attention, environment, milliseconds
from gpu_run.around import METHODS, kernels_left_out, site_of
from traffic import LiveBytes, NoWaiting, Traffic

from diffattn import TokenGrid
from diffattn.methods.call_selection import smooth_tokens

WAN_720P, HEADS, HEAD_DIM = TokenGrid(21, 45, 80), 40, 128
GRIDS = (TokenGrid(3, 30, 52), TokenGrid(6, 30, 52), TokenGrid(11, 30, 52))
TILE = 128  # queries whose keys a kernel loads together
LIMIT = 0.05  # of the attention
BYTES_PER_SECOND, FLOPS_PER_SECOND = 3.35e12, 5e14


@dataclass(frozen=True)
class Counted:
    """What a method does around its kernels, and in them, at the size of Wan 14B at 720p.

    Attributes:
        density: share of the token pairs that attend, as `Method.work` expects it.
        flops, other, bytes: around the kernels, see the module.
        stated_flops: `selection_flops` of `Method.work`.
        attention_flops, attention_bytes: of the sparse attention, see the module.
        peak: bytes of the largest tensors around the kernels at a time.
        growth: the peak at twice the tokens over the peak.
    """

    method: str
    density: float
    flops: float
    other: float
    bytes: float
    stated_flops: float
    attention_flops: float
    attention_bytes: float
    peak: int
    growth: float

    @property
    def flops_share(self) -> float:
        return self.flops / self.attention_flops

    @property
    def bytes_share(self) -> float:
        return self.bytes / self.attention_bytes

    @property
    def time_share(self) -> float:
        """Modelled: bytes of memory around the kernels, FLOPs in them."""
        around = self.bytes / BYTES_PER_SECOND
        return around / (self.attention_flops / FLOPS_PER_SECOND)


@dataclass(frozen=True)
class Row:
    """Times on the CPU in ms."""

    tokens: int
    method: str
    dense_ms: float
    around_ms: float
    total_ms: float


def counted(name: str, grid: TokenGrid = WAN_720P, heads: int = HEADS) -> Counted:
    """The counts of a method; raises `traffic.WaitingError` if a call waits for the device."""
    method = METHODS[name].for_model("wan", grid)
    peaks = []
    for size in (grid, replace(grid, frames=2 * grid.frames)):
        inputs = [
            torch.empty(1, size.tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device="meta")
            for _ in range(3)
        ]
        call = partial(method.attend, *inputs, site_of(method, size, inputs[0]))
        with torch.no_grad(), kernels_left_out():
            call()  # makes what is kept for the grid
            with LiveBytes() as live:
                call()
            peaks.append(live.peak)
            if size is grid:
                with NoWaiting():
                    call()
                with Traffic() as traffic:
                    call()
    work = method.work(grid, layer=2, heads=heads, head_dim=HEAD_DIM)
    assert work is not None
    assert work.density is not None
    row = heads * HEAD_DIM * 2  # bytes of a token
    return Counted(
        method=name, density=work.density, flops=traffic.flops, other=traffic.others,
        bytes=traffic.bytes, stated_flops=work.selection_flops,
        attention_flops=work.flops - work.selection_flops,
        attention_bytes=(work.density * grid.tokens**2 / TILE * 2 + 4 * grid.tokens) * row,
        peak=peaks[0], growth=peaks[1] / peaks[0],
    )  # fmt: skip


def measured(grid: TokenGrid, names: list[str], heads: int, repeats: int, clock: str) -> list[Row]:
    """The times of all methods at one size; the methods take turns."""
    parts = [smooth_tokens(grid, HEAD_DIM, seed) for seed in range(heads)]
    inputs = [torch.cat(tensors, 2) for tensors in zip(*parts, strict=True)]
    calls: dict[tuple[str, bool], Callable[[], object]] = {}
    for name in names:
        method = METHODS[name].for_model("wan", grid)
        whole = partial(method.attend, *inputs, site_of(method, grid, inputs[0]))
        calls[name, True] = whole
        calls[name, False] = partial(_around, whole)
    times: dict[tuple[str, bool], list[float]] = {case: [] for case in calls}
    dense = []
    with torch.no_grad():
        for call in calls.values():
            call()
        for _ in range(repeats):
            dense.append(milliseconds(partial(dense_attention, *inputs), clock))
            for case, call in calls.items():
                times[case].append(milliseconds(call, clock))
    return [
        Row(grid.tokens, name, min(dense), min(times[name, False]), min(times[name, True]))
        for name in names
    ]


def _around(call: Callable[[], object]) -> None:
    with kernels_left_out():
        call()


def counted_table(rows: list[Counted]) -> str:
    lines = [
        "| method | pairs | around, TFLOP | other, T | attention, TFLOP | FLOPs | around, GB |"
        " attention, GB | bytes | time, modelled | MiB | growth |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        lines.append(
            f"| {row.method} | {row.density:.1%} | {row.flops / 1e12:.3f} | {row.other / 1e12:.4f}"
            f" | {row.attention_flops / 1e12:.1f} | {judged(row.flops_share)}"
            f" | {row.bytes / 1e9:.1f} | {row.attention_bytes / 1e9:.1f}"
            f" | {judged(row.bytes_share)} | {row.time_share:.0%} | {row.peak / 2**20:.0f}"
            f" | {row.growth:.2f} |"
        )
    return "\n".join(lines)


def judged(share: float) -> str:
    return f"{share:.2%} {'PASS' if share < LIMIT else 'FAIL'}"


def measured_table(rows: list[Row]) -> str:
    lines = ["| tokens | method | dense ms | around ms | total ms | around | speed-up |"]
    lines.append("|" + "---|" * 7)
    for row in rows:
        lines.append(
            f"| {row.tokens} | {row.method} | {row.dense_ms:.0f} | {row.around_ms:.1f}"
            f" | {row.total_ms:.1f} | {row.around_ms / row.total_ms:.1%}"
            f" | {row.dense_ms / row.total_ms:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sizes", type=int, default=len(GRIDS), help="sizes to measure, 0 to 3")
    parser.add_argument("--heads", type=int, default=2, help="heads that are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder of selection.json and selection.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    info = environment(args.heads, args.repeats, args.clock) | {"head_dim": HEAD_DIM}
    del info["block"]
    counts = [counted(name) for name in args.methods]
    print(counted_table(counts), flush=True)
    rows: list[Row] = []
    for grid in GRIDS[: args.sizes]:
        rows += measured(grid, args.methods, args.heads, args.repeats, args.clock)
        print(measured_table(rows[-len(args.methods) :]), flush=True)
    if args.output:
        write(args.output, info, counts, rows)


def write(folder: Path, info: dict[str, object], counts: list[Counted], rows: list[Row]) -> None:
    record = {**info, "counted": [asdict(x) for x in counts], "measured": [asdict(x) for x in rows]}
    (folder / "selection.json").write_text(json.dumps(record, indent=1) + "\n")
    facts = "\n".join(f"- {name}: {value}" for name, value in info.items())
    about = (__doc__ or "").split("How the figures are made:")[1].strip()
    (folder / "selection.md").write_text(
        "# Cost of selecting methods beside their attention\n\nWritten by benchmarks/selection.py."
        f"\n\n{facts}\n\n{about}\n\n## Counted at 75,600 tokens\n\n{counted_table(counts)}\n\n"
        f"## Measured on the CPU\n\n{measured_table(rows)}\n"
    )


if __name__ == "__main__":
    main()
