"""The Triton kernels: right in every dtype and shape, on a GPU or else in Triton's interpreter."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import (
    LAYOUT_FIELDS,
    assert_matches_eager,
    random_layout,
    stack_layouts,
    tensors,
)

from diffattn.blocks import EMPTY, FULL, PARTIAL, BlockLayout, layout_from_states
from diffattn.kernels.block_sparse import (
    block_sparse_attention,
    block_sparse_attention_gradients,
    plan,
)
from diffattn.kernels.block_sparse.launch import Problem
from diffattn.kernels.common.tile_tables import TileConfig
from diffattn.kernels.reference import reference_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

Results = tuple[torch.Tensor, torch.Tensor]


def inputs(
    device: str, batch: int, tokens_q: int, tokens_kv: int, heads: int, head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:  # fmt: skip
    return [
        torch.randn(batch, tokens, heads, head_dim).to(device, dtype).requires_grad_()
        for tokens in (tokens_q, tokens_kv, tokens_kv)
    ]


def attend(qkv: list[torch.Tensor], layout: BlockLayout, **options: Any) -> Results:
    layout = layout.to(qkv[0].device)
    return block_sparse_attention(
        *qkv, tensors(layout), block_q=layout.block_q, block_kv=layout.block_kv, **options
    )


def check(qkv: list[torch.Tensor], layout: BlockLayout, **options: Any) -> Results:
    """Compare the results and all gradients with float64 attention under the layout's mask."""
    out, lse = attend(qkv, layout, **options)
    mask = layout.dense().to(qkv[0].device)
    assert_matches_eager(out, lse, *qkv, mask, backward=True, **options)
    return out, lse


