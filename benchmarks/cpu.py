"""Time and memory of block-sparse attention on the CPU, against dense attention in the same run.

    python benchmarks/cpu.py --output benchmarks/

writes cpu.json and cpu.md; options choose a part, for example

    python benchmarks/cpu.py --tokens 16384 --head-dims 64 --dtypes fp32 --patterns tile3d clear

How the figures are made:

- One process. Every repetition times dense attention and all patterns one after another, so that
  other load on the machine falls on all of them. The times are the best of the repetitions; the
  medians are in cpu.json. The first call of each pattern is not counted.
- With `--clock cpu` times are CPU seconds of the process, of use with `--threads 1` on a machine
  that is busy with other work. With `--clock wall` times are those that a user waits.
- Threads that spin while they wait for each other slow every small call down, if other processes
  want the same cores: set OMP_WAIT_POLICY=passive before Python starts.
- "% of ideal" is the speed-up over 1 / density, where density is the fraction of the blocks that
  are visited. More than 100 % is possible: bfloat16 matrix products can be faster than torch's
  dense attention in bfloat16, and the kernel leaves out keys of a partial block that no query sees.
- "fwd+bwd" is a forward pass and the gradients of q, k and v.
- "flex ms" is torch's compiled flex_attention with the BlockMask of the same layout. It has no
  gradients on the CPU. Where flex_attention did not compile, the reason follows the table.
  `--no-flex` leaves flex_attention out: it needs a C++ compiler, and compiles for each pattern and
  shape.
- Memory is the peak of live bytes of torch's allocator during one call, from torch's profiler,
  inputs not counted, results counted. The profiler does not see scratch space inside oneDNN and
  MKL.
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

import diffattn
from diffattn.blocks import EMPTY, FULL, BlockLayout, layout_from_states
from diffattn.methods import CLEARAttn, FreeSwimAttn, GNAAttn, RadialAttn
from diffattn.orders import TileOrder
from diffattn.pipelines.bench.peak import peak_mib
from diffattn.pipelines.run.machine import cpu_name

CPU = torch.device("cpu")
BLOCK = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TILES = {32: (2, 4, 4), 64: (4, 4, 4), 128: (8, 4, 4)}  # frames, height, width in tiles of 128


@dataclass(frozen=True)
class Row:
    """One line of the table; times in ms, memory in MiB.

    Attributes:
        density: share of the blocks that are visited.
        flex_note: the reason why `flex_ms` is None; empty otherwise.
    """

    tokens: int
    head_dim: int
    dtype: str
    direction: str
    pattern: str
    density: float
    dense_ms: float
    sparse_ms: float
    dense_median_ms: float
    sparse_median_ms: float
    dense_mib: float
    sparse_mib: float
    flex_ms: float | None
    flex_note: str

    @property
    def speed_up(self) -> float:
        return self.dense_ms / self.sparse_ms

    @property
    def of_ideal(self) -> float:
        """The speed-up as a share of the speed-up that the density allows."""
        return self.speed_up * self.density


def tile3d(tokens: int) -> BlockLayout:
    """A window of 3 x 3 x 3 tiles of 128 tokens: each row sees several runs of keys."""
    tiles = TILES[tokens // BLOCK]
    place = torch.cartesian_prod(*(torch.arange(n) for n in tiles))
    near = (place[:, None] - place[None]).abs().amax(-1) <= 1
    return from_visited(near, tokens)


def band(tokens: int) -> BlockLayout:
    """Every row sees its nearest blocks, about a sixth of all blocks, in a single run of keys."""
    block = torch.arange(tokens // BLOCK)
    return from_visited((block[:, None] - block).abs() <= len(block) // 11, tokens)


def ragged_band(tokens: int) -> BlockLayout:
    """A band of tokens, not of blocks: the blocks at its two edges are partial."""
    width = tokens // 11 - 50
    block, inside = torch.arange(tokens // BLOCK), torch.arange(BLOCK)
    distance = (block[:, None] - block).abs() * BLOCK

    def bits(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        q, k = row[:, None, None] * BLOCK + inside[:, None], column[:, None, None] * BLOCK + inside
        return (q - k).abs() <= width

    return layout_from_states(
        (distance <= width + BLOCK).to(torch.uint8), bits,
        tokens_q=tokens, tokens_kv=tokens, block_q=BLOCK, block_kv=BLOCK,
    )  # fmt: skip


def wide_band(tokens: int) -> BlockLayout:
    """A band of density .65."""
    block = torch.arange(tokens // BLOCK)
    return from_visited((block[:, None] - block).abs() <= 0.405 * len(block), tokens)


def scattered(tokens: int, share: float) -> BlockLayout:
    """Random blocks, a share of all: no two rows see the same blocks, and keys form no runs."""
    blocks = tokens // BLOCK
    chance = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0))
    return from_visited(chance < share, tokens)


def radial(tokens: int) -> BlockLayout:
    """Radial attention on frames of 16 x 32 tokens, with a decay that makes the mask sparse."""
    method = RadialAttn(
        decay_factor=0.1, block_size=BLOCK, split_threshold=512, first_distance_width="half"
    )
    return method.mask(diffattn.TokenGrid(tokens // 512, 16, 32)).blocks(BLOCK)


def gna(tokens: int) -> BlockLayout:
    """GNA on frames of 16 x 32 tokens, in tiles of 4 x 4 x 8; every visited tile is full."""
    method = GNAAttn(window=(4, 12, 24), stride=(4, 4, 8))
    grid = diffattn.TokenGrid(tokens // 512, 16, 32)
    return method.mask(grid).blocks(BLOCK, order=TileOrder(grid, (4, 4, 8)))


def freeswim(tokens: int) -> BlockLayout:
    """FreeSwim's window of 7 x 13 tokens on frames of 16 x 32, in patches through all frames."""
    method = FreeSwimAttn(radius=(3, 6))
    grid = diffattn.TokenGrid(tokens // 512, 16, 32)
    return method.mask(grid).blocks(BLOCK, order=method.order(grid))


def clear(tokens: int) -> BlockLayout:
    """CLEAR's circle of radius 8 on an image 64 or 128 tokens wide, in tiles of 8 x 16."""
    method = CLEARAttn(radius=8)
    width = 128 if tokens == 16384 else 64
    grid = diffattn.TokenGrid(1, tokens // width, width)
    return method.layout(grid, torch.device("cpu"), method.order(grid))


PATTERNS: dict[str, Callable[[int], BlockLayout]] = {
    "tile3d": tile3d,
    "band": band,
    "ragged band": ragged_band,
    "radial": radial,
    "gna": gna,
    "freeswim": freeswim,
    "clear": clear,
    "wide band": wide_band,
    "scattered .65": partial(scattered, share=0.65),
    "scattered .9": partial(scattered, share=0.9),
    "all": partial(scattered, share=1.0),
}


def from_visited(visited: torch.Tensor, tokens: int) -> BlockLayout:
    states = torch.where(visited, FULL, EMPTY).to(torch.uint8)
    return layout_from_states(
        states, None, tokens_q=tokens, tokens_kv=tokens, block_q=BLOCK, block_kv=BLOCK
    )


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def milliseconds(call: Callable[[], object], clock: str) -> float:
    now = CLOCKS[clock]
    start = now()
    call()
    return 1000 * (now() - start)


def failure(call: Callable[[], object]) -> str:
    """Make a call; give the reason in one line if it fails, else an empty text."""
    # Without a reset the shapes of all patterns together exceed dynamo's limit of compilations.
    torch.compiler.reset()
    try:
        call()
    except Exception as error:  # compilers raise errors of many types
        lines = str(error).splitlines()
        told = [x for x in lines if "error:" in x] or lines
        return f"{type(error).__name__}: {told[0].strip()[:200]}"
    return ""


def measure(
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: str,
    *,
    patterns: list[str],
    repeats: int,
    clock: str,
    flex: bool,
) -> Iterator[Row]:
    """All rows of one shape and dtype; dense, patterns and flex_attention take turns."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, dtype=DTYPES[dtype]).requires_grad_()
        for _ in range(3)
    )
    grad = torch.randn_like(q)
    layouts = {name: PATTERNS[name](tokens) for name in patterns}
    attentions: dict[str, Callable[..., torch.Tensor]] = {"dense": dense_attention}
    for name, layout in layouts.items():
        attentions[name] = partial(diffattn.attention, mask=layout)

    flexes = {name: f"flex {name}" for name in layouts if flex}
    for name, flex_name in flexes.items():
        attentions[flex_name] = partial(diffattn.attention, mask=layouts[name], backend="flex")

    def forward(name: str) -> None:
        with torch.no_grad():
            attentions[name](q, k, v)

    def both(name: str) -> None:
        torch.autograd.grad(attentions[name](q, k, v), (q, k, v), grad)

    for direction, call in (("fwd", forward), ("fwd+bwd", both)):
        calls = {name: partial(call, name) for name in attentions}
        notes = dict.fromkeys(layouts, "left out")
        for name, flex_name in flexes.items():
            notes[name] = failure(calls[flex_name])
            if notes[name]:
                del calls[flex_name]
        memory = {name: peak_mib(calls[name], CPU) for name in ("dense", *layouts)}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name in calls:
                times[name].append(milliseconds(calls[name], clock))
        for name, layout in layouts.items():
            yield Row(
                tokens=tokens,
                head_dim=head_dim,
                dtype=dtype,
                direction=direction,
                pattern=name,
                density=layout.density,
                dense_ms=min(times["dense"]),
                sparse_ms=min(times[name]),
                dense_median_ms=statistics.median(times["dense"]),
                sparse_median_ms=statistics.median(times[name]),
                dense_mib=memory["dense"],
                sparse_mib=memory[name],
                flex_ms=None if notes[name] else min(times[flexes[name]]),
                flex_note=notes[name],
            )


def environment(heads: int, repeats: int, clock: str) -> dict[str, object]:
    root = Path(__file__).parent.parent
    git = ["git", "-C", str(root)]
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "kernels"], capture_output=True, text=True
    )
    return {
        "revision": revision.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "load average at start": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "batch": 1,
        "heads": heads,
        "block": BLOCK,
        "repeats": repeats,
        "clock": clock,
    }


HEADER = (
    "| tokens | head_dim | dtype | direction | pattern | density | dense ms | sparse ms | speed-up"
    " | % of ideal | dense MiB | sparse MiB | flex ms |\n|" + "---|" * 13
)


def line(row: Row) -> str:
    flex = "-" if row.flex_ms is None else f"{row.flex_ms:.1f}"
    return (
        f"| {row.tokens} | {row.head_dim} | {row.dtype} | {row.direction} | {row.pattern}"
        f" | {row.density:.3f} | {row.dense_ms:.1f} | {row.sparse_ms:.1f} | {row.speed_up:.2f}"
        f" | {row.of_ideal:.0%} | {row.dense_mib:.0f} | {row.sparse_mib:.0f} | {flex} |"
    )


def write(folder: Path, info: dict[str, object], rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = [{**asdict(r), "speed_up": r.speed_up, "of_ideal": r.of_ideal} for r in rows]
    (folder / "cpu.json").write_text(json.dumps({**info, "rows": records}, indent=1) + "\n")
    facts = "\n".join(f"- {name}: {value}" for name, value in info.items())
    about = (__doc__ or "").split("How the figures are made:")[1].strip()
    table = "\n".join([HEADER, *map(line, rows)])
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.flex_note:
            case = f"{row.tokens} x {row.head_dim} {row.dtype} {row.direction} {row.pattern}"
            reasons.setdefault(row.flex_note, []).append(case)
    if reasons:
        table += "\n\nWithout a time of flex_attention:\n"
        table += "".join(f"\n- {', '.join(cases)}: {why}" for why, cases in reasons.items())
    (folder / "cpu.md").write_text(
        f"# Block-sparse attention on the CPU\n\nWritten by benchmarks/cpu.py.\n\n{facts}\n\n"
        f"{about}\n\n{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", choices=[4096, 8192, 16384])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-flex", action="store_true", help="leave flex_attention out")
    parser.add_argument("--quick", action="store_true", help="4096 tokens unless --tokens is given")
    parser.add_argument("--output", type=Path, help="folder for cpu.json and cpu.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    info = environment(args.heads, args.repeats, args.clock)
    print(*(f"{name}: {value}" for name, value in info.items()), sep="\n")
    print(HEADER)
    rows = []
    for tokens in args.tokens or ([4096] if args.quick else [4096, 8192, 16384]):
        for head_dim in args.head_dims:
            for dtype in args.dtypes:
                for row in measure(
                    tokens, args.heads, head_dim, dtype,
                    patterns=args.patterns, repeats=args.repeats, clock=args.clock,
                    flex=not args.no_flex,
                ):  # fmt: skip
                    rows.append(row)
                    print(line(row), flush=True)
    if args.output:
        write(args.output, info, rows)


if __name__ == "__main__":
    main()
