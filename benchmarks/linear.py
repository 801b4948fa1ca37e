"""Time and memory of the methods that are linear in the tokens, on the CPU, against softmax.

    python benchmarks/linear.py --output benchmarks/

writes linear.json and linear.md. How the figures are made:

- A row is one attention call on one image, as a layer of a U-Net makes the call. The projections
  around the call are left out, since all methods share them; all other work of a method at each
  call is included. The networks that adapt LinFusion's queries and keys are a cost of their own,
  "adapt ms": two networks as wide as the layer.
- "agent" has 256 agents on an image of a transformer at every size, so that an agent stands for a
  larger part of a larger image. "agent 4x4" has an agent for every 4 x 4 tokens, as by default: 8
  times cheaper than softmax at every size. "agentsd" is the default in a U-Net: also an agent for
  every 4 x 4 tokens, with 40 % of the tokens merged before, and a new choice of these tokens at
  each call.
- One process. Every repetition times all methods one after another, so that other load on the
  machine falls on all of them. The times are the best of the repetitions. The first call of each
  method is not counted.
- "growth" is the time over that of the next smaller size, divided by the growth of the number of
  tokens: 1 is linear, 2 quadratic for twice the tokens.
- "fwd+bwd" is a forward pass and the gradients of q, k and v.
- Memory is the peak of live bytes of torch's allocator during one call, from torch's profiler,
  inputs not counted, results counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from cpu import CLOCKS, DTYPES, dense_attention, environment, milliseconds, peak_mib

from diffattn import AgentAttn, LinFusionAttn, Method, TokenGrid
from diffattn.methods import Site
from diffattn.methods.agent.merging import cell_offsets, match, sources_and_destinations
from diffattn.methods.linfusion.method import LinFusionWeights

SIZES = (4096, 8192, 16384, 32768, 65536)

# Takes q, k and v over a grid, gives their attention.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table; times in ms, memory in MiB.

    Attributes:
        growth: see above; None for the smallest size.
        adapt_ms: time of LinFusion's networks; None for other methods.
    """

    tokens: int
    dtype: str
    direction: str
    method: str
    ms: float
    mib: float
    growth: float | None
    adapt_ms: float | None


def softmax(grid: TokenGrid) -> Attention:
    return dense_attention


def linfusion(grid: TokenGrid) -> Attention:
    return partial(_attend, LinFusionAttn().for_model("unet", grid), Site("unet", 0, 1, grid))