def layout_of(states: list[list[int]], **sizes: int) -> BlockLayout:
    """A layout of the given blocks; about half of a partial one is visible."""

    def bits(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return torch.rand(row.numel(), sizes["block_q"], sizes["block_kv"]) < 0.5

    return layout_from_states(torch.tensor(states, dtype=torch.uint8), bits, **sizes)


@pytest.fixture(params=[{}, {"ahead": True, "partial": 32}], ids=["plain", "ahead"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a block in both directions, as for large blocks in the shipped table."""
    monkeypatch.setattr(
        "diffattn.kernels.block_sparse.launch.tile_config",
        lambda *_, **__: TileConfig(16, 16, num_warps=4, num_stages=2, **request.param),
    )


@dtypes
@pytest.mark.parametrize(
    ("tokens_q", "tokens_kv", "block_q", "block_kv"),
    [
        pytest.param(31, 31, 16, 16, id="prime"),
        pytest.param(33, 33, 16, 16, id="one-over"),
        pytest.param(47, 18, 32, 16, id="more-queries"),
        pytest.param(19, 70, 16, 32, id="more-keys"),
        pytest.param(1, 65, 16, 64, id="one-query"),
        pytest.param(65, 1, 64, 16, id="text-of-length-1"),
        pytest.param(3, 2, 64, 64, id="less-than-a-block"),
    ],
)
def test_equals_dense_attention_under_the_mask(
    tokens_q: int, tokens_kv: int, block_q: int, block_kv: int, dtype: torch.dtype, device: str
) -> None:
    layout = random_layout(tokens_q, tokens_kv, block_q, block_kv)
    check(inputs(device, 2, tokens_q, tokens_kv, 3, 16, dtype), layout)


@dtypes
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("tokens_q", "tokens_kv", "block_q", "block_kv"),
    [
        pytest.param(70, 75, 64, 64, id="square"),
        pytest.param(33, 129, 32, 128, id="wide"),
        pytest.param(129, 33, 128, 32, id="high"),
    ],
)
def test_several_tiles_per_block(
    tokens_q: int, tokens_kv: int, block_q: int, block_kv: int, dtype: torch.dtype, device: str
) -> None:
    layout = random_layout(tokens_q, tokens_kv, block_q, block_kv)
    check(inputs(device, 1, tokens_q, tokens_kv, 2, 16, dtype), layout)


@pytest.mark.parametrize(
    "states",
    [
        pytest.param([[FULL] * 3] * 3, id="full"),
        pytest.param([[PARTIAL] * 3] * 3, id="partial"),
        pytest.param([[FULL, EMPTY, PARTIAL], [EMPTY] * 3, [PARTIAL, EMPTY, FULL]], id="mixed"),
        pytest.param([[EMPTY] * 3] * 3, id="empty"),
        pytest.param([[EMPTY, EMPTY, FULL]] * 3, id="short-column"),
    ],
)
def test_kinds_of_blocks(states: list[list[int]], device: str) -> None:
    layout = layout_of(states, tokens_q=37, tokens_kv=41, block_q=16, block_kv=16)
    check(inputs(device, 1, 37, 41, 2, 16), layout)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(1, torch.float32), (16, torch.bfloat16), (24, torch.float16), (40, torch.bfloat16),
     (80, torch.float32), (80, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)],
)  # fmt: skip
def test_head_dims(head_dim: int, dtype: torch.dtype, device: str) -> None:
    check(inputs(device, 1, 40, 40, 1, head_dim, dtype), random_layout(40, 40, 32, 16))


@pytest.mark.parametrize(("batch", "heads"), [(1, 3), (2, 1), (2, 3)])
def test_layouts_per_sample_and_per_head(batch: int, heads: int, device: str) -> None:
    layouts = [random_layout(35, 50, 16, 16) for _ in range(batch * heads)]
    qkv = inputs(device, 2, 35, 50, 3, 16)
    mask = torch.cat([layout.dense()[0] for layout in layouts]).unflatten(0, (batch, heads))
    stacked = [x.to(device) for x in stack_layouts(layouts, batch, heads)]
    out, lse = block_sparse_attention(*qkv, stacked, block_q=16, block_kv=16)
    mask = mask.expand(2, 3, -1, -1).to(device)
    assert_matches_eager(out, lse, *qkv, mask, backward=True)


def test_index_lists_of_any_strides(device: str) -> None:
    layout = random_layout(40, 40, 16, 16).to(device)
    qkv = inputs(device, 1, 40, 40, 2, 16)
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in tensors(layout)]
    out, lse = block_sparse_attention(*qkv, strided, block_q=16, block_kv=16)
    assert_matches_eager(out, lse, *qkv, layout.dense(), backward=True)


@dtypes
def test_key_mask(dtype: torch.dtype, device: str) -> None:
    layout = random_layout(40, 55, 16, 16)
    qkv = inputs(device, 3, 40, 55, 2, 16, dtype)
    key_mask = torch.rand(3, 55, device=device) < 0.7
    key_mask[1] = False
    key_mask[2] = True
    out, lse = check(qkv, layout, key_mask=key_mask)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()


def test_key_mask_of_any_strides(device: str) -> None:
    key_mask = (torch.rand(40, 2, device=device) < 0.7).T
    check(inputs(device, 2, 20, 40, 1, 16), random_layout(20, 40, 16, 16), key_mask=key_mask)


@dtypes
def test_rows_that_see_nothing(dtype: torch.dtype, device: str) -> None:
    # No block at all in block row 0; in row 1 a partial block that hides all keys from two queries.
    states = torch.tensor([[EMPTY, EMPTY], [EMPTY, PARTIAL], [FULL, FULL]], dtype=torch.uint8)
    bits = torch.ones(1, 16, 16, dtype=torch.bool)
    bits[:, 3:5] = False
    layout = layout_from_states(
        states, lambda r, c: bits, tokens_q=40, tokens_kv=32, block_q=16, block_kv=16
    )
    qkv = inputs(device, 2, 40, 32, 2, 16, dtype)
    out, lse = check(qkv, layout)
    nothing = torch.zeros(40, dtype=torch.bool, device=device)
    nothing[:16] = nothing[19:21] = True
    assert (out[:, nothing] == 0).all()
    assert torch.equal(lse == -torch.inf, nothing.expand(2, 2, -1))


def test_rows_that_see_nothing_ignore_their_gradient(device: str) -> None:
    """The gradient of an LSE of -inf is NaN in a merge of two attentions: it means nothing."""
    states = [[EMPTY, EMPTY], [FULL, PARTIAL]]
    layout = layout_of(states, tokens_q=32, tokens_kv=32, block_q=16, block_kv=16)
    qkv = inputs(device, 1, 32, 32, 1, 16)
    out, lse = attend(qkv, layout)
    grad_lse = torch.ones_like(lse)
    found = torch.autograd.grad((out, lse), qkv, (out, grad_lse), retain_graph=True)
    grad_lse[..., :16] = torch.nan
    for a, b in zip(found, torch.autograd.grad((out, lse), qkv, (out, grad_lse)), strict=True):
        assert torch.equal(a, b)


@dtypes
def test_any_strides(dtype: torch.dtype, device: str) -> None:
    layout = random_layout(40, 40, 16, 16)
    q = torch.randn(2, 16, 40, 3).to(device, dtype).permute(0, 2, 3, 1)  # tokens inside
    k = torch.randn(2, 3, 40, 16).to(device, dtype).transpose(1, 2)  # heads first
    v = torch.randn(2, 40, 1, 16).to(device, dtype).expand(2, 40, 3, 16)  # stride 0
    assert q.stride(-1) != 1
    check([x.requires_grad_() for x in (q, k, v)], layout)


def test_slices_of_fused_projections(device: str) -> None:
    fused = torch.randn(2, 40, 3 * 2 * 24, device=device, requires_grad=True)
    qkv = [x.unflatten(-1, (2, 24)) for x in fused.chunk(3, -1)]
    assert not any(x.is_contiguous() for x in qkv)
    check(qkv, random_layout(40, 40, 16, 16))


def test_nothing_is_copied(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of any strides reach the kernel where they are."""
    started_with: list[int] = []
    collect = Problem.of

    def recording(*args: Any, **options: Any) -> Problem:
        started_with.extend(x.data_ptr() for x in args[:3])
        return collect(*args, **options)

    monkeypatch.setattr(Problem, "of", staticmethod(recording))
    qkv = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in
           inputs(device, 1, 20, 20, 2, 16)]  # fmt: skip
    attend(qkv, random_layout(20, 20, 16, 16))
    assert started_with == [x.data_ptr() for x in qkv]


def test_tiles_that_reach_beyond_32_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = random_layout(40, 40, 16, 16).to(device)
    qkv = inputs(device, 2, 40, 40, 2, 16)
    key_mask = torch.rand(2, 40, device=device) < 0.7
    monkeypatch.setattr("diffattn.kernels.block_sparse.launch._MAX_OFFSET", 1)
    check(qkv, layout, key_mask=key_mask)


@pytest.mark.parametrize(
    ("stride", "wide"), [((0, 2**28, 16, 1), True), ((0, 2**27, 16, 1), False),
                         ((2**40, 48, 2**40, 1), False), ((0, 48, 16, 2**28), True)],
)  # fmt: skip
def test_only_tiles_need_64_bit_offsets(stride: tuple[int, ...], wide: bool) -> None:
    """Where a tile begins is always computed in 64 bits."""
    x = torch.empty_strided((2, 40, 3, 16), stride, device="meta")
    layout = tensors(random_layout(40, 40, 16, 16))
    assert Problem.of(x, x, x, layout, None, 16, 16, 1.0).wide == wide


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_memory_beyond_32_bits(dim: int, device: str) -> None:
    """The last element of q, k and v is more than 2**31 elements behind the first."""
    shape = [2, 40, 2, 16]
    stride = [1280, 32, 16, 1]
    stride[dim] = 2**31 // (shape[dim] - 1) + 16
    storage = torch.empty(2**31 + 2**17, dtype=torch.float16, device=device)
    qkv = []
    for x in inputs(device, *shape[:2], *shape[1:], torch.float16):
        storage.as_strided(shape, stride).copy_(x.detach())
        clean = storage.as_strided(shape, stride)
        layout = random_layout(40, 40, 16, 16)
        check([y.detach().requires_grad_() for y in (clean, clean, clean)], layout)
        qkv.append(clean)


@pytest.mark.parametrize("which", [0, 1], ids=["out", "lse"])
def test_gradient_of_one_of_the_results(which: int, device: str) -> None:
    layout = random_layout(40, 40, 16, 16).to(device)
    qkv = inputs(device, 1, 40, 40, 2, 16)
    truth = reference_attention(*qkv, layout.dense())[which]
    kept = truth.isfinite()
    found = torch.autograd.grad(attend(qkv, layout)[which][kept].sum(), qkv)
    expected = torch.autograd.grad(truth[kept].sum(), qkv, materialize_grads=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.9, -0.4, 0.0])
def test_scale(scale: float, device: str) -> None:
    check(inputs(device, 1, 40, 40, 2, 16), random_layout(40, 40, 16, 16), scale=scale)


@dtypes
def test_large_scores_do_not_overflow(dtype: torch.dtype, device: str) -> None:
    qkv = [(8 * x.detach()).requires_grad_() for x in inputs(device, 1, 40, 40, 1, 64, dtype)]
    layout = random_layout(40, 40, 16, 16)
    out, lse = attend(qkv, layout)
    assert_matches_eager(out, lse, *qkv, layout.dense().to(device))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), qkv))


