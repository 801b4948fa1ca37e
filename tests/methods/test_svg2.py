"""SVG2Attn: the definition in float64, text, padding, references, odd sizes, bad parameters."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_wan
import torch
from cluster_truth import SMALL, seen_pairs, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import CASES

import diffattn
from diffattn import Reference, SVG2Attn, TokenGrid
from diffattn.methods.base import Site

WAYS: list[dict[str, Any]] = [
    {"remainder": "drop"},
    {"remainder": "summary"},
    {"remainder": "summary", "route": "error"},
]
# With text before, after and beside, with padding, with references, with two kinds of sites.
FAMILIES = (
    "hunyuanvideo", "allegro-padded", "cogvideox-5b", "kandinsky-5", "qwen-image-padded",
    "minimax-h3-references", "flux-kontext", "sdxl",
)  # fmt: skip
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))


def site(grid: TokenGrid) -> Site:
    return Site("wan", 5, 10, grid)


@pytest.mark.parametrize(("query_block", "block"), [(16, 16), (64, 32), (32, 64)])
@each_way
def test_equals_the_definition(way: dict[str, Any], query_block: int, block: int) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(3, 5, 7, text_before=5, text_after=9)
    method = SVG2Attn(**(SMALL | way | {"query_block": query_block, "block": block}))
    leaves = [x.requires_grad_() for x in torch.randn(3, 2, grid.tokens, 2, 8)]
    pairs = method.selection(*leaves, site(grid))
    assert 0.2 < seen_pairs(pairs).float().mean() < 0.9
    out = method.attend(*leaves, site(grid))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = truth(*exact, pairs, method.remainder == "summary")
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, along)
    expected = torch.autograd.grad(want, exact, along.double())
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, atol=5e-6, rtol=1e-4)


@given(
    st.tuples(*[st.integers(1, 6)] * 3), st.integers(0, 20), st.integers(0, 20), st.booleans(),
    st.sampled_from(WAYS), st.sampled_from([1, 3, 20, 500]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_equals_the_definition_on_any_grid(
    sizes: tuple[int, int, int], before: int, after: int, masked: bool, way: dict[str, Any],
    key_cluster: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    grid = TokenGrid(*sizes, before, after)
    method = SVG2Attn(**(SMALL | way | {"key_cluster": key_cluster}))
    q, k, v = torch.randn(3, 1, grid.tokens, 1, 4, dtype=torch.float64)
    key_mask = torch.rand(1, grid.tokens) < 0.7 if masked else None
    if masked:
        key_mask[0, 0] = True
        k[0, ~key_mask[0]] = torch.nan
        v[0, ~key_mask[0]] = torch.nan
    out = method.attend(q, k, v, site(grid), key_mask=key_mask)
    pairs = method.selection(q, k, v, site(grid), key_mask=key_mask)
    k, v = k.nan_to_num(0), v.nan_to_num(0)
    want = truth(q, k, v, pairs, method.remainder == "summary")
    seen = want.isfinite()
    torch.testing.assert_close(out[seen], want[seen], atol=1e-6, rtol=1e-5)
    assert out.isfinite().all()


@each_way
def test_text_sees_everything_and_is_seen(way: dict[str, Any]) -> None:
    grid = TokenGrid(4, 6, 8, text_before=20, text_after=3)
    x = torch.randn(3, 1, grid.tokens, 1, 8)
    mask = seen_pairs(SVG2Attn(**(SMALL | way)).selection(*x, site(grid)))[0, 0]
    text = grid.is_text(torch.arange(grid.tokens))
    assert mask[text].all()
    assert mask[:, text].all()
    assert not mask[~text][:, ~text].all()


@each_way
def test_rows_hold_the_mass_and_no_more(way: dict[str, Any]) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 8, 8)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 8) * 2
    kept = [
        SVG2Attn(**(SMALL | way | {"top_p": p, "min_ratio": 0})).selection(q, k, v, site(grid))
        for p in (0.2, 0.5, 0.9)
    ]
    shares = [seen_pairs(pairs).float().mean() for pairs in kept]
    assert shares[0] < shares[1] < shares[2] < 1
    assert all((pairs.chosen[:, :, :-1].any(-1)).all() for pairs in kept)
    half = SVG2Attn(**(SMALL | way | {"top_p": 0.01, "min_ratio": 0.5}))
    chosen = half.selection(q, k, v, site(grid)).chosen[:, :, :-1, :-1]
    assert (chosen.sum(-1) >= chosen.shape[-1] // 2).all()


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_p": 1},
        {"min_ratio": 1},
        {"query_cluster": 10**6, "key_cluster": 10**6},
        # Each key is a cluster of its own, which its mean does not change.
        {"key_cluster": 1, "remainder": "summary", "iterations": 1},
    ],
)
def test_what_keeps_everything_is_dense(parameters: dict[str, Any]) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(3, 6, 8, text_after=7)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 8)
    out = SVG2Attn(**(SMALL | parameters)).attend(q, k, v, site(grid))
    torch.testing.assert_close(out, diffattn.attention(q, k, v), atol=2e-6, rtol=1e-5)


@each_way
def test_heads_and_samples_are_apart_and_queries_may_share_keys(way: dict[str, Any]) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 6, 8)
    q = torch.randn(2, grid.tokens, 4, 8)
    k, v = torch.randn(2, 2, grid.tokens, 2, 8)
    method = SVG2Attn(**(SMALL | way))
    out = method.attend(q, k, v, site(grid))
    for sample in range(2):
        for head in range(4):
            one, part = slice(sample, sample + 1), slice(head // 2, head // 2 + 1)
            own = slice(head, head + 1)
            alone = method.attend(q[one, :, own], k[one, :, part], v[one, :, part], site(grid))
            torch.testing.assert_close(out[one, :, own], alone, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="query has 4 heads and key 3"):
        method.attend(q, *torch.randn(2, 2, grid.tokens, 3, 8), site(grid))


@each_way
def test_heads_take_turns_where_memory_is_short(
    way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = TokenGrid(2, 6, 8)
    x = torch.randn(3, 1, grid.tokens, 3, 8)
    method = SVG2Attn(**(SMALL | way))
    want = method.attend(*x, site(grid))
    monkeypatch.setattr("diffattn.methods.svg2._BYTES_AT_ONCE", 1)
    monkeypatch.setattr("diffattn.kernels.clusters.torch_passes._AT_ONCE", 64)
    torch.testing.assert_close(method.attend(*x, site(grid)), want)


@pytest.mark.parametrize("references", ["exact", "visible", "local"])
def test_references_select_as_the_policy_says(references: str) -> None:
    torch.manual_seed(0)
    picture = Reference(10, 1, 8, 8)
    clip = Reference(10 + 64 + 256 + 6, 2, 8, 8, times=(0.0, 3.0))
    grid = TokenGrid(4, 8, 8, 74, 6 + 128 + 9, references=(picture, clip))
    method = SVG2Attn(**(SMALL | {"references": references}))
    q, k, v = torch.randn(3, 1, grid.tokens, 1, 8)
    pairs = method.selection(q, k, v, site(grid))
    mask = seen_pairs(pairs)[0, 0]
    target = torch.arange(grid.video.start, grid.video.stop)
    inside = [torch.arange(r.start, r.stop) for r in grid.references]
    assert not mask[target][:, target].all()
    for number, tokens in enumerate(inside):
        other = inside[1 - number]
        assert mask[tokens][:, tokens].all() == (references == "exact")
        assert mask[tokens][:, other].all() == (references != "local")
        assert mask[target][:, tokens].all() == (references != "local")
        assert mask[:, :10].all()
        assert mask[:10].all()
    out = method.attend(q, k, v, site(grid))
    torch.testing.assert_close(out.double(), truth(q, k, v, pairs, False), atol=2e-6, rtol=1e-5)


@each_way
def test_the_same_tensors_give_the_same_bits(way: dict[str, Any]) -> None:
    grid = TokenGrid(2, 7, 9, text_after=5)
    leaves = [x.requires_grad_() for x in torch.randn(3, 1, grid.tokens, 2, 8)]
    method = SVG2Attn(**(SMALL | way))
    along = torch.randn_like(leaves[0])
    outs = [method.attend(*leaves, site(grid)) for _ in range(2)]
    assert torch.equal(*outs)
    first, second = (torch.autograd.grad(out, leaves, along) for out in outs)
    assert all(map(torch.equal, first, second))


@each_way
def test_half_precision_and_autocast_choose_alike(way: dict[str, Any]) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 6, 8, text_before=3)
    x = torch.randn(3, 1, grid.tokens, 2, 8).bfloat16()
    method = SVG2Attn(**(SMALL | way))
    out = method.attend(*x, site(grid))
    assert out.dtype == torch.bfloat16
    pairs = method.selection(*x, site(grid))
    want = truth(*x, pairs, method.remainder == "summary")
    torch.testing.assert_close(out.double(), want, atol=0.03, rtol=0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = method.attend(*x.float(), site(grid))
        inside = method.selection(*x.float(), site(grid))
    assert cast.dtype == torch.bfloat16
    assert torch.equal(inside.chosen, pairs.chosen)
    torch.testing.assert_close(cast.double(), want, atol=0.03, rtol=0.03)


def test_tokens_that_are_all_equal() -> None:
    grid = TokenGrid(2, 5, 5)
    q, k, v = torch.ones(3, 1, grid.tokens, 1, 8)
    out = SVG2Attn(**SMALL).attend(q, k, v, site(grid))
    torch.testing.assert_close(out, v)


def test_a_higher_share_of_the_mass_costs_more() -> None:
    grid = TokenGrid(21, 45, 80)
    low, high = (SVG2Attn(top_p=p).work(grid, 0, 40, 128) for p in (0.8, 0.95))
    assert low.density < high.density < 0.5
    ear = SVG2Attn(top_p=0.8, remainder="summary", route="error").work(grid, 0, 40, 128)
    assert ear.density == low.density
    assert ear.selection_flops > low.selection_flops
    assert ear.flops > low.flops
    assert SVG2Attn(top_p=1).work(grid, 0, 40, 128).flops == 4 * grid.tokens**2 * 40 * 128


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_to_models(family: str) -> None:
    case = CASES[family]
    model, inputs = case.build(), case.inputs()

    def output(method: SVG2Attn | None) -> torch.Tensor:
        diffattn.set_attn_processor(model, method)
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    always = {"dense_layers": 0, "dense_steps": 0}
    want = output(None)
    everything = output(SVG2Attn(**(SMALL | always | {"min_ratio": 1})))
    torch.testing.assert_close(everything, want, atol=1e-5, rtol=1e-4)
    few = SMALL | always | {"top_p": 0.1, "min_ratio": 0, "query_cluster": 8, "key_cluster": 2}
    out = output(SVG2Attn(**few))
    assert out.isfinite().all()
    assert not torch.allclose(out, want, atol=1e-3), "the selection should matter"


@each_way
def test_compiled_whole(way: dict[str, Any]) -> None:
    torch._dynamo.reset()
    method = SVG2Attn(**(SMALL | way), dense_layers=0, dense_steps=0)
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, method)
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 12, 10),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 5, tiny_wan.TEXT_DIM),
        "return_dict": False,
    }
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"block": 24}, "block is 24, but must be a multiple of 16: try 16 or 32"),
        ({"query_block": 100}, "query_block is 100, but must be a multiple of 16: try 96 or 112"),
        ({"query_block": 8}, "query_block is 8, but must be an integer of at least 16"),
        ({"query_cluster": 0}, "query_cluster is 0, but must be an integer of at least 1"),
        ({"key_cluster": 7.5}, "key_cluster is 7.5, but must be an integer of at least 1"),
        ({"top_p": 0}, "top_p is 0, but must be a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1, but must be a number above 0 and at most 1"),
        ({"min_ratio": -0.1}, "min_ratio is -0.1, but must be a number of at least 0 and at most"),
        ({"iterations": 0}, "iterations is 0, but must be an integer of at least 1"),
        ({"remainder": "mean"}, "remainder is 'mean', but must be one of drop, summary"),
        ({"route": "best"}, "route is 'best', but must be one of mass, error"),
        ({"route": "error"}, "remainder is 'drop': set remainder='summary', or route='mass'"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVG2Attn(**parameters)
