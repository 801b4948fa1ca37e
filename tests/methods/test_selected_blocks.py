"""Methods that select blocks for blocks: goldens, the definition in float64, text, padding."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from content_goldens import read
from golden_files import matching
from hypothesis import given, settings
from hypothesis import strategies as st

import diffattn
from diffattn import BlockTopKAttn, Reference, SolAttn, TokenGrid
from diffattn.methods.base import Site
from diffattn.methods.selected_blocks import ORDERS, SelectedBlocksMethod
from diffattn.routing import REMAINDERS

METHODS = (SolAttn, BlockTopKAttn)
# And Sol-Attn in comfy-kitchen's form.
ALSO_BY_BLOCK = (*METHODS, partial(SolAttn, remainder="block-summary"))


def site(grid: TokenGrid) -> Site:
    return Site("wan", 5, 10, grid)


def truth(
    method: SelectedBlocksMethod,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: TokenGrid,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float64 attention over what the method says it selected, token by token in the model's order.

    Every key that is not seen itself is replaced by its block's mean, which has the same weight:
    n copies of the mean count as much as one key with the logarithm of n added to its score.
    """
    chosen = method.selection(q, k, site(grid), key_mask=key_mask)
    counts = torch.ones(q.shape[:2]) if key_mask is None else key_mask.float()
    outs = []
    for sample in range(q.shape[0]):
        of_heads = []
        for head in range(q.shape[2]):
            mask = method.selection_mask(chosen[sample, head], grid)
            seen = mask.dense()
            block_of = mask.block_of  # type: ignore[attr-defined]
            query, key, value = (x[sample, :, head].double() for x in (q, k, v))
            weight = counts[sample].double()
            one_hot = torch.nn.functional.one_hot(block_of).double() * weight[:, None]
            many = one_hot.sum(0)
            of_query, of_key, of_value = (
                one_hot.T @ x / many.clamp(min=1)[:, None] for x in (query, key, value)
            )
            scale = q.shape[-1] ** -0.5
            there = counts[sample].bool()
            queries = query
            if method.remainder == "block-summary":
                # All queries of a block see means as their own mean does, and what the blocks'
                # means have in common is taken from all keys.
                held = (many > 0).double()
                centre = held @ of_key / held.sum()
                key, of_key, queries = key - centre, of_key - centre, of_query[block_of]
            scores = query @ key.T * scale
            pooled = queries @ of_key[block_of].T * scale
            if method.remainder == "drop":
                pooled = torch.full_like(pooled, -torch.inf)
            weights = torch.where(seen, scores, pooled).masked_fill(~there, -torch.inf).softmax(-1)
            out = (
                weights.masked_fill(~seen, 0) @ value
                + weights.masked_fill(seen, 0) @ of_value[block_of]
            )
            of_heads.append(out)
        outs.append(torch.stack(of_heads, 1))
    return torch.stack(outs)


@pytest.mark.parametrize("path", matching("sol/s*.npz", 12), ids=lambda path: path.stem)
def test_public_outputs_of_sol(path: Path) -> None:
    golden = read(path)
    if golden.sink_tokens:
        pytest.skip(
            "the public code leaves rows of text to the rule; see test_summarised_attention"
        )
    q, k, v = (golden.values[name].float().requires_grad_() for name in "qkv")
    method = SolAttn(
        tau=golden.tau,
        order="raster",
        variance={"diag": "diagonal", "exact": "exact"}[golden.thresh_type],
        dense_layers=0,
        dense_steps=0,
    )
    grid = TokenGrid(1, 1, q.shape[1])
    assert torch.equal(method.selection(q, k, site(grid), scale=golden.scale), golden.exact)
    out = method.attend(q, k, v, site(grid), scale=golden.scale)
    torch.testing.assert_close(out, golden.out_public, atol=2e-6, rtol=1e-5)
    if "grad_out" in golden.values:
        grads = torch.autograd.grad(out, (q, k, v), golden.grad_out.float())
        for name, grad in zip("qkv", grads, strict=True):
            torch.testing.assert_close(grad, golden.values[f"d{name}"], atol=2e-6, rtol=1e-5)