def test_gradients_outside_of_autograd(device: str) -> None:
    layout = random_layout(40, 50, 16, 16).to(device)
    qkv = inputs(device, 1, 40, 50, 2, 16)
    key_mask = torch.rand(1, 50, device=device) < 0.7
    options = {"block_q": 16, "block_kv": 16, "scale": 0.3, "key_mask": key_mask}
    out, lse = block_sparse_attention(*qkv, tensors(layout), **options)
    grad_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, qkv, grad_out)
    found = block_sparse_attention_gradients(
        grad_out, *(x.detach() for x in (*qkv, out, lse)), *tensors(layout), **options
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_two_attentions_merge_to_one(device: str) -> None:
    """Keys in two parts, joined by their LSE, give the attention over all keys, and its gradients.

    The log-sum-exp of both parts depends on q and k: its gradient must be right too.
    """
    layout = random_layout(40, 64, 16, 16)
    layout.full_count.clamp_(min=1)  # every query sees something
    qkv = inputs(device, 1, 40, 64, 2, 16)
    dense = layout.dense()
    parts = []
    for start in (0, 32):
        q, (k, v) = qkv[0], (x[:, start : start + 32] for x in qkv[1:])
        part = _layout_of_mask(dense[0, 0, :, start : start + 32], 16)
        parts.append(attend([q, k, v], part))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [(part - lse).exp().transpose(1, 2)[..., None] for _, part in parts]
    out = sum(part * weight for (part, _), weight in zip(parts, weights, strict=True))
    assert_matches_eager(out, lse, *qkv, dense.to(device), backward=True)


def _layout_of_mask(dense: torch.Tensor, block: int) -> BlockLayout:
    """The layout of a token mask in square blocks."""
    tokens_q, tokens_kv = dense.shape
    padded = torch.nn.functional.pad(dense, (0, -tokens_kv % block, 0, -tokens_q % block))
    blocks = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2)
    states = torch.full(blocks.shape[:2], PARTIAL, dtype=torch.uint8)
    return layout_from_states(
        states, lambda r, c: blocks[r, c], tokens_q=tokens_q, tokens_kv=tokens_kv,
        block_q=block, block_kv=block,
    )  # fmt: skip


