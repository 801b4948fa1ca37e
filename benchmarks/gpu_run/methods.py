"""Every method's whole attention call beside dense attention, at growing numbers of tokens.

The times show from how many tokens on each method is faster than dense attention. They contain the
method's token order and its selection. Masks are built before, and kept as the package keeps them.
"""

from __future__ import annotations

from functools import partial

import torch

from diffattn import TokenGrid
from diffattn.methods import METHODS
from diffattn.pipelines.bench.cases import Case, Shape, attention_call
from diffattn.pipelines.bench.timing import Call, Spread, describe, interleave, median_ratio
from gpu_run.rates import dense, heads_first
from gpu_run.setting import Setting

GRIDS = (
    TokenGrid(2, 30, 52), TokenGrid(4, 30, 52), TokenGrid(11, 30, 52), TokenGrid(21, 30, 52),
    TokenGrid(21, 45, 80),
)  # fmt: skip
DRY_GRIDS = (TokenGrid(4, 12, 16),)
HEADS, HEAD_DIM = 12, 128
LAYER, LAYERS = 2, 30  # VMoBA's boxes


def run(what: str, setting: Setting) -> None:
    for grid in DRY_GRIDS if setting.dry else GRIDS:
        if not setting.journal.is_finished(f"{grid.tokens}"):
            _measure(grid, setting)
            setting.journal.finish(f"{grid.tokens}")


def _measure(grid: TokenGrid, setting: Setting) -> None:
    dtype = str(setting.dtype).removeprefix("torch.")
    shape = Shape(grid, 1 if setting.dry else HEADS, HEAD_DIM, batch=1, dtype=dtype)
    size = (shape.batch, grid.tokens, shape.heads, shape.head_dim)
    qkv = [setting.random(*size, seed=seed) for seed in range(3)]
    reference = dense("flash" if setting.dry else "cudnn")
    calls: dict[str, Call] = {"dense": partial(reference.attend, *map(heads_first, qkv))}
    for name, kind in METHODS.items():
        if name == "dense":
            continue
        case = Case(kind().for_model("wan", grid), "wan", LAYER, LAYERS, name)
        try:
            call = partial(attention_call(case, shape, setting.device), *qkv)
            with torch.no_grad():
                call()
                call()  # a method may choose its kernel by what the first calls selected
            calls[name] = call
        except Exception as error:
            setting.journal.add("method", tokens=grid.tokens, method=name, failed=describe(error))
    with torch.no_grad():
        times, failed = interleave(calls, setting.timer, **setting.rounds(3.0))
    for name, why in failed.items():
        setting.journal.add("method", tokens=grid.tokens, method=name, failed=why)
    for name, rounds in times.items():
        if name != "dense":
            setting.journal.add(
                "method", tokens=grid.tokens, method=name, ms=Spread.of(rounds).median,
                dense_ms=Spread.of(times["dense"]).median,
                speed_up=median_ratio(times["dense"], rounds),
            )  # fmt: skip
