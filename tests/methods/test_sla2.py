"""SLA2Attn: goldens, the definition in float64, soft selections, training in two stages."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from content_goldens import read
from golden_files import matching
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_device import triton_device

import diffattn
from diffattn import (
    Reference,
    SLA2Attn,
    SLAAttn,
    TokenGrid,
    load_sla_checkpoint,
    save_sla_checkpoint,
)
from diffattn.methods.base import Site
from diffattn.methods.sla.soft import soft_top
from diffattn.methods.sla.weights import SLA2Weights, SLAWeights
from diffattn.operator import BACKEND_VARIABLE

SOFT: dict[str, Any] = {"selecting": "soft", "tau": 0.5}


class Attention(torch.nn.Module):
    """What the weights of a site need to know of an attention module."""

    def __init__(self, heads: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = torch.nn.Linear(width, heads * width, dtype=dtype)


def weights_of(
    heads: int, width: int, dtype: torch.dtype = torch.float32, positions: int = 1
) -> SLA2Weights:
    weights = SLA2Weights(Attention(heads, width, dtype), positions, trains_router=True)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter += torch.randn_like(parameter) / 2
    return weights


def site(grid: TokenGrid, weights: Any) -> Site:
    return Site("wan", 5, 10, grid, weights=weights)


def soft_weights(scores: list[float], count: float, tau: float) -> list[float]:
    """Weights of a row that sum to `count`, by halving."""
    row = torch.tensor(scores, dtype=torch.float64) / tau
    if count >= len(scores):
        return [1.0] * len(scores)
    low, high = -row.max().item() - 50, -row.min().item() + 50
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if (row + middle).sigmoid().sum() > count else (middle, high)
    return (row + low).sigmoid().tolist()


def truth(
    method: SLA2Attn,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    router_q: torch.Tensor,
    router_k: torch.Tensor,
    logits: torch.Tensor,
    grid: TokenGrid,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition in float64, token by token, with the weights of soft selections constant."""
    outs = torch.zeros_like(q)
    video = torch.arange(grid.video.start, grid.video.stop)
    rows, columns = video.split(method.block_q), video.split(method.block_kv)
    is_soft = method.selecting == "soft"
    kept = method.keep * len(columns) if is_soft else int(method.keep * len(columns))
    kept = max(1, kept)
    for sample in range(q.shape[0]):
        there = torch.ones(grid.tokens).bool() if key_mask is None else key_mask[sample]
        counted = [c[there[c]] for c in columns]
        candidates = [n for n in range(len(columns)) if len(counted[n])]
        for head in range(q.shape[2]):
            query, key, value = (x[sample, :, head] for x in (q, k, v))
            centred = key - key[video][there[video]].mean(0)
            weight = torch.ones(grid.tokens, grid.tokens, dtype=q.dtype)
            rest = torch.zeros_like(weight)
            alpha = torch.ones(grid.tokens, dtype=q.dtype)
            for m, row in enumerate(rows):
                middle = query[row[there[row]]].mean(0).nan_to_num(0) @ router_q.T
                scores = {
                    n: float((middle @ (centred[counted[n]].mean(0) @ router_k.T)).detach())
                    for n in candidates
                }
                if is_soft:
                    soft = soft_weights(list(scores.values()), kept, method.tau)
                    chosen = dict(zip(scores, soft, strict=True))
                else:
                    best = sorted(scores, key=lambda n: (-scores[n], n))[: int(kept)]
                    chosen = {n: float(n in best) for n in scores}
                for n, column in enumerate(columns):
                    weight[row[:, None], column] = chosen.get(n, 0)
                    rest[row[:, None], column] = 1 - chosen.get(n, 1)
                if len(candidates) > kept:
                    # positions at even distances, from the first block to the last
                    place = m * (logits.shape[1] - 1) / max(1, len(rows) - 1)
                    left = min(int(place), max(0, logits.shape[1] - 2))
                    right = min(left + 1, logits.shape[1] - 1)
                    part = place - left
                    mixed = logits[head, left] * (1 - part) + logits[head, right] * part
                    alpha[row] = torch.sigmoid(mixed)
            powers = (query @ key.T * q.shape[-1] ** -0.5).exp() * weight * there
            by_softmax = powers @ value / powers.sum(-1, keepdim=True)
            products = query.softmax(-1) @ centred.softmax(-1).T * rest * there
            total = products.sum(-1, keepdim=True)
            by_sums = products @ value / total.masked_fill(total == 0, 1)
            outs[sample, :, head] = alpha[:, None] * by_softmax + (1 - alpha[:, None]) * by_sums
    return outs


