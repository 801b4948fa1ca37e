"""Attention to blocks and summaries in one operator, against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import random_layout, stack_layouts, tensors

from diffattn.blocks import BlockLayout, pack_bits, unpack_bits
from diffattn.kernels.block_sparse import block_sparse_attention
from diffattn.kernels.summary import summary_attention
from diffattn.kernels.summary.joint import joint_attention
from diffattn.operator import merged

UNIT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def truth(
    leaves: list[torch.Tensor],
    seen: torch.Tensor,
    hidden: torch.Tensor,
    block_q: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over tokens and summaries; `seen` is bool (batch|1, heads|1, queries, keys)."""
    q, k, v, more_k, more_v, bias = leaves
    tokens = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    tokens = tokens.masked_fill(~seen, -torch.inf)
    is_hidden = unpack_bits(hidden, more_k.shape[1]).repeat_interleave(block_q, 2)
    summaries = torch.einsum("bqhd,bkhd->bhqk", q, more_k) * scale + bias[:, :, None]
    summaries = summaries.masked_fill(is_hidden[:, :, : q.shape[1]], -torch.inf)
    scores = torch.cat([tokens, summaries], -1)
    blind = scores.isneginf().all(-1, keepdim=True)
    some = scores.masked_fill(blind, 0)
    weights = some.softmax(-1).masked_fill(blind, 0)
    values = torch.cat([v, more_v], 1)
    lse = some.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values), lse