def test_public_output_of_sol_with_summaries_of_blocks() -> None:
    (path,) = matching("sol/k00*.npz", 1)
    golden = read(path)
    leaves = [golden.values[name].float().requires_grad_() for name in "qkv"]
    method = SolAttn(tau=golden.arg_tau, order="raster", remainder="block-summary")
    out = method.attend(*leaves, site(TokenGrid(1, 1, leaves[0].shape[1])))
    torch.testing.assert_close(out, golden.out_public, atol=2e-6, rtol=1e-5)
    grads = torch.autograd.grad(out, leaves, golden.grad_out.float())
    for name, grad in zip("qkv", grads, strict=True):
        torch.testing.assert_close(grad, golden.values[f"d{name}_public"], atol=2e-6, rtol=1e-5)


def test_subblock_is_the_default() -> None:
    (path,) = matching("block-topk/b00_subblock44.npz", 1)
    golden = read(path)
    q, k = golden.q.float(), golden.k.float()
    blocks = golden.scores_public.shape[-1]
    method = BlockTopKAttn(keep=golden.topk / blocks, order="raster")
    grid = TokenGrid(1, 1, q.shape[1])
    got = method.selection(q, k, site(grid))
    want = torch.zeros(golden.scores_public.shape, dtype=torch.bool)
    want = want.scatter_(-1, golden.selected.long(), True)
    # The own block is seen beside the budget, so that one more is selected at most.
    own = torch.eye(blocks, dtype=torch.bool)
    assert (got | ~want | own).all()
    assert (got.sum(-1) - want.sum(-1) <= 1).all()


CASES: list[dict[str, Any]] = [
    {"order": order, "remainder": remainder} for order in ORDERS for remainder in REMAINDERS
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
@pytest.mark.parametrize("cls", METHODS)
def test_equals_the_definition(cls: Any, case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(3, 5, 7, text_before=5, text_after=9)
    method = cls(block=16, **case)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, grid.tokens, 2, 8))
    out = method.attend(q, k, v, site(grid))
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = truth(method, *leaves, grid)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), along)
    expected = torch.autograd.grad(want, leaves, along.double())
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, atol=5e-6, rtol=1e-4)


