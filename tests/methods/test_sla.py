"""SLAAttn: goldens of the public code, the definition in float64, text, padding, odd sizes."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from content_goldens import read
from golden_files import matching
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_device import triton_device

import diffattn
from diffattn import Reference, SLAAttn, TokenGrid
from diffattn.methods.base import Site
from diffattn.methods.sla.weights import SLAWeights, head_width
from diffattn.operator import BACKEND_VARIABLE


class OneHead(torch.nn.Module):
    """What the weights of a site need to know of an attention module."""

    heads = 1

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(width, width, dtype=dtype)


def weights_of(width: int, dtype: torch.dtype = torch.float32, spread: float = 0.5) -> SLAWeights:
    weights = SLAWeights(OneHead(width, dtype))
    for parameter in weights.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return weights


def site(grid: TokenGrid, weights: SLAWeights) -> Site:
    return Site("wan", 5, 10, grid, weights=weights)


def features(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "softmax":
        powers = (x - x.amax(-1, keepdim=True)).exp()
        return powers / powers.sum(-1, keepdim=True)
    if name == "relu":
        return x * (x > 0)
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def truth(
    method: SLAAttn,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    grid: TokenGrid,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition in float64, token by token: dense weights, and blocks in a loop."""
    chosen = method.selection(q, k, site(grid, weights_of(q.shape[-1])), key_mask=key_mask)
    video = torch.arange(grid.video.start, grid.video.stop)
    outs = torch.zeros_like(q)
    for sample in range(q.shape[0]):
        there = torch.ones(grid.tokens).bool() if key_mask is None else key_mask[sample]
        for head in range(q.shape[2]):
            query, key, value = (x[sample, :, head] for x in (q, k, v))
            scores = query @ key.T * q.shape[-1] ** -0.5
            seen = torch.ones(grid.tokens, grid.tokens).bool()
            marginal = torch.zeros_like(seen)
            rows = video.split(method.block_q)
            columns = video.split(method.block_kv)
            counted = [c[there[c]] for c in columns]
            mean = key[video][there[video]].mean(0)
            for m, row in enumerate(rows):
                middle = query[row[there[row]]].mean(0).nan_to_num(0)
                order = sorted(
                    (n for n in range(len(columns)) if len(counted[n])),
                    key=lambda n: float((middle @ (key[counted[n]].mean(0) - mean)).detach()),
                )
                left_out = order[: min(int(method.drop * len(columns)), len(order))]
                for n, column in enumerate(columns):
                    picked = bool(chosen[sample, head, m, n])
                    seen[row[:, None], column] = picked
                    linear = method.linear == "all" or not (picked or n in left_out)
                    marginal[row[:, None], column] = linear
                count = max(1, int(method.keep * len(columns)))
                picks = {n for n in range(len(columns)) if chosen[sample, head, m, n]}
                assert len(picks) == min(count, len(order))
                # A block without a query that counts has no scores.
                if there[row].any() and len(order) > count:
                    assert picks == set(order[-count:])
            weights = scores.masked_fill(~(seen & there), -torch.inf).softmax(-1)
            out = weights @ value
            of_query, of_key = (features(x, method.features) for x in (query, key))
            products = (of_query @ of_key.T).masked_fill(~(marginal & there), 0)
            total = products.sum(-1, keepdim=True) + (1e-5 if method.linear == "all" else 0)
            added = products @ value / total.masked_fill(total == 0, 1)
            projected = added @ weight.T + bias
            projected[grid.is_text(torch.arange(grid.tokens))] = 0
            outs[sample, :, head] = out + projected
    return outs


@pytest.mark.parametrize("path", matching("sla/s*.npz", 11), ids=lambda path: path.stem)
def test_public_outputs_and_gradients(path: Path) -> None:
    check_golden(path, "cpu")


