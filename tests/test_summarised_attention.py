"""Attention with summaries, against golden vectors and against its definition in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from content_goldens import Golden, read
from golden_files import matching

import diffattn
from diffattn.blocks import layout_from_states
from diffattn.masks.base import FULL
from diffattn.routing import layout_of_blocks
from diffattn.selected.key_blocks import KeyBlocks
from diffattn.selected.summary import Summary, summarised_attention


def definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    exact: torch.Tensor,
    summarised: torch.Tensor,
    lengths_q: torch.Tensor,
    lengths_kv: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, by the tokens of exact blocks and the means of summarised ones."""
    row = torch.repeat_interleave(torch.arange(len(lengths_q)), lengths_q.long())
    column = torch.repeat_interleave(torch.arange(len(lengths_kv)), lengths_kv.long())
    member = (
        torch.nn.functional.one_hot(column, len(lengths_kv))
        .to(k.dtype)[None]
        .repeat(k.shape[0], 1, 1)
    )
    if key_mask is not None:
        member = member * key_mask[:, :, None]
        k, v = (x.masked_fill(~key_mask[:, :, None, None], 0) for x in (k, v))
    counts = member.sum(1)
    means = [
        torch.einsum("bkc,bkhd->bchd", member, x) / counts.clamp(min=1)[:, :, None, None]
        for x in (k, v)
    ]
    seen = exact[:, :, row][..., column]
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    of_tokens = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    of_means = torch.einsum("bqhd,bchd->bhqc", q, means[0]) * scale + counts.log()[:, None, None]
    pooled = summarised[:, :, row] & (counts > 0)[:, None, None]
    scores = torch.cat(
        [of_tokens.masked_fill(~seen, -torch.inf), of_means.masked_fill(~pooled, -torch.inf)], -1
    )
    blind = scores.isneginf().all(-1, keepdim=True)
    some = scores.masked_fill(blind, 0)
    weights = some.softmax(-1).masked_fill(blind, 0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, torch.cat([v, means[1]], 1))
    return out, some.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), want.float(), atol=2e-6, rtol=1e-5)


def block_of(golden: Golden) -> int:
    return int(golden.get("block", 64))


@pytest.mark.parametrize("path", matching("sol/[sr]*.npz", 17), ids=lambda path: path.stem)
def test_public_results(path: Path) -> None:
    """Sol-Attn's and h3-sparse-attn's outputs over the blocks that they selected."""
    golden = read(path)
    block, tokens = block_of(golden), golden.q.shape[1]
    leaves = [golden.values[name].float().requires_grad_() for name in "qkv"]
    exact = golden.exact
    layout = layout_of_blocks(
        exact, tokens_q=tokens, tokens_kv=tokens, block_q=block, block_kv=block
    )
    count = -(-tokens // block)
    lengths = [block] * (count - 1) + [tokens - block * (count - 1)]
    blocks = KeyBlocks.of_lengths(lengths)
    hidden = exact if golden.get("summary", True) else torch.ones_like(exact)
    summary = Summary.of_blocks(leaves[1], leaves[2], blocks, hidden)
    scale = golden.get("scale", golden.q.shape[-1] ** -0.5)
    out, lse = summarised_attention(*leaves, layout, summary, scale=scale, return_lse=True)
    close(out, golden.out_public)
    close(lse, golden.lse)
    if "grad_out" in golden.values:
        grads = torch.autograd.grad(out, leaves, golden.grad_out.float())
        for name, grad in zip("qkv", grads, strict=True):
            close(grad, golden.get(f"d{name}", golden.get(f"d{name}_public")))


@pytest.mark.parametrize("path", matching("sol/g*.npz", 5), ids=lambda path: path.stem)
def test_any_bits_and_lengths(path: Path) -> None:
    """Blocks of any lengths become blocks of whole tiles by padding, as unions of blocks do."""
    golden = read(path)
    leaves = [golden.values[name].float().requires_grad_() for name in "qkv"]
    key_mask = golden.get("key_mask")
    side, place_q = tiles(golden.lengths_q)
    _, place_kv = tiles(golden.lengths_kv, side)
    q, k, v = (
        torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))[:, place]
        for x, place in zip(leaves, (place_q, place_kv, place_kv), strict=True)
    )
    there = (place_kv < leaves[1].shape[1])[None].expand(len(k), -1)
    if key_mask is not None:
        there = there & torch.nn.functional.pad(key_mask, (0, 1))[:, place_kv]
    layout = layout_of_blocks(
        golden.exact, tokens_q=len(place_q), tokens_kv=len(place_kv), block_q=side, block_kv=side
    )
    blocks = KeyBlocks.of_lengths([side] * len(golden.lengths_kv))
    hidden = golden.exact
    if "summarised" in golden.values:
        hidden = hidden | ~golden.summarised
    summary = Summary.of_blocks(k, v, blocks, hidden, key_mask=there)
    out, lse = summarised_attention(
        q, k, v, layout, summary, scale=golden.scale, key_mask=there, return_lse=True
    )
    back = place_q.argsort(stable=True)[: leaves[0].shape[1]]
    out, lse = out[:, back], lse[:, :, back]
    close(out, golden.out)
    close(lse, golden.lse)
    grads = torch.autograd.grad(out, leaves, golden.grad_out.float(), retain_graph=True)
    for name, grad in zip("qkv", grads, strict=True):
        close(grad, golden.values[f"d{name}"])
    seen = lse.isfinite()
    loss = (lse * golden.grad_lse)[seen].sum()
    dq, dk = torch.autograd.grad(loss, leaves[:2])
    close(dq, golden.dq_of_lse)
    close(dk, golden.dk_of_lse)