@dtypes
def test_unvisited_blocks_are_not_read(dtype: torch.dtype, device: str) -> None:
    dense = random_layout(64, 64, 16, 16).dense()[0, 0].clone()
    dense[:, 32:48] = False
    layout = _layout_of_mask(dense, 16)
    clean = inputs(device, 1, 64, 64, 2, 16, dtype)
    poisoned = [x.detach().clone() for x in clean]
    for x in poisoned[1:]:
        x[:, 32:48] = torch.nan
    poisoned = [x.requires_grad_() for x in poisoned]
    results = []
    for qkv in (clean, poisoned):
        out, lse = attend(qkv, layout)
        results.append((out, lse, *torch.autograd.grad(out.sum(), qkv)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (results[1][3][:, 32:48] == 0).all()


@dtypes
def test_nan_in_hidden_keys_stays_there(dtype: torch.dtype, device: str) -> None:
    layout = random_layout(50, 50, 16, 16)
    qkv = inputs(device, 2, 50, 50, 2, 16, dtype)
    key_mask = torch.ones(2, 50, dtype=torch.bool, device=device)
    key_mask[0, 20:] = False
    poisoned = [x.detach().clone() for x in qkv]
    poisoned[1][0, 20:] = torch.nan
    poisoned[2][0, 20:] = torch.inf
    poisoned = [x.requires_grad_() for x in poisoned]
    out, lse = attend(poisoned, layout, key_mask=key_mask)
    assert_matches_eager(out, lse, *qkv, layout.dense().to(device), key_mask=key_mask)
    gradients = torch.autograd.grad(out.sum(), poisoned)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[1][0, 20:] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_and_inf_that_are_visible_propagate(which: int, value: float, device: str) -> None:
    layout = layout_of([[FULL, EMPTY], [EMPTY, FULL]], tokens_q=25, tokens_kv=25,
                       block_q=16, block_kv=16)  # fmt: skip
    clean = [x.detach() for x in inputs(device, 1, 25, 25, 1, 16)]
    qkv = [x.clone() for x in clean]
    qkv[which][0, 3, 0, 5] = value
    out, _ = attend(qkv, layout)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x[:, :16].transpose(1, 2) for x in qkv)
    ).transpose(1, 2)
    assert not expected.isfinite().all()
    torch.testing.assert_close(out[:, :16], expected, equal_nan=True)
    assert torch.equal(out[:, 16:], attend(clean, layout)[0][:, 16:])