@pytest.mark.parametrize("path", matching("sla/s0[37]*.npz", 2), ids=lambda path: path.stem)
def test_public_outputs_and_gradients_by_triton(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = triton_device(monkeypatch)
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    check_golden(path, device)


def check_golden(path: Path, device: str) -> None:
    golden = read(path)
    meta = ast.literal_eval(golden.meta)
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[meta["dtype"]]
    q, k, v, along = (
        (golden.values[name].float() / meta["scale_of_int8"]).to(device, dtype).transpose(1, 2)
        for name in ("q", "k", "v", "do")
    )
    q, k, v = (x.contiguous().requires_grad_() for x in (q, k, v))
    weights = SLAWeights(OneHead(q.shape[-1], torch.float32)).to(device)
    with torch.no_grad():
        weights.proj_l.weight.copy_(golden.weight)
        weights.proj_l.bias.copy_(golden.bias)
    method = SLAAttn(
        keep=meta["topk_ratio"],
        linear=meta["variant"],
        features=meta["feature_map"],
        block_q=meta["block_q"],
        block_kv=meta["block_k"],
    )
    where = site(TokenGrid(1, 1, q.shape[1]), weights)
    assert torch.equal(method.selection(q, k, where).cpu(), golden.block_map.bool())
    out = method.attend(q, k, v, where)
    assert out.dtype == dtype
    near = {"atol": 2e-6, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 4e-3, "rtol": 4e-3}
    torch.testing.assert_close(out.float().cpu(), golden.o.transpose(1, 2), **near)
    found = torch.autograd.grad(out, (q, k, v, *weights.parameters()), along)
    for name, grad in zip(("dq", "dk", "dv", "dweight", "dbias"), found, strict=True):
        want = golden.values[name]
        want = want.transpose(1, 2) if want.ndim == 4 else want
        limit = near | {"atol": near["atol"] * max(1, want.abs().max().item())}
        torch.testing.assert_close(
            grad.float().cpu(), want, **limit, msg=lambda said, name=name: f"{name}: {said}"
        )


FORMS: list[dict[str, Any]] = [
    {"linear": "all"},
    {"linear": "rest"},
    {"linear": "rest", "drop": 0.3},
    {"linear": "all", "features": "elu"},
    {"linear": "rest", "features": "elu", "drop": 0.2},
    {"linear": "rest", "keep": 1.0},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equals_the_definition_with_text(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(3, 5, 7, text_before=5, text_after=9)
    method = SLAAttn(**{"keep": 0.35, "block_q": 32, "block_kv": 16} | form)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, grid.tokens, 2, 8))
    weights = weights_of(8)
    out = method.attend(q, k, v, site(grid, weights))
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, *weights.parameters())]
    want = truth(method, *leaves, grid)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v, *weights.parameters()), along)
    expected = torch.autograd.grad(want, leaves, along.double())
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, atol=2e-5, rtol=1e-4)