@pytest.mark.parametrize("path", matching("sla/t*.npz", 4), ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_goldens(path: Path, dtype: torch.dtype) -> None:
    check_golden(path, "cpu", dtype)


@pytest.mark.parametrize("path", matching("sla/t01*.npz", 1), ids=lambda path: path.stem)
def test_goldens_by_triton(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_device(monkeypatch)
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    check_golden(path, device, torch.float32)


def check_golden(path: Path, device: str, dtype: torch.dtype) -> None:
    golden = read(path)
    meta = ast.literal_eval(golden.meta)
    q, k, v = (
        (golden.values[name].to(dtype) / meta["scale_of_int8"]).to(device).transpose(1, 2)
        for name in ("q", "k", "v")
    )
    q, k, v = (x.contiguous().requires_grad_() for x in (q, k, v))
    heads, rows = golden.alpha.shape[1:3]
    weights = weights_of(heads, q.shape[-1], dtype, positions=rows).to(device)
    alpha = golden.alpha[0, :, :, 0].to(device, dtype)
    with torch.no_grad():
        weights.router_q.copy_(golden.proj_q)
        weights.router_k.copy_(golden.proj_k)
        weights.alpha_logits.copy_(alpha.logit())
    tau = meta["soft_tau"]
    method = SLA2Attn(
        keep=meta["ratio"],
        block_q=meta["block_q"],
        block_kv=meta["block_k"],
        positions=rows,
        selecting="hard" if tau is None else "soft",
        tau=tau or 0.1,
    )
    where = site(TokenGrid(1, 1, q.shape[1]), weights)
    out = method.attend(q, k, v, where)
    near = {"atol": 3e-6, "rtol": 3e-5}
    torch.testing.assert_close(out.float().cpu(), golden.o.transpose(1, 2), **near)
    if tau is None:
        chosen = method.selection(q, k, where)
        assert torch.equal(chosen.cpu(), golden.block_map.bool())
        along = (golden.do.to(dtype) / meta["scale_of_int8"]).to(device).transpose(1, 2)
        names, leaves = ("dq", "dk", "dv"), (q, k, v, weights.alpha_logits)
        found = torch.autograd.grad(out, leaves, along)
    else:
        # The map itself is the goldens' M, of which the output is made.
        scores = golden.scores.to(dtype)
        every = torch.ones(1, dtype=torch.bool)
        made = soft_top(scores, meta["ratio"] * scores.shape[-1], tau, every).sigmoid()
        torch.testing.assert_close(made.float(), golden.block_map, **near)
        loss = (out.transpose(1, 2) - golden.full).square().mean()
        assert loss.item() == pytest.approx(golden.loss, rel=1e-4)
        names = ("dproj_q", "dproj_k")
        found = torch.autograd.grad(loss, tuple(weights.parameters()))
    # The file has gradients with respect to alpha, not to its logit.
    *found, of_logits = found
    of_alpha = (of_logits / (alpha * (1 - alpha)))[None, :, :, None]
    for name, grad in zip((*names, "dalpha"), (*found, of_alpha), strict=True):
        want = golden.values[name]
        want = want.transpose(1, 2) if name in ("dq", "dk", "dv") else want
        limit = {"atol": 2e-5 * want.abs().max().item(), "rtol": 1e-4}
        torch.testing.assert_close(
            grad.float().cpu(), want, **limit, msg=lambda said, name=name: f"{name}: {said}"
        )


FORMS: list[dict[str, Any]] = [{}, {"positions": 3}, {"keep": 1.0}, SOFT, SOFT | {"positions": 2}]


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_gradients_of_all_weights_and_tokens(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(3, 5, 7, text_before=5, text_after=9)
    method = SLA2Attn(**{"keep": 0.35, "block_q": 32, "block_kv": 16} | form)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, grid.tokens, 2, 8))
    weights = weights_of(2, 8, positions=method.positions)
    out = method.attend(q, k, v, site(grid, weights))
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, *weights.parameters())]
    want = truth(method, *leaves, grid)
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=1e-5)
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v, weights.alpha_logits), along)
    expected = torch.autograd.grad(
        want, (*leaves[:3], leaves[-1]), along.double(), materialize_grads=True, allow_unused=True
    )
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_a_soft_selection_are_differences(masked: bool) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 3, 7, text_before=2, text_after=1)
    method = SLA2Attn(keep=0.4, block_q=16, block_kv=16, positions=2, **SOFT)
    tensors = torch.randn(3, 1, grid.tokens, 2, 3, dtype=torch.float64)
    weights = weights_of(2, 3, torch.float64, positions=2)
    key_mask = torch.rand(1, grid.tokens) < 0.8 if masked else None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *own: Any) -> torch.Tensor:
        names = [name for name, _ in weights.named_parameters()]
        bound = dict(zip(names, own, strict=True))

        class Bound:
            alpha_logits = weights.alpha_logits

            def __call__(self, *args: Any) -> Any:
                return torch.func.functional_call(weights, bound, args)

        return method.attend(q, k, v, site(grid, Bound()), key_mask=key_mask)

    leaves = [x.clone().requires_grad_() for x in (*tensors, *weights.parameters())]
    assert torch.autograd.gradcheck(attend, leaves, atol=1e-6, rtol=1e-4, fast_mode=True)


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
    method = SLA2Attn(**{"keep": 0.35, "block_q": block_q, "block_kv": 16} | form)
    q, k, v = torch.randn(3, 1, grid.tokens, 1, 4, dtype=torch.float64)
    weights = weights_of(1, 4, torch.float64, positions=method.positions)
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
    own = [parameter.detach() for parameter in weights.parameters()]
    want = truth(method, q, k0, v0, *own, grid, key_mask)
    counted = slice(None) if key_mask is None else key_mask[0]
    torch.testing.assert_close(out[:, counted], want[:, counted], atol=1e-6, rtol=1e-5)
    for grad in torch.autograd.grad(out[:, counted].sum(), (q, k, v)):
        assert grad.isfinite().all()


