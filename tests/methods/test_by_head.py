"""Heads that attend by different methods."""

import json
from dataclasses import replace
from typing import Any

import pytest
import tiny_wan
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn
from diffattn import (
    BlockTopKAttn,
    ByHeadAttn,
    CLEARAttn,
    DenseAttn,
    GNAAttn,
    Method,
    SLAAttn,
    TokenGrid,
    VMoBAAttn,
    VSAAttn,
)
from diffattn.methods import Site, from_dict

GRID = TokenGrid(3, 5, 7, 0, 4)
SITE = Site("wan", 1, 3, GRID)
WINDOW = GNAAttn(window=(3, 3, 3), stride=1)
TOP = BlockTopKAttn(keep=0.2, block=16)
PARTS: tuple[tuple[Method, int], ...] = ((WINDOW, 1), (TOP, 3), (DenseAttn(), 2))


def tokens(heads: int = 6, kv_heads: int | None = None) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    counts = (heads, kv_heads or heads, kv_heads or heads)
    return tuple(torch.randn(2, GRID.tokens, n, 16, generator=generator) for n in counts)


# These have weights in a model only with pooled keys, or with a gate.
WITHOUT_WEIGHTS: tuple[tuple[Method, int], ...] = (
    (CLEARAttn(radius=3, frame_radius=2), 4),
    (VSAAttn(keep=0.3), 2),
)


def oracle(method: Method, qkv: list[torch.Tensor]) -> torch.Tensor:
    """Attention in float64 under the mask of a method, head by head."""
    query, key, value = (x.double().transpose(1, 2) for x in qkv)
    if isinstance(method, BlockTopKAttn | VSAAttn):
        chosen = method.selection(*qkv[:2], SITE)
        mask = torch.stack([
            torch.stack([method.selection_mask(head, GRID).dense() for head in sample])
            for sample in chosen
        ])  # fmt: skip
    else:
        mask = method.mask(GRID).dense()  # type: ignore[attr-defined]
    scores = query @ key.mT / 16**0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("parts", [PARTS, WITHOUT_WEIGHTS], ids=["plain", "without weights"])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_each_head_attends_by_its_method(
    kv_heads: int, parts: tuple[tuple[Method, int], ...]
) -> None:
    query, key, value = tokens(6, kv_heads)
    query.requires_grad_()
    out = ByHeadAttn(parts=parts).attend(query, key, value, SITE)
    wide = [x.repeat_interleave(6 // kv_heads, 2) for x in (key, value)]
    first, want = 0, []
    for method, heads in parts:
        qkv = [x[:, :, first : first + heads] for x in (query, *wide)]
        want.append(oracle(method, qkv))
        first += heads
    torch.testing.assert_close(out.double(), torch.cat(want, 2), rtol=1e-5, atol=1e-5)
    [got] = torch.autograd.grad(out.sum(), query)
    [expected] = torch.autograd.grad(torch.cat(want, 2).sum(), query)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_json() -> None:
    method = ByHeadAttn(parts=PARTS)
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert hash(method) == hash(ByHeadAttn(parts=PARTS))


def test_attached_and_compiled_with_parts_that_differ_by_step() -> None:
    torch._dynamo.reset()
    sparse: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0}
    parts = ((replace(TOP, keep=[1, 0.5, 0.2]), 1), (replace(WINDOW, window=(1, 3, 3)), 1))
    method = ByHeadAttn(parts=parts, **sparse)
    pipe = tiny_wan.PIPELINES["t2v"]()
    pipe.set_attn_processor(method)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pipe.transformer, fullgraph=True, backend=counter)
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 12, 10, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, tiny_wan.TEXT_DIM),
        "return_dict": False,
    }
    pipe.scheduler.set_timesteps(3)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        with torch.no_grad():
            out = compiled(**inputs)[0]
        sample = torch.zeros(1, 16, 1, 2, 2)
        pipe.scheduler.step(sample, timestep, sample)
        alone = tiny_wan.transformer()
        diffattn.set_attn_processor(alone, method.at_step(step, 3))
        with torch.no_grad():
            torch.testing.assert_close(out, alone(**inputs)[0], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert method.at_step(1, 3) is method.at_step(1, 3)


def test_a_plan_is_the_mean_over_the_heads() -> None:
    sparse: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0}
    two = ByHeadAttn(parts=((WINDOW, 1), (DenseAttn(), 3)), **sparse)
    grid = TokenGrid(3, 8, 8)
    window = diffattn.plan(grid, replace(WINDOW, **sparse)).density
    assert diffattn.plan(grid, two, heads=4).density == pytest.approx((window + 3) / 4)
    with pytest.raises(ValueError, match="have 4 heads, but the model's attention has 6"):
        diffattn.plan(grid, two, heads=6)


def test_the_most_dense_layers_of_the_parts_hold() -> None:
    parts = (
        (replace(WINDOW, dense_layers=2, dense_steps=0.4), 1),
        (replace(TOP, dense_layers=1), 1),
    )
    settled = ByHeadAttn(parts=parts).for_model("")
    assert (settled.dense_layers, settled.dense_steps) == (2, 0.4)
    assert ByHeadAttn(parts=parts).dense_layers_at_most == 2
    assert ByHeadAttn(parts=parts, dense_layers=0).for_model("").dense_layers == 0
    last = ((replace(WINDOW, last_dense_steps=2), 1), (replace(TOP, last_dense_steps=1), 1))
    assert ByHeadAttn(parts=last).for_model("").last_dense_steps == 2
    mixed = ((replace(WINDOW, dense_steps=2), 1), (replace(TOP, dense_steps=0.2), 1))
    with pytest.raises(ValueError, match=r"dense_steps is 2 for some parts and 0\.2 for others"):
        ByHeadAttn(parts=mixed).for_model("")
    assert ByHeadAttn(parts=mixed, dense_steps=3).for_model("").dense_steps == 3


def test_other_numbers_of_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"have 1 \+ 3 \+ 2 = 6 heads, but the attention of this"):
        ByHeadAttn(parts=PARTS).attend(*tokens(5), SITE)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (3, "parts is 3, but must be pairs of a method and a number"),
        ([WINDOW], "a part is GNAAttn.*, but must be a pair of a method and its number of heads"),
        ([("gna", 2)], "the method of a part is 'gna', but must be a method of diffattn"),
        ([(WINDOW, 0)], "the number of heads of gna is 0, but must be an integer of at least 1"),
        ([(SLAAttn(), 2)], "sla cannot attend for some heads alone: it has weights of its own or"),
        ([(VSAAttn(coarse=True), 2)], "vsa cannot attend for some heads alone"),
        ([(CLEARAttn(down_factor=8), 2)], "clear cannot attend for some heads alone"),
        (
            [(VMoBAAttn(select="threshold", scope="unpublished-all"), 2)],
            "vmoba with these parameters looks at all heads together",
        ),
        ([({"type": "gna", "windw": 3}, 2)], "gna has no parameter 'windw'; did you mean 'window'"),
    ],
)
def test_bad_parts(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByHeadAttn(parts=parts)