@given(
    st.tuples(*[st.integers(1, 6)] * 3), st.integers(0, 20), st.integers(0, 20), st.booleans(),
    st.sampled_from(FORMS), st.sampled_from([16, 64]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_equals_the_definition_on_any_grid(
    sizes: tuple[int, int, int], before: int, after: int, masked: bool, form: dict[str, Any],
    block_q: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    grid = TokenGrid(*sizes, before, after)
    method = SLAAttn(**{"keep": 0.35, "block_q": block_q, "block_kv": 16} | form)
    q, k, v = torch.randn(3, 1, grid.tokens, 1, 4, dtype=torch.float64)
    weights = weights_of(4, torch.float64)
    key_mask = torch.rand(1, grid.tokens) < 0.7 if masked else None
    if key_mask is not None:
        key_mask[0, grid.video.start] = True
        # Torch's own attention, which text has, gives NaN where padding is NaN.
        filling = torch.nan if grid.tokens == grid.video_tokens else 100
        k[0, ~key_mask[0]] = filling
        v[0, ~key_mask[0]] = filling
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = method.attend(q, k, v, site(grid, weights), key_mask=key_mask)
    k0, v0 = k.detach().nan_to_num(0), v.detach().nan_to_num(0)
    want = truth(method, q, k0, v0, *weights.parameters(), grid, key_mask)
    counted = slice(None) if key_mask is None else key_mask[0]
    torch.testing.assert_close(out[:, counted], want[:, counted], atol=1e-6, rtol=1e-5)
    for grad in torch.autograd.grad(out[:, counted].sum(), (q, k, v)):
        assert grad.isfinite().all()


def test_before_training_it_is_attention_to_the_critical_blocks() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 6, 8, text_before=20, text_after=3)
    q, k, v = torch.randn(3, 1, grid.tokens, 1, 8)
    untrained = SLAWeights(OneHead(8, torch.float32))
    for form in FORMS:
        method = SLAAttn(**{"block_q": 32, "block_kv": 16, "keep": 0.3} | form)
        where = site(grid, untrained)
        out = method.attend(q, k, v, where)
        mask = method.selection_mask(method.selection(q, k, where)[0, 0], grid)
        torch.testing.assert_close(out, diffattn.attention(q, k, v, mask), atol=2e-6, rtol=1e-5)
        text, pairs = grid.is_text(torch.arange(grid.tokens)), mask.dense()
        assert pairs[text].all()
        assert pairs[:, text].all()
        assert pairs[~text][:, ~text].all() == (method.keep == 1)


def test_linear_attention_over_all_is_a_mean_of_values() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 5, 7)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 8)
    identity, nothing = weights_of(8, spread=0.0), weights_of(8, spread=0.0)
    torch.nn.init.eye_(identity.proj_l.weight)
    method = SLAAttn(block_q=16, block_kv=16, keep=0.2)
    added = method.attend(q, k, v, site(grid, identity))
    added = added - method.attend(q, k, v, site(grid, nothing))
    assert (added <= v.amax(1, keepdim=True) + 1e-4).all()
    assert (added >= v.amin(1, keepdim=True) - 1e-4).all()
    assert added.std() > 0.01


def test_a_constant_in_all_keys_changes_no_selection() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 8, 8)
    q, k = torch.randn(2, 2, grid.tokens, 2, 16)
    method = SLAAttn(block_q=32, block_kv=16, keep=0.3)
    where = site(grid, weights_of(16))
    chosen = method.selection(q, k, where)
    assert torch.equal(method.selection(3 * q, k + 50 * torch.randn(16), where), chosen)
    assert (chosen.sum(-1) == int(0.3 * 16)).all()
    few = SLAAttn(block_q=32, block_kv=16, keep=0.01)
    assert (few.selection(q, k, where).sum(-1) == 1).all()


def test_heads_and_samples_are_apart_and_queries_may_share_keys() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 6, 8, text_after=4)
    q = torch.randn(2, grid.tokens, 4, 8)
    k, v = torch.randn(2, 2, grid.tokens, 2, 8)
    method = SLAAttn(block_q=32, block_kv=16, keep=0.3, linear="rest")
    where = site(grid, weights_of(8))
    out = method.attend(q, k, v, where)
    for sample in range(2):
        for head in range(4):
            part = slice(head // 2, head // 2 + 1)
            one = slice(sample, sample + 1)
            alone = method.attend(
                q[one, :, head : head + 1], k[one, :, part], v[one, :, part], where
            )
            torch.testing.assert_close(out[one, :, head : head + 1], alone, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="query has 4 heads and key 3"):
        method.attend(q, *torch.randn(2, 2, grid.tokens, 3, 8), where)


def test_heads_take_turns_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 6, 8, text_after=4)
    q, k, v = torch.randn(3, 1, grid.tokens, 3, 8)
    for form in FORMS:
        method = SLAAttn(**{"block_q": 16, "block_kv": 16} | form)
        where = site(grid, weights_of(8))
        want = method.attend(q, k, v, where)
        monkeypatch.setattr("diffattn.methods.sla.base._BYTES_AT_ONCE", 1)
        torch.testing.assert_close(method.attend(q, k, v, where), want)
        monkeypatch.undo()