def test_the_untrained_router_selects_as_sla_does() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 8, 8, text_after=3)
    q, k = torch.randn(2, 2, grid.tokens, 2, 16)
    sizes: dict[str, Any] = {"keep": 0.3, "block_q": 32, "block_kv": 16}
    untrained = SLA2Weights(Attention(2, 16, torch.float32), 1, trains_router=False)
    chosen = SLA2Attn(**sizes).selection(q, k, site(grid, untrained))
    sla = SLAWeights(Attention(2, 16, torch.float32))
    assert torch.equal(chosen, SLAAttn(**sizes).selection(q, k, site(grid, sla)))
    assert untrained.alpha_logits.sigmoid().allclose(torch.tensor(0.9))
    with torch.no_grad():
        untrained.router_q.copy_(torch.randn(16, 16))
    assert not torch.equal(SLA2Attn(**sizes).selection(q, k, site(grid, untrained)), chosen)


@pytest.mark.parametrize("form", [{}, SOFT], ids=str)
def test_alpha_goes_from_one_attention_to_the_other(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 8, 8)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 16)
    method = SLA2Attn(keep=0.25, block_q=32, block_kv=16, **form)
    weights = weights_of(2, 16)
    outs = []
    for logit in (100.0, -100.0, 0.0):
        torch.nn.init.constant_(weights.alpha_logits, logit)
        outs.append(method.attend(q, k, v, site(grid, weights)))
    by_softmax, by_sums, half = outs
    torch.testing.assert_close(half, (by_softmax + by_sums) / 2)
    if not form:
        chosen = method.selection(q, k, site(grid, weights))
        for head in range(2):
            one = (x[:, :, head : head + 1] for x in (q, k, v))
            mask = method.selection_mask(chosen[0, head], grid)
            want = diffattn.attention(*one, mask)
            torch.testing.assert_close(by_softmax[:, :, head : head + 1], want)
    assert (by_sums <= v.amax(1, keepdim=True) + 1e-4).all()
    assert (by_sums >= v.amin(1, keepdim=True) - 1e-4).all()


def test_a_cold_soft_selection_is_the_hard_one() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 8, 8, text_after=5)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 16)
    weights = weights_of(2, 16)
    hard = SLA2Attn(keep=0.25, block_q=32, block_kv=16)
    soft = replace(hard, selecting="soft", tau=1e-5)
    outs = [method.attend(q, k, v, site(grid, weights)) for method in (hard, soft)]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tau", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 1e4])