def test_the_same_bits_every_time(device: str) -> None:
    layout = random_layout(70, 70, 16, 16)
    qkv = inputs(device, 1, 70, 70, 2, 16, torch.float16)
    runs = []
    for _ in range(2):
        out, lse = attend(qkv, replace(layout))
        runs.append((out, lse, *torch.autograd.grad(out.float().square().sum(), qkv)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_any_layout(data: st.DataObject, device: str) -> None:
    block = st.sampled_from([16, 32])
    tokens_q, tokens_kv = (data.draw(st.integers(1, 50)) for _ in range(2))
    block_q, block_kv = data.draw(block), data.draw(block)
    batch, heads, head_dim = (data.draw(st.integers(1, n)) for n in (2, 2, 20))
    shared = data.draw(st.sampled_from([(1, 1), (batch, 1), (1, heads), (batch, heads)]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    layouts = [
        random_layout(tokens_q, tokens_kv, block_q, block_kv, partial=data.draw(st.booleans()))
        for _ in range(shared[0] * shared[1])
    ]
    masked = data.draw(st.booleans())
    key_mask = torch.rand(batch, tokens_kv, device=device) < 0.8 if masked else None
    dtype = data.draw(st.sampled_from(DTYPES))
    qkv = inputs(device, batch, tokens_q, tokens_kv, heads, head_dim, dtype)
    out, lse = block_sparse_attention(
        *qkv, [x.to(device) for x in stack_layouts(layouts, *shared)],
        block_q=block_q, block_kv=block_kv, key_mask=key_mask,
    )  # fmt: skip
    mask = torch.cat([layout.dense()[0] for layout in layouts]).unflatten(0, shared)
    mask = mask.expand(batch, heads, -1, -1).to(device)
    assert_matches_eager(out, lse, *qkv, mask, key_mask=key_mask, backward=True)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 128), (64, 64), (128, 64), (256, 32)])
def test_shipped_tiles(
    head_dim: int, block_q: int, block_kv: int, dtype: torch.dtype, device: str
) -> None:
    layout = random_layout(1111, 1111, block_q, block_kv)
    check(inputs(device, 2, 1111, 1111, 3, head_dim, dtype), layout)


@pytest.mark.gpu
def test_replays_in_a_cuda_graph(device: str) -> None:
    layout = random_layout(300, 300, 128, 128).to(device)
    qkv = [x.detach() for x in inputs(device, 1, 300, 300, 2, 64, torch.float16)]
    expected = attend(qkv, layout)[0]
    torch.cuda.synchronize()
    other = layout_of([[FULL] * 3] * 3, tokens_q=300, tokens_kv=300, block_q=128, block_kv=128)
    other = other.to(device)
    graph = torch.cuda.CUDAGraph()
    static = [torch.zeros_like(x) for x in qkv]
    with torch.cuda.graph(graph):
        out = attend(static, layout)[0]
        out_of_new_plan = attend(static, other)[0]
    for a, b in zip(static, qkv, strict=True):
        a.copy_(b)
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(out_of_new_plan, attend(qkv, other)[0])


@pytest.mark.gpu
def test_never_waits_for_the_device(device: str) -> None:
    layout = random_layout(300, 300, 128, 128).to(device)
    qkv = inputs(device, 1, 300, 300, 2, 64, torch.float16)
    attend(qkv, replace(layout, full_index=layout.full_index.clone()))[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(qkv, layout)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_plans_need_no_values() -> None:
    """Tensors without values stand for those of a GPU: looking at one would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = tensors(random_layout(70, 90, 16, 16))
    with FakeTensorMode() as mode:
        fake = tuple(mode.from_tensor(x) for x in layout)
        rows = plan.walk_rows(fake, 90, 16)
        assert rows.order.shape == (1, 5)
        assert rows.full_index.shape == fake[1].shape
        assert plan.transpose(fake, 6).order.shape == (1, 6)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3)])
def test_transposed_lists_are_the_layout_by_columns(batch: int, heads: int) -> None:
    layouts = [random_layout(70, 90, 16, 16) for _ in range(batch * heads)]
    stacked = stack_layouts(layouts, batch, heads)
    columns = plan.transpose(stacked, 6)
    full_count, full_index, partial_count, partial_index, partial_mask, _ = (
        x.flatten(0, 1) if x.ndim > 2 else x for x in stacked
    )
    for i in range(batch * heads):
        full, partial = ({j: [] for j in range(6)} for _ in range(2))
        for row in range(5):
            for j in full_index[i, row, : full_count[i, row]].tolist():
                full[j].append(row)
            entries = zip(
                partial_index[i, row].tolist(), partial_mask[i, row].tolist(), strict=True
            )
            for j, mask in list(entries)[: partial_count[i, row]]:
                partial[j].append((row, mask))
        for j in range(6):
            start, stop = columns.full_start[i, j : j + 2].tolist()
            assert columns.full_row[i, start:stop].tolist() == full[j]
            start, stop = columns.partial_start[i, j : j + 2].tolist()
            found = zip(columns.partial_row[i, start:stop].tolist(),
                        columns.partial_mask[i, start:stop].tolist(), strict=True)  # fmt: skip
            assert list(found) == partial[j]
        lengths = [len(full[j]) + len(partial[j]) for j in columns.order[i].tolist()]
        assert lengths == sorted(lengths, reverse=True)
        assert sorted(columns.order[i].tolist()) == list(range(6))


def test_long_rows_first() -> None:
    layout = layout_of(
        [[FULL, EMPTY, EMPTY], [PARTIAL, FULL, FULL], [EMPTY] * 3, [EMPTY, FULL, EMPTY]],
        tokens_q=64, tokens_kv=48, block_q=16, block_kv=16,
    )  # fmt: skip
    assert plan.walk_rows(tensors(layout), 48, 16).order.tolist() == [[1, 0, 3, 2]]


def test_a_short_block_goes_to_the_end_of_its_list() -> None:
    layout = tensors(random_layout(70, 90, 16, 16, partial=False))
    shuffled = layout[1].clone()
    for row, count in zip(shuffled[0, 0], layout[0][0, 0].tolist(), strict=True):
        row[:count] = row[:count].flip(0)
    full_index = plan.walk_rows((layout[0], shuffled, *layout[2:]), 90, 16).full_index
    assert full_index is not None
    for row, before, count in zip(
        full_index[0, 0], layout[1][0, 0], layout[0][0, 0].tolist(), strict=True
    ):
        assert sorted(row[:count].tolist()) == before[:count].tolist()
        assert 5 not in row[: max(count - 1, 0)].tolist()
    assert plan.walk_rows(layout, 96, 16).full_index is None, "no block is short"


def test_plans_are_made_once_and_die_with_the_layout(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    made = []
    for name in ("walk_rows", "transpose"):
        make = getattr(plan, name)
        monkeypatch.setattr(plan, name, lambda *a, m=make, n=name: made.append(n) or m(*a))
    layout = random_layout(40, 40, 16, 16).to(device)
    qkv = inputs(device, 1, 40, 40, 1, 16)
    for _ in range(3):
        attend(qkv, layout)[0].sum().backward()
    assert made == ["walk_rows", "transpose"]
    plans = len(plan._rows), len(plan._transposes)
    dead = weakref.ref(layout.full_index)
    del layout
    gc.collect()
    assert dead() is None
    assert (len(plan._rows), len(plan._transposes)) == (plans[0] - 1, plans[1] - 1)


def test_plans_follow_changes(device: str) -> None:
    layout = layout_of([[FULL, EMPTY, EMPTY]] * 3, tokens_q=48, tokens_kv=48, block_q=16,
                       block_kv=16).to(device)  # fmt: skip
    qkv = inputs(device, 1, 48, 48, 1, 16)
    check(qkv, layout)
    layout.full_index.fill_(2)  # in place: the identity stays
    check(qkv, layout)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool, device: str) -> None:
    layout = random_layout(20, 35, 16, 16).to(device)
    key_mask = torch.rand(2, 35, device=device) < 0.8 if masked else None
    torch.library.opcheck(
        torch.ops.diffattn.block_sparse_triton.default,
        (*inputs(device, 2, 20, 35, 2, 8), list(tensors(layout)), key_mask, 16, 16, 0.3),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool, device: str) -> None:
    torch._dynamo.reset()
    layout = random_layout(35, 35, 16, 16).to(device)
    qkv = inputs(device, 1, 35, 35, 2, 8)

    def function(*qkv: torch.Tensor) -> torch.Tensor:
        out, lse = attend([x * 2 for x in qkv], layout)
        return out.sum() + torch.where(lse.isfinite(), lse, 0).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, got = function(*qkv), compiled(*qkv)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, qkv), torch.autograd.grad(expected, qkv))


@pytest.mark.gpu
def test_compiles_with_inductor_and_cuda_graphs(device: str) -> None:
    torch._dynamo.reset()
    layout = random_layout(300, 300, 128, 128).to(device)
    qkv = inputs(device, 1, 300, 300, 2, 64, torch.bfloat16)

    def function(*qkv: torch.Tensor) -> torch.Tensor:
        return attend([x * 2 for x in qkv], layout)[0] + 1

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    expected = function(*qkv)
    wanted = torch.autograd.grad(expected.sum(), qkv)
    for _ in range(3):
        got = compiled(*qkv)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), qkv), wanted)


def _bad(device: str, **changes: object) -> dict[str, object]:
    """Good arguments for two samples of 40 query and 50 key tokens and three heads, changed."""
    layout = layout_of([[FULL, PARTIAL, FULL, PARTIAL]] * 3, tokens_q=40, tokens_kv=50,
                       block_q=16, block_kv=16).to(device)  # fmt: skip
    qkv = [x.detach() for x in inputs(device, 2, 40, 50, 3, 8)]
    changes = {k: x.to(device) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
               for k, x in changes.items()}  # fmt: skip
    index = [changes.pop(name, getattr(layout, name)) for name in LAYOUT_FIELDS]
    return {**dict(zip("qkv", qkv, strict=True)), "layout": index, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 50, 3, 8).half()}, r"share one dtype of .*torch.float16"),
        ({x: torch.randn(2, 40, 3, 8).double() for x in "qkv"}, "bfloat16; got torch.float64"),
        ({"q": torch.randn(2, 40, 24)}, r"\(batch, tokens, heads, head_dim\); got \(2, 40, 24\)"),
        ({"v": torch.randn(2, 49, 3, 8)}, r"same number of tokens; got .* v \(2, 49, 3, 8\)"),
        ({"k": torch.randn(2, 50, 1, 8)}, "have the batch, heads and head_dim of q"),
        ({"q": torch.randn(2, 60, 3, 8)}, "has 3 rows, but 60 query tokens in blocks of 16 make 4"),
        ({"key_mask": torch.ones(2, 40, dtype=torch.bool)}, r"tokens_kv\) = \(2, 50\); got .*40"),
        ({"key_mask": torch.ones(2, 50)}, "must be torch.bool .* got torch.float32"),
        ({"v": torch.randn(2, 50, 3, 8, device="meta")}, "v is on meta, but q on "),
        ({"full_count": torch.zeros(2, 2, 3, dtype=torch.int32)}, "for 2 samples and 3 heads"),
        ({"full_count": torch.zeros(1, 1, 3)}, "full_count must be torch.int32 .* got .*float32"),
        ({"bit_masks": torch.zeros(1, 16, 1, dtype=torch.int32, device="meta")}, "int32 on meta"),
        ({"full_index": torch.zeros(1, 1, 4, 1, dtype=torch.int32)}, "full_index must have shape"),
        ({"bit_masks": torch.zeros(1, 16, 2, dtype=torch.int32)}, r"bit_masks .* \(-1, 16, 1\)"),
        ({"block_kv": 48}, "block_kv must be one of 16, 32, 64, 128, 256 .*; got 48"),
        ({"block_q": 8}, "block_q must be one of 16, 32, 64, 128, 256 .*; got 8"),
        ({x: torch.randn(2, 40, 3, 257) for x in "qkv"}, "head_dim may be 1 to 256; got 257"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_bad_input_is_named(changes: dict[str, object], message: str, device: str) -> None:
    arguments: dict[str, Any] = {"block_q": 16, "block_kv": 16, **_bad(device, **changes)}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grad_out", torch.zeros(2, 39, 3, 8), r"grad_out .* \(2, 40, 3, 8\).* got .*39, 3, 8\)"),
        ("grad_out", torch.zeros(2, 40, 3, 8).half(), "grad_out .* torch.float32.* got .*float16"),
        ("out", torch.zeros(2, 40, 3, 4), r"out must .* \(2, 40, 3, 8\).* got .*3, 4\)"),
        ("lse", torch.zeros(2, 3, 50), r"lse must .* \(2, 3, 40\).* got .*50\)"),
    ],
)
def test_bad_gradients_are_named(name: str, value: torch.Tensor, message: str, device: str) -> None:
    arguments = _bad(device)
    q = arguments["q"]
    assert isinstance(q, torch.Tensor)
    arguments |= {"grad_out": q, "out": q, "lse": q.new_zeros(2, 3, 40), name: value.to(device)}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention_gradients(**arguments, block_q=16, block_kv=16)  # type: ignore[arg-type]


def test_needs_a_gpu_or_the_interpreter() -> None:
    code = """
import torch
from diffattn.blocks import FULL, layout_from_states
from diffattn.kernels.block_sparse import block_sparse_attention
states = torch.full((1, 1), FULL, dtype=torch.uint8)
layout = layout_from_states(states, None, tokens_q=9, tokens_kv=9, block_q=16, block_kv=16)
x = torch.randn(1, 9, 1, 16)
block_sparse_attention(x, x, x, layout.tensors, block_q=16, block_kv=16)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "ValueError: the Triton kernels run on a GPU, but q is on cpu" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr
