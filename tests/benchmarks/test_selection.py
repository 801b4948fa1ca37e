"""Costs of selecting methods: no call waits for the device, memory is linear, counts are right."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import selection
import torch
from gpu_run.around import METHODS, kernels_left_out, site_of
from traffic import LiveBytes, NoWaiting, Traffic, WaitingError

from diffattn import BlockTopKAttn, Reference, SolAttn, SVG2Attn, TokenGrid, VSAAttn
from diffattn.routing import keep

RESULTS = Path(selection.__file__).with_name("selection.json")
GRIDS = (
    TokenGrid(6, 30, 52),
    TokenGrid(1, 64, 48, text_before=77, text_after=9),
    TokenGrid(3, 20, 31, 5, 700, references=(Reference(1900, 1, 20, 31),)),
)
MORE = {
    "sol, exact": SolAttn(variance="exact", references="local"),
    "block-topk, summary": BlockTopKAttn(remainder="summary", order="tile"),
    "svg2, local": SVG2Attn(references="local"),
    "vsa, large tiles": VSAAttn(tile=(4, 8, 8), references="local"),
}


def inputs(grid: TokenGrid, heads: int = 2) -> list[torch.Tensor]:
    return [torch.empty(2, grid.tokens, heads, 64, device="meta") for _ in range(3)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", [*METHODS, *MORE])
def test_no_call_waits_for_the_device(name: str, grid: TokenGrid, padded: bool) -> None:
    method = (METHODS | MORE)[name].for_model("wan", grid.alone)
    qkv = inputs(grid)
    key_mask = torch.ones(2, grid.tokens, dtype=torch.bool, device="meta") if padded else None
    call = partial(method.attend, *qkv, site_of(method, grid, qkv[0]), key_mask=key_mask)
    with kernels_left_out():
        call()  # what is kept for the grid is made on the CPU
        with NoWaiting():
            assert call().shape == qkv[0].shape


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to("meta"),
        lambda x: torch.tensor([1, 2], device="meta"),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.long().flatten().unique(),
        lambda x: x.long()[0].bincount(),
        lambda x: bool((x > 0).any()),
        lambda x: torch.ones(2, 3) * x,
    ],
)
def test_a_call_that_waits_is_refused(wait: Any) -> None:
    with pytest.raises((WaitingError, RuntimeError)), NoWaiting():
        wait(torch.empty(2, 3, device="meta"))


def test_a_method_that_waits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    threshold = keep.row_threshold

    def from_the_cpu(scores: torch.Tensor, *args: Any) -> torch.Tensor:
        ones = torch.ones(scores.shape[-1]).to(scores.device)
        return threshold(scores * ones, *args)

    monkeypatch.setattr(keep, "row_threshold", from_the_cpu)
    with pytest.raises(WaitingError, match="has tensors on cpu and meta"):
        test_no_call_waits_for_the_device("sol", GRIDS[0], False)


# Counting clusters, thousands of operations, takes long: their figures are in the committed file.
@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("svg2")])
def test_memory_is_linear_and_flops_are_those_that_are_stated(name: str) -> None:
    row = selection.counted(name)
    assert row.growth < 2.1
    if name != "sla":  # whose trained layer is counted, too
        # Sums are stated, and not counted.
        assert 0.8 < row.flops / row.stated_flops < 1.1
    assert row.flops_share < 0.01


def test_the_committed_figures_are_of_all_methods() -> None:
    record = json.loads(RESULTS.read_text())
    assert [row["method"] for row in record["counted"]] == list(METHODS)
    assert {row["method"] for row in record["measured"]} == set(METHODS)
    for row in record["counted"]:
        counted = selection.Counted(**row)
        # Scores of clusters with all keys, which SVG-EAR needs, are quadratic in the tokens.
        assert counted.growth < (4 if counted.method == "svg2, ear" else 2.1)
        clusters = counted.method.startswith("svg2")
        assert counted.flops_share < (0.11 if clusters else selection.LIMIT)


class TestTraffic:
    def test_products_sums_and_views(self) -> None:
        a, b = torch.empty(3, 4, 8, device="meta"), torch.empty(3, 8, 2, device="meta")
        with Traffic() as traffic:
            out = (a @ b).transpose(1, 2)[0]
        read = 3 * 4 * 8 + 3 * 8 * 2
        assert traffic.bytes == 4 * (read + 3 * 4 * 2)
        assert traffic.flops == 2 * 3 * 4 * 8 * 2
        assert traffic.others == 0
        with Traffic() as traffic:
            out = out + 1
        assert (traffic.bytes, traffic.flops, traffic.others) == (4 * 2 * 8, 0, 8)

    def test_what_is_expanded_and_what_is_picked(self) -> None:
        a = torch.empty(1, 6, device="meta", dtype=torch.bfloat16)
        with Traffic() as traffic:
            a.expand(5, 6).clone()
        assert traffic.bytes == 2 * 6 + 2 * 30
        index = torch.zeros(2, dtype=torch.int64, device="meta")
        with Traffic() as traffic:
            a.index_select(1, index)
        assert traffic.bytes == 2 * 2 + 2 * 8 + 2 * 2

    def test_the_same_on_the_cpu(self) -> None:
        counts = []
        for device in ("cpu", "meta"):
            with Traffic() as traffic:
                x = torch.ones(7, 5, device=device)
                (x.sort(1).values.cumsum(1) > 2).sum()
            counts.append((traffic.bytes, traffic.others))
        assert counts[0] == counts[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes(device: str) -> None:
    x = torch.ones(1000, device=device)
    with LiveBytes() as live:
        a = x + 1  # 4,000 bytes
        b = a.view(10, 100)[2:]
        del a
        c = b * 2  # 3,200 more
        del b, c
        d = x.double()  # 8,000
    assert live.peak == 8000
    assert d.shape == x.shape


def test_kernels_are_there_again() -> None:
    from diffattn.methods import selected_blocks, vsa
    from diffattn.operator import attention

    with kernels_left_out():
        assert selected_blocks.attention is not attention
        assert vsa.method.attention is not attention
    assert selected_blocks.attention is attention
    assert vsa.method.attention is attention