@given(
    st.tuples(*[st.integers(1, 6)] * 3), st.integers(0, 20), st.integers(0, 20), st.booleans(),
    st.sampled_from(METHODS), st.sampled_from(REMAINDERS), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_equals_the_definition_on_any_grid(
    sizes: tuple[int, int, int], before: int, after: int, masked: bool, cls: Any, remainder: str,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    grid = TokenGrid(*sizes, before, after)
    method = cls(block=16, remainder=remainder)
    q, k, v = torch.randn(3, 1, grid.tokens, 1, 4, dtype=torch.float64)
    key_mask = torch.rand(1, grid.tokens) < 0.7 if masked else None
    if masked:
        key_mask[0, 0] = True
        k[0, ~key_mask[0]] = torch.nan
        v[0, ~key_mask[0]] = torch.nan
    out = method.attend(q, k, v, site(grid), key_mask=key_mask)
    k, v = k.nan_to_num(0), v.nan_to_num(0)
    want = truth(method, q, k, v, grid, key_mask)
    seen = want.isfinite()
    torch.testing.assert_close(out[seen], want[seen], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cls", METHODS)
def test_text_sees_everything_and_is_seen(cls: Any) -> None:
    grid = TokenGrid(4, 6, 8, text_before=20, text_after=3)
    q, k = torch.randn(2, 1, grid.tokens, 1, 8)
    method = cls(block=16)
    mask = method.selection_mask(method.selection(q, k, site(grid))[0, 0], grid).dense()
    text = grid.is_text(torch.arange(grid.tokens))
    assert mask[text].all()
    assert mask[:, text].all()
    assert not mask[~text][:, ~text].all()


@pytest.mark.parametrize("cls", ALSO_BY_BLOCK)
def test_heads_and_samples_are_apart_and_queries_may_share_keys(cls: Any) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 6, 8)
    q = torch.randn(2, grid.tokens, 4, 8)
    k, v = torch.randn(2, 2, grid.tokens, 2, 8)
    method = cls(block=16)
    out = method.attend(q, k, v, site(grid))
    for sample in range(2):
        for head in range(4):
            part = slice(head // 2, head // 2 + 1)
            alone = method.attend(
                q[sample : sample + 1, :, head : head + 1],
                k[sample : sample + 1, :, part],
                v[sample : sample + 1, :, part],
                site(grid),
            )
            torch.testing.assert_close(
                out[sample : sample + 1, :, head : head + 1], alone, atol=2e-6, rtol=1e-5
            )
    with pytest.raises(ValueError, match="query has 4 heads and key 3"):
        method.attend(q, *torch.randn(2, 2, grid.tokens, 3, 8), site(grid))


@pytest.mark.parametrize(
    "method",
    [
        SolAttn(tau=-100),
        SolAttn(tau=-100, remainder="block-summary"),
        BlockTopKAttn(keep=1),
        BlockTopKAttn(keep=1, remainder="summary", block=32),
    ],
)
def test_what_keeps_everything_is_dense(method: SelectedBlocksMethod) -> None:
    grid = TokenGrid(3, 6, 8, text_after=7)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 8)
    out = method.attend(q, k, v, site(grid))
    torch.testing.assert_close(out, diffattn.attention(q, k, v), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("references", ["exact", "visible", "local"])
@pytest.mark.parametrize("cls", ALSO_BY_BLOCK)
def test_references_select_as_the_policy_says(cls: Any, references: str) -> None:
    torch.manual_seed(0)
    picture = Reference(10, 1, 8, 8)
    clip = Reference(10 + 64 + 256 + 6, 2, 8, 8, times=(0.0, 3.0))
    grid = TokenGrid(4, 8, 8, 74, 6 + 128 + 9, references=(picture, clip))
    method = cls(block=16, references=references)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, grid.tokens, 1, 8))
    mask = method.selection_mask(method.selection(q, k, site(grid))[0, 0], grid).dense()
    target = torch.arange(grid.video.start, grid.video.stop)
    inside = [torch.arange(r.start + 16, r.stop - 16) for r in grid.references]
    assert not mask[target][:, target].all()
    for number, tokens in enumerate(inside):
        other = inside[1 - number]
        whole_row = references == "exact"
        assert mask[tokens][:, tokens].all() == whole_row
        assert mask[tokens][:, other].all() == (references != "local")
        assert mask[target][:, tokens].all() == (references != "local")
        assert mask[:, :10].all()
        assert mask[:10].all()
    out = method.attend(q, k, v, site(grid))
    want = truth(method, *(x.detach().double() for x in (q, k, v)), grid)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    work = method.work(grid, 0, 1, 8)
    assert abs(mask.float().mean() - work.density) < 0.12


def test_lower_tau_keeps_more() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 8, 8)
    q, k = torch.randn(2, 1, grid.tokens, 2, 8)
    kept = [SolAttn(tau=tau, block=16).selection(q, k, site(grid)) for tau in (2.0, 1.0, 0.0, -1.0)]
    for few, many in itertools.pairwise(kept):
        assert (many | ~few).all()
        assert many.sum() > few.sum()


def test_heads_take_turns_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = TokenGrid(2, 6, 8)
    q, k, v = torch.randn(3, 1, grid.tokens, 3, 8)
    for method in (SolAttn(block=16), BlockTopKAttn(block=16)):
        want = method.attend(q, k, v, site(grid))
        monkeypatch.setattr("diffattn.methods.selected_blocks._BYTES_AT_ONCE", 1)
        torch.testing.assert_close(method.attend(q, k, v, site(grid)), want)
        monkeypatch.undo()


@pytest.mark.parametrize("method", [SolAttn(tau=0.8), BlockTopKAttn(keep=0.2, neighbours=1)])
def test_the_planned_density_is_near_that_of_normal_scores(method: SelectedBlocksMethod) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(8, 16, 16, text_after=64)
    q, k = torch.randn(2, 1, grid.tokens, 4, 32)
    chosen = method.selection(q, k, site(grid))
    planned = method.work(grid, 0, 4, 32).density
    assert planned is not None
    assert abs(chosen.float().mean() - planned) < 0.04