def test_the_weights_of_a_row_sum_to_their_count(tau: float, spread: float) -> None:
    torch.manual_seed(0)
    scores = (torch.randn(2, 2, 3, 40) * spread).requires_grad_()
    candidates = torch.rand(2, 1, 1, 40) < 0.7
    for count in (1.0, 2.5, 7.0):
        weights = soft_top(scores, count, tau, candidates).sigmoid()
        total = weights.sum(-1)
        # Scores of 1e4 / tau have few digits after the point in float32.
        far = 1e-4 + spread / tau * 1e-6
        assert ((total - count).abs() < far).all() or spread / tau > 1e5
        assert not weights.masked_select(~candidates).any()
        (grad,) = torch.autograd.grad(weights.square().sum(), scores)
        assert grad.isfinite().all()
    every = soft_top(scores, 40.0, tau, candidates).sigmoid()
    torch.testing.assert_close(every, candidates.float().expand_as(every))


def test_heads_and_samples_are_apart_and_queries_may_share_keys() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 6, 8, text_after=4)
    q = torch.randn(2, grid.tokens, 4, 8)
    k, v = torch.randn(2, 2, grid.tokens, 2, 8)
    for form in FORMS:
        method = SLA2Attn(**{"block_q": 32, "block_kv": 16, "keep": 0.3} | form)
        weights = weights_of(4, 8, positions=method.positions)
        out = method.attend(q, k, v, site(grid, weights))
        for sample in range(2):
            for head in range(4):
                part = slice(head // 2, head // 2 + 1)
                one = slice(sample, sample + 1)
                alone = weights_of(1, 8, positions=method.positions)
                alone.load_state_dict(
                    weights.state_dict()
                    | {"alpha_logits": weights.alpha_logits[head : head + 1].detach()}
                )
                got = method.attend(
                    q[one, :, head : head + 1], k[one, :, part], v[one, :, part], site(grid, alone)
                )
                torch.testing.assert_close(out[one, :, head : head + 1], got, atol=3e-6, rtol=1e-5)


def test_heads_take_turns_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 6, 8, text_after=4)
    q, k, v = torch.randn(3, 1, grid.tokens, 3, 8)
    for form in FORMS:
        method = SLA2Attn(**{"block_q": 16, "block_kv": 16, "keep": 0.3} | form)
        where = site(grid, weights_of(3, 8, positions=method.positions))
        want = method.attend(q, k, v, where)
        monkeypatch.setattr("diffattn.methods.sla.base._BYTES_AT_ONCE", 1)
        monkeypatch.setattr("diffattn.methods.sla.soft._BYTES_AT_ONCE", 1)
        torch.testing.assert_close(method.attend(q, k, v, where), want)
        monkeypatch.undo()


def test_context_parallelism_over_heads_is_refused() -> None:
    grid = TokenGrid(2, 6, 8)
    weights = weights_of(4, 8)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 8)
    with pytest.raises(NotImplementedError, match="sla2 has an alpha for each of the 4 heads of"):
        SLA2Attn(block_q=16, block_kv=16).attend(q, k, v, site(grid, weights))


def test_references_are_as_text_unless_local() -> None:
    torch.manual_seed(0)
    picture = Reference(10, 1, 12, 12)
    grid = TokenGrid(4, 8, 8, 154, 6, references=(picture,))
    q, k = torch.randn(2, 1, grid.tokens, 1, 8)
    video = torch.arange(grid.video.start, grid.video.stop)
    other = torch.arange(picture.start, picture.stop)
    for references in ("exact", "visible", "local"):
        for form in ({}, SOFT):
            method = SLA2Attn(block_q=16, block_kv=16, keep=0.2, references=references, **form)
            where = site(grid, weights_of(1, 8))
            mask = method.selection_mask(method.selection(q, k, where)[0, 0], grid).dense()
            assert not mask[video][:, video].all()
            assert mask[video][:, other].all() == (references != "local")
            assert mask[other].all() == (references != "local")
            assert method.attend(q, k, k, where).isfinite().all()


