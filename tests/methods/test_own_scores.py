"""Scores and rules of a user's own in BlockTopKAttn: functions, values, methods made of them."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import outside_method
import pytest
import tiny_wan
import torch

import diffattn
from diffattn import BlockTopKAttn, SolAttn, TokenGrid
from diffattn.methods import METHODS, from_dict, register_method
from diffattn.methods.base import Site
from diffattn.routing import Above, AboveMean, Count, Mass, Pooled, Share, mean_scores

GRID = TokenGrid(3, 6, 9, text_before=5, text_after=20)


def site(grid: TokenGrid = GRID) -> Site:
    return Site("wan", 5, 10, grid)


def tokens(grid: TokenGrid = GRID, heads: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 2, grid.tokens, heads, 8)


def means_product(pooled: Pooled) -> torch.Tensor:
    return mean_scores(pooled.query_means, pooled.key_means, pooled.scale)


def by_hand(pooled: Pooled) -> torch.Tensor:
    """Products of means without a part of the library."""
    return torch.einsum("bqhd,bkhd->bhqk", pooled.query_means, pooled.key_means) * pooled.scale


def best_quarter(scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
    return Share(0.25)(scores, pooled)


def nothing(scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
    return torch.zeros_like(scores, dtype=torch.bool)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("remainder", ["drop", "summary", "block-summary"])
def test_functions_do_what_the_names_do(remainder: str, masked: bool) -> None:
    q, k, v = tokens()
    key_mask = torch.rand(2, GRID.tokens) < 0.7 if masked else None
    fixed: dict[str, Any] = {"block": 16, "remainder": remainder}
    want = BlockTopKAttn(score="mean", **fixed)
    got = BlockTopKAttn(score=means_product, keep=best_quarter, **fixed)
    out = got.attend(q, k, v, site(), key_mask=key_mask)
    assert torch.equal(out, want.attend(q, k, v, site(), key_mask=key_mask))
    chosen = BlockTopKAttn(score=by_hand, **fixed).selection(q, k, site(), key_mask=key_mask)
    assert torch.equal(chosen, want.selection(q, k, site(), key_mask=key_mask))


def test_sol_is_a_combination_of_parts() -> None:
    q, k, v = tokens()
    parts = BlockTopKAttn(
        block=16, score="mean", keep=AboveMean(0.5, "diagonal"), neighbours=1, remainder="summary"
    )
    want = SolAttn(block=16, tau=0.5)
    assert torch.equal(parts.attend(q, k, v, site()), want.attend(q, k, v, site()))
    assert parts.work(GRID, 0, 2, 8) == want.work(GRID, 0, 2, 8)


def test_the_rule_decides_and_gradients_reach_what_it_keeps() -> None:
    """A rule that keeps nothing leaves a block its own tokens and the text."""
    grid = TokenGrid(1, 4, 16)
    q, k, v = (x.requires_grad_() for x in tokens(grid))
    method = BlockTopKAttn(block=16, order="raster", score=means_product, keep=nothing)
    out = method.attend(q, k, v, site(grid))
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[:, n : n + 16].transpose(1, 2) for x in leaves)
            ).transpose(1, 2)
            for n in range(0, 64, 16)
        ],
        1,
    )
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), along)
    expected = torch.autograd.grad(want, leaves, along.double())
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, atol=5e-6, rtol=1e-4)


def test_a_score_of_minus_infinity_or_nan_rules_a_pair_out() -> None:
    q, k, _ = tokens()

    def without_two(pooled: Pooled) -> torch.Tensor:
        scores = means_product(pooled)
        scores[..., 3] = -torch.inf
        scores[..., 4] = torch.nan
        return scores

    for keep in (0.3, Count(3), Mass(0.5)):
        method = BlockTopKAttn(block=16, score=without_two, keep=keep)
        candidates = ~method._always(GRID, torch.device("cpu")).pairs
        kept = method.selection(q, k, site()) & candidates
        assert not kept[..., 3:5].any()
        assert kept.any()
        if keep == Count(3):
            candidates[:, 3:5] = False
            assert torch.equal(kept.sum(-1), candidates.sum(1).clamp(max=3).expand(2, 2, -1))


def test_a_constant_is_a_threshold() -> None:
    q, k, _ = tokens()
    above = BlockTopKAttn(block=16, score="mean", keep=Above(0.05))
    by_hand = BlockTopKAttn(
        block=16, score="mean", keep=lambda scores, pooled: pooled.candidates & (scores > 0.05)
    )
    chosen = above.selection(q, k, site())
    assert torch.equal(chosen, by_hand.selection(q, k, site()))
    assert 0 < chosen.float().mean() < 1
    assert above.work(GRID, 0, 2, 8) is None


def test_counts_and_masses_are_what_they_say() -> None:
    q, k, _ = tokens()
    method = BlockTopKAttn(block=16, score="mean", keep=Count(2))
    always = method._always(GRID, torch.device("cpu"))
    chosen = method.selection(q, k, site())
    assert torch.equal(
        (chosen & ~always.pairs).sum(-1), always.candidates.clamp(max=2).expand(2, 2, -1)
    )
    work = method.work(GRID, 0, 2, 8)
    assert work is not None
    assert work.density == pytest.approx(chosen.float().mean().item())
    kept = []

    def spy(scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
        candidates = pooled.candidates.expand(scores.shape)
        weights = scores.double().masked_fill(~candidates, -torch.inf).softmax(-1).nan_to_num(0)
        found = Mass(0.6, least=2)(scores, pooled)
        kept.append((weights, found, candidates))
        return found

    BlockTopKAttn(block=16, score="mean", keep=spy).selection(q, k, site())
    ((weights, found, candidates),) = kept
    assert not (found & ~candidates).any()
    rows = candidates.any(-1)
    share = (weights * found).sum(-1)
    assert (share[rows] > 0.6 - 1e-6).all()
    assert (found.sum(-1)[rows] >= candidates.sum(-1).clamp(max=2)[rows]).all()
    # Without its least block, a row has no more than the share, or its least number of blocks.
    least = weights.masked_fill(~found, 2).amin(-1)
    enough = (share - least <= 0.6 + 1e-6) | (found.sum(-1) <= 2)
    assert enough[rows].all()


def test_functions_run_in_attached_and_compiled_models() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 16, 5, 12, 16, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 4, tiny_wan.TEXT_DIM, generator=generator),
        "return_dict": False,
    }
    model = tiny_wan.transformer()
    outs = []
    with torch.no_grad():
        for score in ("mean", means_product):
            method = BlockTopKAttn(block=16, score=score, dense_steps=0)
            attachment = diffattn.set_attn_processor(model, method)
            assert attachment is not None
            assert "block-topk" in str(attachment.describe(TokenGrid(5, 6, 8), 4))
            outs.append(model(**inputs)[0])
        outs.append(torch.compile(model, backend="eager")(**inputs)[0])
        diffattn.set_attn_processor(model, None)
        dense = model(**inputs)[0]
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[0], outs[2], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(outs[0], dense)


def test_methods_with_functions_are_values() -> None:
    method = BlockTopKAttn(score=means_product, keep=best_quarter)
    assert method == BlockTopKAttn(score=means_product, keep=best_quarter)
    assert method != BlockTopKAttn(score=by_hand, keep=best_quarter)
    assert len({method, BlockTopKAttn(score=means_product, keep=best_quarter)}) == 1
    for same in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert same == method
    assert method.for_model("wan2.1").score is means_product


@pytest.mark.parametrize(
    "rule", [Share(0.3), Count(7), Mass(0.9, 2), AboveMean(-0.5, "diagonal"), Above(0.1)]
)
def test_rules_go_to_json_and_back(rule: Any) -> None:
    method = BlockTopKAttn(keep=rule, score="mean")
    entry = json.loads(json.dumps(method.to_dict()))
    assert entry["keep"]["rule"] == rule.name
    assert from_dict(entry) == method


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"score": means_product}, "score is the function means_product, which has no name that a"),
        ({"keep": best_quarter}, "keep is the function best_quarter, which has no name that a fi"),
        ({"score": lambda pooled: pooled}, "score is the function .*lambda>, which has no name"),
    ],
)
def test_functions_are_refused_by_json(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockTopKAttn(**parameters).to_dict()


def test_plans_know_what_values_keep_and_refuse_what_they_cannot_know() -> None:
    for keep in (0.2, Count(5), AboveMean(1)):
        found = diffattn.plan("Wan-AI/Wan2.1-T2V-1.3B", BlockTopKAttn(keep=keep))
        assert isinstance(found, diffattn.Estimate)
        assert 0 < (found.density or 0) < 1
    for unknown in (best_quarter, Mass(0.9)):
        with pytest.raises(ValueError, match="block-topk has no mask that the grid alone decides"):
            diffattn.plan("Wan-AI/Wan2.1-T2V-1.3B", BlockTopKAttn(keep=unknown))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"score": 3},
            "score is 3, but must be one of parts, mean, or a function of pooled",
        ),
        (
            {"score": Mass},
            "score is <class .*Mass'>, but must be one of parts, mean, or a function",
        ),
        ({"keep": Mass}, "keep is <class .*, but must be a number above 0 and at most 1, or a rul"),
        (
            {"keep": {"rule": "best"}},
            "there is no rule 'best'; choose from above, above-mean",
        ),
        ({"keep": {"rule": "mas"}}, "there is no rule 'mas'; did you mean 'mass'?"),
        ({"keep": {"rule": "mass"}}, "the rule 'mass' needs a value 'share'"),
        ({"keep": {"rule": "mass", "share": 0.5, "lest": 1}}, "has no value 'lest'; did you mean"),
        (
            {"keep": {"share": 0.5}},
            "keep is {'share': 0.5}, but must be a number above 0 and at mos",
        ),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockTopKAttn(**parameters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Share(0), "share is 0, but must be a number above 0 and at most 1"),
        (lambda: Share(1.5), "share is 1.5, but must be a number above 0 and at most 1"),
        (lambda: Count(0), "blocks is 0, but must be an integer of at least 1"),
        (lambda: Count(2.5), "blocks is 2.5, but must be an integer of at least 1"),
        (lambda: Mass(2), "share is 2, but must be a number above 0 and at most 1"),
        (lambda: Mass(0.5, 0), "least is 0, but must be an integer of at least 1"),
        (lambda: AboveMean(float("inf")), "tau is inf, but must be a finite number"),
        (lambda: AboveMean(1, "row"), "variance is 'row', but must be one of diagonal, exact"),
    ],
)
def test_bad_values_of_rules_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


SHAPE = r"\(batch, heads, query blocks, key blocks\) = \(2, 2, 12, 12\)"


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        (
            {"score": lambda pooled: None},
            TypeError,
            f"lambda>, which returned a NoneType, but must return floating-point scores, as a"
            f" tensor {SHAPE}",
        ),
        (
            {"score": lambda pooled: torch.zeros(2, 2, 12)},
            ValueError,
            rf"which returned a tensor \(2, 2, 12\), but must return floating-point sc.*{SHAPE}",
        ),
        (
            {"score": lambda pooled: torch.zeros(pooled.shape, dtype=torch.int64)},
            TypeError,
            r"which returned torch.int64, but must return floating-point scores",
        ),
        (
            {"score": lambda pooled: torch.zeros(pooled.shape, device="meta")},
            ValueError,
            "which returned a tensor on meta, but the tokens are on cpu; return it there",
        ),
        (
            {"keep": lambda scores, pooled: scores},
            TypeError,
            "keep is the function .*lambda>, which returned torch.float32, but must return torch.b",
        ),
        (
            {"keep": lambda scores, pooled: scores[0] > 0},
            ValueError,
            rf"which returned a tensor \(2, 12, 12\), but must return the pairs to keep.*{SHAPE}",
        ),
        (
            {"keep": lambda scores, pooled: [True]},
            TypeError,
            "which returned a list, but must return the pairs to keep, a bool for each, as a tens",
        ),
    ],
)
def test_what_functions_return_is_checked(
    parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    q, k, v = tokens()
    with pytest.raises(error, match=message):
        BlockTopKAttn(block=16, **parameters).attend(q, k, v, site())


def test_scores_in_half_precision_are_ranked_in_float32() -> None:
    q, k, _ = tokens()
    seen = []

    def half(pooled: Pooled) -> torch.Tensor:
        return means_product(pooled).bfloat16()

    def look(scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
        seen.append(scores.dtype)
        return Share(0.25)(scores, pooled)

    BlockTopKAttn(block=16, score=half, keep=look).selection(q, k, site())
    assert seen == [torch.float32]


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The modules of the document's section, and no name of theirs left behind."""
    modules = []
    for number, code in enumerate(outside_method.sources_under("A score or a rule of your own")):
        (tmp_path / f"own_scores_{number}.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        modules.append(__import__(f"own_scores_{number}"))
    yield modules
    METHODS.pop("near-topk", None)


def test_the_document_does_what_it_says(documented: list[Any]) -> None:
    functions, named = documented
    grid = TokenGrid(4, 16, 16)
    q, k, v = tokens(grid)
    out = functions.method.attend(q, k, v, site(grid))
    assert out.shape == q.shape
    plain = BlockTopKAttn(score="mean", keep=functions.above_average, remainder="summary")
    near, all_alike = (x.selection(q, k, site(grid)) for x in (functions.method, plain))
    number = torch.arange(near.shape[-1])
    distance = (number[:, None] - number).abs()
    assert (distance * near).sum() < (distance * all_alike).sum()
    register_method(named.NearTopKAttn)
    method = from_dict({"type": "near-topk", "cost": 3.0, "block": 16, "score": "mean"})
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    chosen, others = (
        x.selection(q, k, site(grid))  # type: ignore[attr-defined]
        for x in (method, BlockTopKAttn(block=16, score="mean"))
    )
    number = torch.arange(chosen.shape[-1])
    distance = (number[:, None] - number).abs()
    assert chosen.sum() == others.sum()
    assert (distance * chosen).sum() < (distance * others).sum()
    assert diffattn.plan("Wan-AI/Wan2.1-T2V-1.3B", method) is not None