def agent(grid: TokenGrid) -> Attention:
    cell = (1, -(-grid.height // 16), -(-grid.width // 16))
    return partial(_attend, AgentAttn(cell=cell), Site("flux", 0, 1, grid))


def agent_cells(grid: TokenGrid) -> Attention:
    return partial(_attend, AgentAttn().for_model("flux"), Site("flux", 0, 1, grid))


def agentsd(grid: TokenGrid) -> Attention:
    method = AgentAttn()
    offsets = cell_offsets(grid.height, grid.width, method.stride, None)
    parts = sources_and_destinations(grid.height, grid.width, method.stride, offsets)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        merging = match(v.flatten(2), *parts, method.ratio, method.agent_ratio)
        site = Site("unet", 0, 1, TokenGrid(1, 1, merging.tokens), merging=merging)
        merged = (merging.merge(x.flatten(2)).unflatten(2, x.shape[2:]) for x in (q, k, v))
        return merging.unmerge(method.attend(*merged, site).flatten(2)).unflatten(2, q.shape[2:])

    return attend


def _attend(
    method: Method, site: Site, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return method.attend(q, k, v, site)


# The attention of each method over a grid, by name.
METHODS: dict[str, Callable[[TokenGrid], Attention]] = {
    "softmax": softmax,
    "linfusion": linfusion,
    "agent": agent,
    "agent 4x4": agent_cells,
    "agentsd": agentsd,
}


class Layer(torch.nn.Module):
    """A stand-in for an attention layer, whose sizes LinFusion's networks take."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = self.to_k = torch.nn.Linear(heads * head_dim, heads * head_dim, dtype=dtype)


def grid_of(tokens: int) -> TokenGrid:
    """An image of `tokens` tokens, a power of two: a square, or twice as wide as high."""
    height = 1 << ((tokens.bit_length() - 1) // 2)
    return TokenGrid(1, height, tokens // height)


def measure(
    tokens: int, heads: int, head_dim: int, dtype: str, *, methods: list[str], repeats: int,
    clock: str, smaller: dict[tuple[str, str, str], Row],
) -> list[Row]:  # fmt: skip
    """All rows of one size and dtype; the methods take turns.

    Args:
        smaller: the rows of the next smaller size, by dtype, direction and method; replaced by the
            rows of this size.
    """
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, dtype=DTYPES[dtype]).requires_grad_()
        for _ in range(3)
    )
    grad = torch.randn_like(q)
    attentions = {name: METHODS[name](grid_of(tokens)) for name in methods}
    weights = LinFusionWeights(Layer(heads, head_dim, DTYPES[dtype]), None, False)
    x = q.detach().flatten(2)

    def forward(name: str) -> None:
        with torch.no_grad():
            attentions[name](q, k, v)

    def both(name: str) -> None:
        torch.autograd.grad(attentions[name](q, k, v), (q, k, v), grad)

    def adapt() -> None:
        with torch.no_grad():
            weights.map_q(x), weights.map_k(x)

    adapt()
    adapting = min(milliseconds(adapt, clock) for _ in range(repeats))
    rows = []
    for direction, call in (("fwd", forward), ("fwd+bwd", both)):
        calls = {name: partial(call, name) for name in methods}
        memory = {name: peak_mib(calls[name]) for name in methods}
        times: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(repeats):
            for name in methods:
                times[name].append(milliseconds(calls[name], clock))
        for name in methods:
            before, best = smaller.get((dtype, direction, name)), min(times[name])
            ratio = None if before is None else best / before.ms / (tokens / before.tokens)
            row = Row(
                tokens=tokens, dtype=dtype, direction=direction, method=name, ms=best,
                mib=memory[name], growth=ratio,
                adapt_ms=adapting if (name, direction) == ("linfusion", "fwd") else None,
            )  # fmt: skip
            smaller[dtype, direction, name] = row
            rows.append(row)
    return rows


HEADER = "| tokens | dtype | direction | method | ms | growth | MiB | adapt ms |\n|" + "---|" * 8


def line(row: Row) -> str:
    growth = "" if row.growth is None else f"{row.growth:.2f}"
    adapt = "" if row.adapt_ms is None else f"{row.adapt_ms:.1f}"
    return (
        f"| {row.tokens} | {row.dtype} | {row.direction} | {row.method} | {row.ms:.1f} | {growth}"
        f" | {row.mib:.0f} | {adapt} |"
    )


def write(folder: Path, info: dict[str, object], rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = [asdict(row) for row in rows]
    (folder / "linear.json").write_text(json.dumps({**info, "rows": records}, indent=1) + "\n")
    facts = "\n".join(f"- {name}: {value}" for name, value in info.items())
    about = (__doc__ or "").split("How the figures are made:")[1].strip()
    table = "\n".join([HEADER, *map(line, rows)])
    (folder / "linear.md").write_text(
        f"# Linear attention on the CPU\n\nWritten by benchmarks/linear.py.\n\n{facts}\n\n"
        f"{about}\n\n{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for linear.json and linear.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    info = environment(args.heads, args.repeats, args.clock) | {"head_dim": args.head_dim}
    del info["block"]
    print(*(f"{name}: {value}" for name, value in info.items()), sep="\n")
    print(HEADER)
    rows: list[Row] = []
    smaller: dict[tuple[str, str, str], Row] = {}
    for tokens in sorted(args.tokens):
        for dtype in args.dtypes:
            for row in measure(
                tokens, args.heads, args.head_dim, dtype, methods=args.methods,
                repeats=args.repeats, clock=args.clock, smaller=smaller,
            ):  # fmt: skip
                rows.append(row)
                print(line(row), flush=True)
    if args.output:
        write(args.output, info, rows)


if __name__ == "__main__":
    main()