def test_the_planned_cost() -> None:
    grid = TokenGrid(4, 8, 16, text_after=64)
    method = SLA2Attn(keep=0.3, block_q=64)
    q, k = torch.randn(2, 1, grid.tokens, 1, 8)
    chosen = method.selection(q, k, site(grid, weights_of(1, 8)))[0, 0]
    work = method.work(grid, 0, 1, 8)
    assert work.is_exact
    assert work.density is not None
    share = method.selection_mask(chosen, grid).dense().float().mean()
    assert work.density == pytest.approx(float(share))
    assert work.flops > 4 * work.density * grid.tokens**2 * 8
    assert not method.work(replace(grid, width=15), 0, 1, 8).is_exact
    assert replace(method, selecting="soft").work(grid, 0, 1, 8).density == 1
    # The router itself is cheap where it matters.
    long = SLA2Attn().work(TokenGrid(21, 45, 80), 0, 12, 128)
    assert long.selection_flops < 0.01 * long.flops


@pytest.mark.parametrize("form", [{}, SOFT], ids=str)
def test_mixed_precision_and_weights_in_16_bits(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(2, 6, 8, text_after=4)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 16)
    method = SLA2Attn(block_q=16, block_kv=16, keep=0.3, **form)
    weights = SLA2Weights(Attention(2, 16, torch.float32), 1, trains_router=True)
    want = method.attend(q, k, v, site(grid, weights))
    with torch.autocast("cpu", torch.bfloat16):
        out = method.attend(q, k, v.bfloat16(), site(grid, weights))
    assert out.dtype == torch.bfloat16
    assert (out - want).norm() < 0.02 * want.norm()
    halves = (x.bfloat16() for x in (q, k, v))
    out = method.attend(*halves, site(grid, weights.to(torch.bfloat16)))
    assert out.dtype == torch.bfloat16
    assert (out - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("form", [{}, SOFT], ids=str)
def test_compiled_models_do_the_same(form: dict[str, Any]) -> None:
    method = SLA2Attn(block_q=32, block_kv=16, keep=0.3, **form)
    model, other = tiny_wan.transformer(), tiny_wan.transformer()
    for each in (model, other):
        diffattn.set_attn_processor(each, method)
    compiled: Any = torch.compile(other, backend="eager")
    for frames in (3, 2):
        inputs = {
            "hidden_states": torch.randn(1, 16, frames, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 4, tiny_wan.TEXT_DIM),
            "return_dict": False,
        }
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0])


def test_checkpoints(tmp_path: Path) -> None:
    def attached(method: Any) -> torch.nn.Module:
        model = tiny_wan.transformer()
        diffattn.set_attn_processor(model, method)
        return model

    method = SLA2Attn(block_q=32, block_kv=16, positions=2)
    model, path = attached(method), tmp_path / "sla2.safetensors"
    own = {name: p for name, p in model.named_parameters() if ".sla2." in name}
    assert len(own) == 3 * tiny_wan.LAYERS
    for parameter in own.values():
        torch.nn.init.normal_(parameter)
    save_sla_checkpoint(model, path)
    other = attached(method)
    load_sla_checkpoint(other, path)
    for name, parameter in own.items():
        assert torch.equal(other.get_parameter(name), parameter)
    with pytest.raises(ValueError, match=r"it has layers at sites that the method is not attached"):
        load_sla_checkpoint(attached(SLAAttn()), path)
    with pytest.raises(ValueError, match=r"alpha_logits has shape \(2, 2\), but the model's \(2,"):
        load_sla_checkpoint(attached(SLA2Attn()), path)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": 0}, "keep is 0, but must be a number above 0 and at most 1"),
        ({"selecting": "top"}, "selecting is 'top', but must be one of hard, soft"),
        ({"tau": 0}, "tau is 0, but must be a number above 0"),
        ({"positions": 0}, "positions is 0, but must be an integer of at least 1"),
        ({"block_q": 24}, "block_q is 24, but must be 16, 32, 64, 128 or 256"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLA2Attn(**parameters)


def test_modules_that_do_not_tell_their_heads_are_named() -> None:
    module = torch.nn.Module()
    with pytest.raises(
        ValueError, match="sla2 cannot be attached to Module, which does not tell h"
    ):
        SLA2Weights(module, 1, trains_router=False)
    module.head_dim = 8  # type: ignore[assignment]
    module.to_q = torch.nn.Linear(8, 24)
    assert SLA2Weights(module, 2, trains_router=False).alpha_logits.shape == (3, 2)
