"""Times of the parts of VMoBA, whose queries select their key blocks, beside dense attention.

Queries and keys are smooth fields over the grid with noise on the queries. The more neighbours
select the same blocks, the less work there is; random queries would have no blocks in common.
"""

from __future__ import annotations

import torch

from diffattn import TokenGrid, VMoBAAttn
from diffattn.methods import Site
from diffattn.methods.vmoba.selection import select_blocks
from diffattn.pipelines.bench.inputs import smooth_fields
from diffattn.pipelines.bench.timing import Call, Spread, describe, interleave, median_ratio
from diffattn.selected.attention import selected_attention
from diffattn.selected.tiles import selected_pairs
from gpu_run.rates import dense, heads_first
from gpu_run.setting import Setting

GRIDS = (TokenGrid(11, 30, 52), TokenGrid(21, 30, 52), TokenGrid(21, 45, 80))
DRY_GRIDS = (TokenGrid(4, 12, 16),)
HEADS, HEAD_DIM = 12, 128
METHODS = {
    "training-free": VMoBAAttn(),
    "training": VMoBAAttn(preset="training"),
    "training, tiles of 128": VMoBAAttn(preset="training", granularity="tile"),
}
LAYERS = 3  # the kinds of blocks that layers take in turn


def run(what: str, setting: Setting) -> None:
    for grid in DRY_GRIDS if setting.dry else GRIDS:
        unit = f"{grid.tokens}"
        if setting.journal.is_finished(unit):
            continue
        heads = 1 if setting.dry else HEADS
        qkv = smooth_fields(grid, heads, HEAD_DIM, setting.dtype, setting.device)
        for name, method in METHODS.items():
            for layer in range(LAYERS):
                _measure(grid, name, method.for_model("wan", grid), layer, qkv, setting)
        setting.journal.finish(unit)


def _measure(
    grid: TokenGrid,
    name: str,
    method: VMoBAAttn,
    layer: int,
    qkv: list[torch.Tensor],
    setting: Setting,
) -> None:
    partition, rule = method.partition(grid, layer), method.rule(grid, layer)
    facts = {"tokens": grid.tokens, "method": name, "partition": method.partitions[layer]}
    blocks = partition.key_blocks(setting.device)
    inside = [partition.to_blocks(x) for x in qkv]
    bits = select_blocks(inside[0], inside[1], blocks, rule)
    reference = dense("flash" if setting.dry else "cudnn")
    firsts = [heads_first(x) for x in qkv]
    site = Site("wan", layer, LAYERS, grid)

    def order() -> None:
        moved = [partition.to_blocks(x) for x in qkv]
        partition.from_blocks(moved[0])

    calls: dict[str, Call] = {
        "dense": lambda: reference.attend(*firsts),
        "order": order,
        "select": lambda: select_blocks(inside[0], inside[1], blocks, rule),
        "attention": lambda: selected_attention(inside[0], inside[1], inside[2], blocks, bits),
        "total": lambda: method.attend(qkv[0], qkv[1], qkv[2], site),
    }
    try:
        with torch.no_grad():
            for call in calls.values():
                call()
                call()  # a method may choose its kernel by what the first calls selected
            times, failed = interleave(calls, setting.timer, **setting.rounds(0.7))
    except Exception as error:
        setting.journal.add("selecting", **facts, failed=describe(error))
        return
    if failed:
        setting.journal.add("selecting", **facts, failed="; ".join(failed.values()))
        return
    setting.journal.add(
        "selecting", **facts, density=float(selected_pairs(blocks, bits)),
        **{f"{part}_ms": Spread.of(rounds).median for part, rounds in times.items()},
        speed_up=median_ratio(times["dense"], times["total"]),
    )  # fmt: skip