def case(
    layout: BlockLayout,
    device: str,
    dtype: torch.dtype,
    *,
    batch: int,
    heads: int,
    dim: int,
    summaries: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v, summaries and biases that want gradients, and the bits."""
    queries, keys = layout.tokens_q, layout.tokens_kv
    counts = (queries, keys, keys, summaries, summaries)
    leaves = [torch.randn(batch, n, heads, dim).to(device, dtype) for n in counts]
    leaves[3:] = [x.float() for x in leaves[3:]]
    bias = torch.randn(batch, 1, summaries, device=device)
    bias[..., summaries // 2] = -torch.inf
    rows = -(-queries // layout.block_q)
    hidden = torch.rand(batch, heads, rows, summaries, device=device) < 0.4
    hidden[:, :, 0] = True  # the first queries see tokens alone
    return [x.requires_grad_() for x in (*leaves, bias)], pack_bits(hidden)


def check(
    leaves: list[torch.Tensor],
    seen: torch.Tensor,
    layout: tuple[torch.Tensor, ...],
    hidden: torch.Tensor,
    **options: Any,
) -> None:
    """Compare results and gradients, of the log-sum-exp too, with float64."""
    out, lse = joint_attention(*leaves[:3], layout, *leaves[3:], hidden, **options)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    scale = options.get("scale") or leaves[0].shape[-1] ** -0.5
    want, want_lse = truth(exact, seen, hidden, options["block_q"], scale)
    unit = UNIT[leaves[0].dtype]
    assert out.dtype == leaves[0].dtype
    assert torch.equal(lse.isinf(), want_lse.isinf())
    sees = want_lse.isfinite()
    assert (out.double() - want).abs().max() <= 4 * unit * want.abs().max()
    torch.testing.assert_close(lse.double()[sees], want_lse[sees], atol=4 * unit, rtol=4 * unit)
    along, along_lse = torch.randn_like(out), torch.randn_like(lse)
    loss = (out * along).sum() + (lse * along_lse)[sees].sum()
    want_loss = (want * along.double()).sum() + (want_lse * along_lse.double())[sees].sum()
    found = torch.autograd.grad(loss, leaves)
    expected = torch.autograd.grad(want_loss, exact)
    largest = max(grad.abs().max() for grad in expected)
    for got, right, leaf in zip(found, expected, leaves, strict=True):
        assert got.dtype == leaf.dtype
        assert (got.double() - right).abs().max() <= 6 * unit * largest


@pytest.mark.parametrize(
    ("sizes", "blocks", "dtype", "masked", "scale"),
    [
        pytest.param((45, 45), (16, 16), torch.float32, False, None, id="odd"),
        pytest.param((35, 50), (16, 32), torch.float32, True, -0.7, id="cross, key mask, negative"),
        pytest.param((100, 64), (64, 64), torch.bfloat16, False, None, id="bfloat16"),
        pytest.param((96, 96), (32, 32), torch.float16, True, 0.2, id="float16, whole blocks"),
    ],
)
def test_equals_the_definition(
    sizes: tuple[int, int],
    blocks: tuple[int, int],
    dtype: torch.dtype,
    masked: bool,
    scale: float | None,
    device: str,
) -> None:
    layout = random_layout(*sizes, *blocks)
    leaves, hidden = case(layout, device, dtype, batch=2, heads=2, dim=16, summaries=37)
    seen = layout.dense().to(device)
    key_mask = None
    if masked:
        key_mask = torch.rand(2, sizes[1], device=device) < 0.7
        key_mask[1] = False  # sample 1 sees summaries alone, and its first queries nothing
        seen = seen & key_mask[:, None, None]
    check(
        leaves,
        seen,
        tuple(x.to(device) for x in tensors(layout)),
        hidden,
        block_q=blocks[0],
        block_kv=blocks[1],
        scale=scale,
        key_mask=key_mask,
    )


def test_every_head_has_its_own_blocks(device: str) -> None:
    layouts = [random_layout(35, 35, 16, 16) for _ in range(4)]
    leaves, hidden = case(layouts[0], device, torch.float32, batch=2, heads=2, dim=24, summaries=9)
    seen = torch.stack([x.dense()[0, 0] for x in layouts]).unflatten(0, (2, 2)).to(device)
    lists = tuple(x.to(device) for x in stack_layouts(layouts, 2, 2))
    check(leaves, seen, lists, hidden, block_q=16, block_kv=16)


def test_hidden_summaries_change_no_bit_of_the_output(device: str) -> None:
    layout = random_layout(70, 70, 16, 16)
    leaves, _ = case(layout, device, torch.bfloat16, batch=1, heads=2, dim=16, summaries=40)
    nothing = torch.full((1, 1, 5, 2), -1, dtype=torch.int32, device=device)
    lists = tuple(x.to(device) for x in tensors(layout))
    q, k, v, *summary = leaves
    out, lse = joint_attention(q, k, v, lists, *summary, nothing, block_q=16, block_kv=16)
    want, want_lse = block_sparse_attention(q, k, v, lists, block_q=16, block_kv=16)
    assert torch.equal(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_it_is_two_attentions_that_are_merged(device: str) -> None:
    layout = random_layout(70, 70, 16, 16)
    leaves, hidden = case(layout, device, torch.float32, batch=1, heads=2, dim=16, summaries=40)
    lists = tuple(x.to(device) for x in tensors(layout))
    q, k, v, *summary = leaves
    together = joint_attention(q, k, v, lists, *summary, hidden, block_q=16, block_kv=16)
    exact = block_sparse_attention(q, k, v, lists, block_q=16, block_kv=16)
    pooled = summary_attention(q, *summary, hidden, block_q=16, backend="triton")
    for got, want in zip(together, merged(*exact, *pooled), strict=True):
        torch.testing.assert_close(got, want)


def test_backward_keeps_no_result_of_one_part(device: str) -> None:
    layout = random_layout(64, 64, 16, 16)
    leaves, hidden = case(layout, device, torch.float32, batch=1, heads=2, dim=16, summaries=4)
    lists = tuple(x.to(device) for x in tensors(layout))
    kept: list[torch.Size] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.shape)
        return x

    q, k, v, *summary = leaves
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        joint_attention(q, k, v, lists, *summary, hidden, block_q=16, block_kv=16)
    assert kept.count(q.shape) == 4  # q, k, v and the output


def test_bad_input_is_named(device: str) -> None:
    layout = random_layout(64, 64, 16, 16)
    leaves, hidden = case(layout, device, torch.float32, batch=1, heads=2, dim=16, summaries=4)
    lists = tuple(x.to(device) for x in tensors(layout))
    q, k, v, *summary = leaves
    with pytest.raises(
        ValueError, match="block_kv must be one of 16, 32, 64, 128, 256 on this dev"
    ):
        joint_attention(q, k, v, lists, *summary, hidden, block_q=16, block_kv=24)
    with pytest.raises(ValueError, match=r"hidden must be torch.int32 \(1 or 1, 1 or 2, 4, 1\)"):
        joint_attention(q, k, v, lists, *summary, hidden[:, :, 1:], block_q=16, block_kv=16)
    with pytest.raises(NotImplementedError, match="summary keys has no forward-mode derivative"):
        torch.func.jvp(
            lambda q: joint_attention(q, k, v, lists, *summary, hidden, block_q=16, block_kv=16)[0],
            (q.detach(),),
            (q.detach(),),
        )