def test_the_plan_counts_what_remains_by_query_or_by_block() -> None:
    grid = TokenGrid(8, 16, 16, text_after=30)
    flops = {}
    for remainder in REMAINDERS:
        work = SolAttn(remainder=remainder).work(grid, 0, 2, 32)
        assert work is not None
        flops[remainder] = work.flops
    blocks, pooling = -(-grid.tokens // 64), grid.tokens * 64
    assert flops["summary"] - flops["drop"] == 4 * grid.tokens * blocks * 64 + pooling
    assert flops["block-summary"] - flops["drop"] == 4 * blocks**2 * 64 + pooling


@pytest.mark.parametrize(
    ("cls", "parameters", "message"),
    [
        (SolAttn, {"block": 24}, "block is 24, but must be 16, 32, 64, 128 or 256"),
        (SolAttn, {"order": "zigzag"}, "order is 'zigzag', but must be one of raster, tile, mort"),
        (SolAttn, {"tau": float("nan")}, "tau is nan, but must be a finite number"),
        (SolAttn, {"variance": "none"}, "variance is 'none', but must be one of diagonal, exact"),
        (SolAttn, {"neighbours": -1}, "neighbours is -1, but must be an integer of at least 0"),
        (SolAttn, {"remainder": "mean"}, "remainder is 'mean', but must be one of drop, summary"),
        (BlockTopKAttn, {"keep": 0}, "keep is 0, but must be a number above 0 and at most 1"),
        (BlockTopKAttn, {"parts": 3}, "parts is 3, but must be 1, 2, 4 or 8"),
        (BlockTopKAttn, {"score": "max"}, "score is 'max', but must be one of parts, mean"),
    ],
)
def test_bad_parameters_are_named(cls: Any, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**parameters)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("grid", "frames"),
    [
        (TokenGrid(5, 6, 7), (0,)),
        (TokenGrid(9, 8, 8, text_before=5, text_after=3), (0, -1)),
        (TokenGrid(4, 4, 9, 0, 40, references=(Reference(144, 1, 4, 10),)), (2, -4)),
    ],
)
def test_frames_are_seen_by_every_query(
    grid: TokenGrid, frames: tuple[int, ...], order: str
) -> None:
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    fixed: dict[str, Any] = {"block": 16, "order": order, "keep": 0.15}
    method = BlockTopKAttn(frames=frames, **fixed)
    of_frame = torch.zeros(grid.tokens, dtype=torch.bool)
    area = grid.height * grid.width
    for frame in frames:
        first = grid.text_before + frame % grid.frames * area
        of_frame[first : first + area] = True
    chosen = method.selection(q, k, site(grid))
    without = BlockTopKAttn(**fixed).selection(q, k, site(grid))
    for head in range(2):
        seen = method.selection_mask(chosen[0, head], grid).dense()
        assert seen[:, of_frame].all()
        # A block that holds no token of the frames is chosen as before, though among fewer.
        assert not seen.all()
        assert (
            not BlockTopKAttn(**fixed)
            .selection_mask(without[0, head], grid)
            .dense()[:, of_frame]
            .all()
        )
    torch.testing.assert_close(
        method.attend(q, k, v, site(grid)).double(),
        truth(method, q, k, v, grid),
        atol=2e-6,
        rtol=1e-5,
    )


def test_frames_that_are_none() -> None:
    assert BlockTopKAttn(frames=0) == BlockTopKAttn(frames=(0,)) == BlockTopKAttn(frames=[0])  # type: ignore[arg-type]
    q = torch.zeros(1, 24, 1, 8)
    method = BlockTopKAttn(frames=(3,), block=16)
    message = (
        "frames has 3, but the video has 2 latent frames: give numbers from 0 to 1, or from -1"
    )
    with pytest.raises(ValueError, match=message):
        method.attend(q, q, q, site(TokenGrid(2, 3, 4)))
    with pytest.raises(ValueError, match="frames is 'first', but must be integers, the indices of"):
        BlockTopKAttn(frames="first")  # type: ignore[arg-type]
