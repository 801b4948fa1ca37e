"""Times of the parts of VMoBA, whose queries select their key blocks, beside dense attention.

Queries and keys are smooth fields over the grid with noise on the queries. The more neighbours
select the same blocks, the less work there is; random queries would have no blocks in common.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffattn import TokenGrid, VMoBAAttn
from diffattn.methods import Site
from diffattn.methods.vmoba.selection import select_blocks
from diffattn.selected.attention import selected_attention
from diffattn.selected.tiles import selected_pairs
from gpu_run.rates import dense, heads_first
from gpu_run.setting import Setting
from gpu_run.timing import Call, Spread, describe, interleave, median_ratio

GRIDS = (TokenGrid(11, 30, 52), TokenGrid(21, 30, 52), TokenGrid(21, 45, 80))
DRY_GRIDS = (TokenGrid(4, 12, 16),)
HEADS, HEAD_DIM = 12, 128
NOISE = 0.5
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
        qkv = smooth(grid, setting)
        for name, method in METHODS.items():
            for layer in range(LAYERS):
                _measure(grid, name, method.for_model("wan", grid), layer, qkv, setting)
        setting.journal.finish(unit)


def smooth(grid: TokenGrid, setting: Setting) -> list[torch.Tensor]:
    """q, k and v: smooth fields over the grid, of unit size, and noise on q."""
    torch.manual_seed(0)
    sizes = (grid.frames, grid.height, grid.width)
    heads = 1 if setting.dry else HEADS
    fields = []
    for _ in range(3):
        coarse = torch.randn(1, heads * HEAD_DIM, *(max(2, size // 4) for size in sizes))
        field = F.interpolate(
            coarse.to(setting.device), size=sizes, mode="trilinear", align_corners=True
        )
        field = field.flatten(2).transpose(1, 2).contiguous().unflatten(2, (heads, HEAD_DIM))
        fields.append(field / field.std())
    fields[0] = fields[0] + NOISE * torch.randn_like(fields[0])
    return [field.to(setting.dtype) for field in fields]


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
