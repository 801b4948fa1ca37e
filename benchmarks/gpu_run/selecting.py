"""Times of methods that select by content, and of all they do around their kernels.

Queries and keys are smooth fields over the grid with noise on the queries. The more neighbours
select the same blocks, the less work there is; random queries would have no blocks in common. All
methods of a size are timed one after another, beside dense attention. A method that remembers is
timed without memory, as in the first sparse step of a run, and as in a later step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from diffattn import Method, SVG2Attn, TokenGrid
from diffattn.methods.memory import CallMemory
from diffattn.methods.sla.linear import linear_over_all
from diffattn.pipelines.bench.inputs import smooth_fields
from diffattn.pipelines.bench.timing import Call, Spread, describe, interleave, median_ratio
from gpu_run.around import METHODS as PUBLISHED
from gpu_run.around import kernels_left_out, site_of
from gpu_run.rates import dense, heads_first
from gpu_run.setting import Setting

GRIDS = (TokenGrid(11, 30, 52), TokenGrid(21, 30, 52), TokenGrid(21, 45, 80))
DRY_GRIDS = (TokenGrid(4, 12, 16),)
HEADS, HEAD_DIM = 12, 128
# SVG2 with smaller tiles fills its clusters up less, and takes another kernel on Hopper GPUs.
METHODS: dict[str, Method] = PUBLISHED | {"svg2, tiles of 64": SVG2Attn(query_block=64)}
SECONDS = 5.0  # of the rounds at a size
COMPILED = ("sol", "block-topk, parts", "block-topk, mean", "block-topk, mean, 128", "vsa", "sla")
# The layers whose blocks are of different kinds, for the methods where layers take turns.
KINDS = {"vmoba": (0, 1, 2)}
LAYER = 2


def run(what: str, setting: Setting) -> None:
    for grid in DRY_GRIDS if setting.dry else GRIDS:
        unit = f"{grid.tokens}"
        if not setting.journal.is_finished(unit):
            heads = 1 if setting.dry else HEADS
            qkv = smooth_fields(grid, heads, HEAD_DIM, setting.dtype, setting.device)
            _measure(grid, qkv, setting)
            setting.journal.finish(unit)


def _measure(grid: TokenGrid, qkv: list[torch.Tensor], setting: Setting) -> None:
    reference = dense("flash" if setting.dry else "cudnn")
    calls: dict[str, Call] = {"dense": partial(reference.attend, *map(heads_first, qkv))}
    facts = {}
    for name, kind in METHODS.items():
        method = kind.for_model("wan", grid)
        cases = [(name, layer, None) for layer in KINDS.get(name, (LAYER,))]
        if method.remembers:
            cases.append((f"{name}, later step", LAYER, CallMemory({}, 0, False)))
        for title, layer, memory in cases:
            case = f"{title} {layer}"
            facts[case] = {
                "tokens": grid.tokens, "method": title, "partition": _partition(method, layer)
            }  # fmt: skip
            try:
                site = replace(site_of(method, grid, qkv[0], layer), memory=memory)
                total = partial(method.attend, *qkv, site)
                with torch.no_grad():
                    total()
                    total()  # a method may choose its kernel by what the first calls selected
                    densities: list[torch.Tensor] = []
                    with kernels_left_out(densities, grid.tokens):
                        total()
            except Exception as error:
                setting.journal.add("selecting", **facts[case], failed=describe(error))
                continue
            facts[case]["density"] = sum(map(float, densities)) / max(1, len(densities))
            calls[f"{case} total"] = total
            calls[f"{case} around"] = partial(_around, total)
    with torch.no_grad():
        times, failed = interleave(calls, setting.timer, **setting.rounds(SECONDS))
    for case, known in facts.items():
        total_name, around_name = f"{case} total", f"{case} around"
        if total_name not in calls:
            continue
        why = failed.get(total_name) or failed.get(around_name) or failed.get("dense")
        if why:
            setting.journal.add("selecting", **known, failed=why)
            continue
        setting.journal.add(
            "selecting", **known,
            dense_ms=Spread.of(times["dense"]).median,
            around_ms=Spread.of(times[around_name]).median,
            total_ms=Spread.of(times[total_name]).median,
            around_share=median_ratio(times[around_name], times[total_name]),
            speed_up=median_ratio(times["dense"], times[total_name]),
        )  # fmt: skip


def launches(setting: Setting) -> Iterator[tuple[str, Callable[[], object]]]:
    """A call of every method whose kernels select blocks, to be compiled."""
    for grid in DRY_GRIDS if setting.dry else GRIDS:
        for name in COMPILED:
            yield f"selecting {name} {grid.tokens}", partial(_select, name, grid, setting)


def _select(name: str, grid: TokenGrid, setting: Setting) -> None:
    heads = 1 if setting.dry else HEADS
    size = (1, grid.tokens, heads, HEAD_DIM)
    q = torch.zeros(size, device=setting.device, dtype=setting.dtype)
    method = METHODS[name].for_model("wan", grid)
    with torch.no_grad():
        with kernels_left_out():
            method.attend(q, q, q, site_of(method, grid, q))
        if name == "sla":
            linear_over_all(q, q, q, features="softmax", eps=1e-5)


def _partition(method: Method, layer: int) -> str:
    partitions = getattr(method, "partitions", None)
    return "-" if partitions is None else partitions[method.layer_kind(layer)]


def _around(call: Call) -> None:
    with kernels_left_out():
        call()
