"""Attention to chosen blocks and to what remains: goldens of comfy-kitchen, the definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from content_goldens import Golden, read
from golden_files import matching
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn.kernels.summary import summary_attention
from diffattn.operator import attention, merged
from diffattn.routing import (
    REMAINDERS,
    above,
    attention_of_blocks,
    layout_of_blocks,
    mean_scores,
    neighbours,
    row_threshold,
    top,
)
from diffattn.selected.key_blocks import KeyBlocks
from diffattn.selected.summary import Summary, summarised_attention

EXACT = {"atol": 2e-6, "rtol": 1e-5}
BLOCK = 64


def cut(tokens: int, block: int) -> KeyBlocks:
    whole, rest = divmod(tokens, block)
    return KeyBlocks.of_lengths([block] * whole + [rest] * (rest > 0))


def blocks_in(span: torch.Tensor | None, count: int) -> torch.Tensor:
    """The blocks from the first to before the second of two numbers: bool (count,)."""
    out = torch.zeros(count, dtype=torch.bool)
    if span is not None:
        out[int(span[0]) : int(span[1])] = True
    return out


def kitchens_choice(
    golden: Golden, blocks: KeyBlocks, counted: torch.Tensor | None
) -> torch.Tensor:
    """The blocks that comfy-kitchen computes exactly, from the parts of `diffattn.routing`."""
    q, k = golden.q.float(), golden.k.float()
    scale, count = q.shape[-1] ** -0.5, len(blocks.lengths)
    means = blocks.means(q, counted), blocks.means(k, counted)
    scores = mean_scores(*means, scale)
    sinks = blocks_in(golden.get("arg_sink_blocks"), count)
    ratio = golden.get("arg_topk_ratio")
    if ratio is None:
        chosen = above(scores, row_threshold(scores, *means, scale, golden.arg_tau))
    else:
        others = int((~sinks).sum())
        chosen = top(scores, max(0, min(others - 1, max(1, round(ratio * others)))), ~sinks)
    whole_rows = blocks_in(golden.get("arg_sink_q"), count)
    return chosen | neighbours(count, count, 1) | sinks | whole_rows[:, None]


def check(golden: Golden, leaves: list[torch.Tensor], out: torch.Tensor, there: Any = ...) -> None:
    torch.testing.assert_close(out[there], golden.out_public[there], **EXACT)
    grads = torch.autograd.grad(out, leaves, golden.grad_out.float())
    for name, grad in zip("qkv", grads, strict=True):
        torch.testing.assert_close(grad, golden.values[f"d{name}_public"], **EXACT)


@pytest.mark.parametrize("path", matching("sol/k0[0-3]*.npz", 4), ids=lambda path: path.stem)
def test_sinks_thresholds_and_shares_are_comfy_kitchens(path: Path) -> None:
    golden = read(path)
    leaves = [golden.values[name].float().requires_grad_() for name in "qkv"]
    blocks = cut(leaves[0].shape[1], BLOCK)
    chosen = kitchens_choice(golden, blocks, None)
    remainder = "block-summary" if golden.get("arg_tail", True) else "drop"
    check(golden, leaves, attention_of_blocks(*leaves, blocks, chosen, remainder=remainder))


def test_tiles_with_a_gate_are_comfy_kitchens() -> None:
    (path,) = matching("sol/k04*.npz", 1)
    golden = read(path)
    leaves = [golden.values[name].float().requires_grad_() for name in "qkv"]
    blocks = cut(leaves[0].shape[1], BLOCK)
    there = (torch.arange(BLOCK) < golden.arg_block_len[:, None]).flatten()[None]
    chosen = kitchens_choice(golden, blocks, there)
    out = attention_of_blocks(*leaves, blocks, chosen, key_mask=there)
    coarse = attention(*(blocks.means(x, there) for x in leaves))
    out = out + golden.arg_coarse_gate * coarse.repeat_interleave(BLOCK, 1)
    check(golden, leaves, out, there)


def test_a_bias_for_each_key_of_sinks_is_comfy_kitchens() -> None:
    """Keys with a bias are summaries of one key each."""
    (path,) = matching("sol/k05*.npz", 1)
    golden = read(path)
    leaves = q, k, v = [golden.values[name].float().requires_grad_() for name in "qkv"]
    tokens = q.shape[1]
    blocks = cut(tokens, BLOCK)
    rows = len(blocks.lengths)
    chosen = kitchens_choice(golden, blocks, None)
    sinks = blocks_in(golden.arg_sink_blocks, rows)
    layout = layout_of_blocks(
        chosen & ~sinks, tokens_q=tokens, tokens_kv=tokens, block_q=BLOCK, block_kv=BLOCK
    )
    out, lse = summarised_attention(
        q,
        k,
        v,
        layout,
        Summary.of_blocks(k, v, blocks, chosen),
        query_means=blocks.means(q),
        return_lse=True,
    )
    biased = slice(int(sinks.sum()) * BLOCK)
    assert (golden.arg_key_bias[biased.stop :] == 0).all()
    nothing = torch.zeros(1, 1, rows, BLOCK // 32, dtype=torch.int32)
    bias = golden.arg_key_bias[None, None, biased]
    more = summary_attention(q, k[:, biased], v[:, biased], bias, nothing, block_q=BLOCK)
    out, _ = merged(out, lse, *more)
    check(golden, leaves, out)


def test_cubes_are_sglangs() -> None:
    (path,) = matching("block-topk/c00*.npz", 1)
    golden = read(path)
    q, k = golden.q.float(), golden.k.float()
    blocks = KeyBlocks.of_lengths(golden.lengths.tolist())
    count = len(blocks.lengths)
    dense = torch.arange(count) < golden.dense_blocks
    scores = mean_scores(blocks.means(q), blocks.means(k), q.shape[-1] ** -0.5)
    kept = int(golden.ratio * int((~dense).sum()))
    assert golden.count.unique().tolist() == [0, kept]
    chosen = top(scores, kept, ~dense) & ~dense[:, None]
    assert torch.equal(chosen[0], golden.chosen_public)
    always = neighbours(count, count, 0) | dense | dense[:, None]
    assert torch.equal((chosen | always)[0], golden.all_visited)


def definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    block: int,
    remainder: str,
    key_mask: torch.Tensor,
) -> torch.Tensor:
    """Token by token: a key that is not chosen itself counts as its block's mean."""
    tokens = q.shape[1]
    member = torch.nn.functional.one_hot(torch.arange(tokens) // block).double()  # (tokens, blocks)
    weight = key_mask.double()[:, :, None] * member
    count = weight.sum(1)

    def means(x: torch.Tensor) -> torch.Tensor:
        sums = torch.einsum("bthd,btc->bchd", x * key_mask[:, :, None, None], weight)
        return sums / count.clamp(min=1)[:, :, None, None]

    def of_tokens(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bchd,tc->bthd", x, member)

    scale = q.shape[-1] ** -0.5
    mean_key = means(k)
    queries = q
    if remainder == "block-summary":
        held = (count > 0).double()[:, :, None, None]
        centre = (mean_key * held).sum(1, keepdim=True) / held.sum(1, keepdim=True)
        k, mean_key, queries = k - centre, mean_key - centre, of_tokens(means(q))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    pooled = torch.einsum("bqhd,bkhd->bhqk", queries, of_tokens(mean_key)) * scale
    if remainder == "drop":
        pooled = torch.full_like(pooled, -torch.inf)
    seen = torch.einsum("qr,bhrc,kc->bhqk", member, chosen.double(), member) > 0
    scores = torch.where(seen, scores, pooled).masked_fill(~key_mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights * seen, v)
    return out + torch.einsum("bhqk,bkhd->bqhd", weights * ~seen, of_tokens(means(v)))


@given(
    st.integers(1, 120), st.sampled_from([16, 32]), st.sampled_from(REMAINDERS), st.booleans(),
    st.sampled_from([0.0, 0.4, 1.0]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_equals_the_definition(
    tokens: int, block: int, remainder: str, masked: bool, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k, v, along = torch.randn(4, 2, tokens, 2, 4, dtype=torch.float64)
    key_mask = torch.rand(2, tokens) < 0.6 if masked else torch.ones(2, tokens, dtype=torch.bool)
    key_mask[:, 0] = True
    along = along * key_mask[:, :, None, None]
    k, v = (x.masked_fill(~key_mask[:, :, None, None], torch.nan) for x in (k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    blocks = cut(tokens, block)
    rows = len(blocks.lengths)
    chosen = torch.rand(2, 2, rows, rows) < share
    given = key_mask if masked else None
    out = attention_of_blocks(*leaves, blocks, chosen, remainder=remainder, key_mask=given)
    clean = [x.detach().nan_to_num(0).requires_grad_() for x in leaves]
    want = definition(*clean, chosen, block, remainder, key_mask)
    torch.testing.assert_close(out[key_mask], want[key_mask], atol=1e-7, rtol=1e-6)
    found = torch.autograd.grad(out, leaves, along)
    expected = torch.autograd.grad(want, clean, along)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, atol=1e-7, rtol=1e-6)


def test_what_all_keys_share_does_not_change_summaries_of_blocks() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 90, 2, 8, dtype=torch.float64)
    blocks = cut(90, 16)
    chosen = torch.rand(1, 2, 6, 6) < 0.4
    out, moved = (
        attention_of_blocks(q, keys, v, blocks, chosen, remainder="block-summary")
        for keys in (k, k + 3 * torch.randn(1, 1, 2, 8, dtype=torch.float64))
    )
    torch.testing.assert_close(out, moved)


def test_alike_queries_see_summaries_of_blocks_as_they_see_summaries() -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 80, 1, 8, dtype=torch.float64)
    q = torch.randn(1, 5, 1, 8, dtype=torch.float64).repeat_interleave(16, 1)
    blocks = cut(80, 16)
    chosen = torch.eye(5, dtype=torch.bool)[None, None]
    by_row, by_block = (
        attention_of_blocks(q, k, v, blocks, chosen, remainder=remainder)
        for remainder in ("summary", "block-summary")
    )
    torch.testing.assert_close(by_row, by_block)


def test_half_precision_keeps_its_dtype() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 80, 2, 16, dtype=torch.bfloat16)
    chosen = torch.eye(5, dtype=torch.bool).expand(1, 2, 5, 5)
    for remainder in REMAINDERS:
        out = attention_of_blocks(q, k, v, cut(80, 16), chosen, remainder=remainder)
        want = attention_of_blocks(
            *(x.double() for x in (q, k, v)), cut(80, 16), chosen, remainder=remainder
        )
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), want, atol=0.02, rtol=0.02)


def test_unknown_remainders_are_named() -> None:
    q = torch.randn(1, 40, 1, 8)
    chosen = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match="remainder is 'mean', but must be one of drop, summary, b"
    ):
        attention_of_blocks(q, q, q, cut(40, 16), chosen, remainder="mean")