def test_references_are_as_text_unless_local() -> None:
    torch.manual_seed(0)
    picture = Reference(10, 1, 12, 12)
    grid = TokenGrid(4, 8, 8, 154, 6, references=(picture,))
    q, k = torch.randn(2, 1, grid.tokens, 1, 8)
    video = torch.arange(grid.video.start, grid.video.stop)
    other = torch.arange(picture.start, picture.stop)
    for references in ("exact", "visible", "local"):
        method = SLAAttn(block_q=16, block_kv=16, keep=0.2, references=references)
        where = site(grid, weights_of(8))
        mask = method.selection_mask(method.selection(q, k, where)[0, 0], grid).dense()
        assert not mask[video][:, video].all()
        assert mask[video][:, other].all() == (references != "local")
        assert mask[other].all() == (references != "local")
        assert method.attend(q, k, k, where).isfinite().all()


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_the_planned_cost(form: dict[str, Any]) -> None:
    grid = TokenGrid(4, 8, 16, text_after=64)
    method = SLAAttn(**{"keep": 0.3, "block_q": 64} | form)
    q, k = torch.randn(2, 1, grid.tokens, 1, 8)
    chosen = method.selection(q, k, site(grid, weights_of(8)))[0, 0]
    work = method.work(grid, 0, 1, 8)
    assert work.is_exact
    assert work.density is not None
    share = method.selection_mask(chosen, grid).dense().float().mean()
    assert work.density == pytest.approx(float(share))
    assert work.flops > 4 * work.density * grid.tokens**2 * 8
    assert not method.work(replace(grid, width=15), 0, 1, 8).is_exact


def test_mixed_precision_and_weights_in_16_bits() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 6, 8, text_after=4)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 16)
    method = SLAAttn(block_q=16, block_kv=16, keep=0.3)
    weights = weights_of(16)
    want = method.attend(q, k, v, site(grid, weights))
    with torch.autocast("cpu", torch.bfloat16):
        out = method.attend(q, k, v.bfloat16(), site(grid, weights))
    assert out.dtype == torch.bfloat16
    assert (out - want).norm() < 0.02 * want.norm()
    halves = (x.bfloat16() for x in (q, k, v))
    out = method.attend(*halves, site(grid, weights.to(torch.bfloat16)))
    assert out.dtype == torch.bfloat16
    assert (out - want).norm() < 0.02 * want.norm()


def test_the_width_of_a_head_is_found_or_asked_for() -> None:
    module = OneHead(24, torch.float32)
    assert head_width(module, "sla") == 24
    module.heads = 3
    assert head_width(module, "sla") == 8
    module.head_dim = 6
    assert head_width(module, "sla") == 6
    with pytest.raises(ValueError, match="sla cannot be attached to Identity, which does not tell"):
        SLAWeights(torch.nn.Identity())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": 0}, "keep is 0, but must be a number above 0 and at most 1"),
        ({"keep": 1.5}, "keep is 1.5, but must be a number above 0 and at most 1"),
        ({"linear": "marginal"}, "linear is 'marginal', but must be one of all, rest"),
        ({"drop": 0.1}, "drop is 0.1, but linear='all' leaves no block out; pass linear='rest'"),
        ({"drop": 1, "linear": "rest"}, "drop is 1, but must be a number of at least 0 and below"),
        ({"drop": 0.5, "keep": 0.5, "linear": "rest"}, "which leaves no block for linear attent"),
        ({"features": "hedgehog"}, "features is 'hedgehog', but must be one of softmax, elu, relu"),
        ({"block_q": 24}, "block_q is 24, but must be 16, 32, 64, 128 or 256"),
        ({"block_kv": 512}, "block_kv is 512, but must be 16, 32, 64, 128 or 256"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLAAttn(**parameters)