def tiles(lengths: torch.Tensor, side: int | None = None) -> tuple[int, torch.Tensor]:
    """A tile that holds the longest block, and the token at each place, past the end if padding."""
    side = side or int(lengths.max())
    start = lengths.cumsum(0) - lengths
    place = torch.arange(side)
    token = (start[:, None] + place).masked_fill(place >= lengths[:, None], int(lengths.sum()))
    return side, token.flatten().long()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_definition(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    tokens, block = 70, 16
    lengths = torch.tensor([16, 16, 16, 16, 6])
    leaves = [torch.randn(2, tokens, 2, 8).to(dtype).requires_grad_() for _ in range(3)]
    exact = torch.rand(2, 2, 5, 5) < 0.4
    exact[0, 0, 1] = False
    key_mask = None
    if masked:
        key_mask = torch.rand(2, tokens) < 0.7
        key_mask[0, 16:32] = False  # a block without a key
    layout = layout_of_blocks(
        exact, tokens_q=tokens, tokens_kv=tokens, block_q=block, block_kv=block, most=5
    )
    blocks = KeyBlocks.of_lengths(lengths.tolist())
    summary = Summary.of_blocks(leaves[1], leaves[2], blocks, exact, key_mask=key_mask)
    out = summarised_attention(*leaves, layout, summary, scale=0.5, key_mask=key_mask)
    truth = [x.detach().double().requires_grad_() for x in leaves]
    want, _ = definition(*truth, exact, ~exact, lengths, lengths, 0.5, key_mask)
    unit = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert (out.double() - want).abs().max() <= 4 * unit * want.abs().max()
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, along)
    expected = torch.autograd.grad(want, truth, along.double())
    for got, right in zip(found, expected, strict=True):
        assert (got.double() - right).abs().max() <= 6 * unit * right.abs().max()


def test_all_blocks_exact_is_dense_attention() -> None:
    q, k, v = torch.randn(3, 1, 100, 2, 16)
    layout = layout_from_states(
        torch.full((2, 2), FULL, dtype=torch.uint8), None,
        tokens_q=100, tokens_kv=100, block_q=64, block_kv=64,
    )  # fmt: skip
    blocks = KeyBlocks.of_lengths([64, 36])
    summary = Summary.of_blocks(k, v, blocks, torch.ones(1, 1, 2, 2, dtype=torch.bool))
    want = diffattn.attention(q, k, v, layout)
    assert torch.equal(summarised_attention(q, k, v, layout, summary), want)


def test_keys_alike_within_each_block_give_dense_attention() -> None:
    torch.manual_seed(0)
    q, v = torch.randn(2, 1, 96, 2, 16, dtype=torch.float64)
    k = torch.randn(1, 3, 2, 16, dtype=torch.float64).repeat_interleave(32, 1)
    exact = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
    exact = exact[None, None]
    layout = layout_of_blocks(exact, tokens_q=96, tokens_kv=96, block_q=32, block_kv=32)
    summary = Summary.of_blocks(k, v, KeyBlocks.of_lengths([32] * 3), exact)
    close(summarised_attention(q, k, v, layout, summary), diffattn.attention(q, k, v))


def test_triton_is_one_of_its_backends() -> None:
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 100, 1, 16))
    exact = torch.eye(4, dtype=torch.bool)[None, None]
    layout = layout_of_blocks(exact, tokens_q=100, tokens_kv=100, block_q=32, block_kv=32)
    found = []
    for backend in ("cpu", "triton"):
        summary = Summary.of_blocks(k, v, KeyBlocks.of_lengths([32, 32, 32, 4]), exact)
        out = summarised_attention(q, k, v, layout, summary, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for got, want in zip(*found, strict=True):
        close(got, want)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 x 2 pairs of blocks were chosen from, but 100 x 100"):
        layout_of_blocks(
            torch.ones(1, 1, 3, 2, dtype=torch.bool),
            tokens_q=100, tokens_kv=100, block_q=32, block_kv=32,
        )  # fmt: skip
