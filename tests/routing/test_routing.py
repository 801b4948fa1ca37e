"""Scores and rules of block selection, against golden vectors and their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from content_goldens import Golden, read
from golden_files import matching
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn.routing import (
    above,
    kept_blocks,
    layout_of_blocks,
    mass,
    mean_scores,
    neighbours,
    part_scores,
    row_threshold,
    top,
)
from diffattn.routing.lists import Held
from diffattn.selected.key_blocks import KeyBlocks


def cut(tokens: int, block: int) -> KeyBlocks:
    whole, rest = divmod(tokens, block)
    return KeyBlocks.of_lengths([block] * whole + [rest] * (rest > 0))


def means(golden: Golden, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = golden.q.float(), golden.k.float()
    return cut(q.shape[1], block).means(q), cut(k.shape[1], block).means(k)


@pytest.mark.parametrize("path", matching("sol/s*.npz", 12), ids=lambda path: path.stem)
def test_threshold_rule_is_sol_attns(path: Path) -> None:
    golden = read(path)
    of_query, of_key = means(golden, 64)
    scores = mean_scores(of_query, of_key, golden.scale)
    variance = {"diag": "diagonal", "exact": "exact"}[golden.thresh_type]
    threshold = row_threshold(scores, of_query, of_key, golden.scale, golden.tau, variance)
    torch.testing.assert_close(
        threshold[..., 0] * math.log2(math.e), golden.threshold_log2, atol=2e-6, rtol=2e-6
    )
    rows, columns = scores.shape[2:]
    always = neighbours(rows, columns, 1)
    if golden.sink_tokens:
        tokens = golden.k.shape[1]
        start = golden.sink_start if golden.sink_start >= 0 else tokens - golden.sink_tokens
        stop = start + golden.sink_tokens
        always[:, start // 64 : -(-stop // 64)] = True
    assert torch.equal(above(scores, threshold) | always, golden.exact)


@pytest.mark.parametrize("path", matching("sol/r*.npz", 5), ids=lambda path: path.stem)
def test_top_rule_is_h3_sparse_attns(path: Path) -> None:
    golden = read(path)
    scores = mean_scores(*means(golden, golden.block), 1.0)
    assert torch.equal(top(scores, golden.top_k), golden.exact)


@pytest.mark.parametrize("path", matching("block-topk/b*.npz", 6), ids=lambda path: path.stem)
def test_scores_of_parts_are_subblocks(path: Path) -> None:
    golden = read(path)
    q, k = golden.q.float(), golden.k.float()
    scores = part_scores(
        q,
        k,
        cut(q.shape[1], golden.block_q),
        cut(k.shape[1], golden.block_kv),
        part_q=golden.block_q // golden.parts_q,
        part_kv=golden.block_kv // golden.parts_kv,
        scale=golden.scale,
    )
    torch.testing.assert_close(scores, golden.scores_public, atol=2e-6, rtol=2e-6)
    chosen = top(scores, golden.topk)
    want = torch.zeros_like(chosen).scatter_(-1, golden.selected.long(), True)
    assert torch.equal(chosen, want)


@pytest.mark.parametrize("path", matching("block-topk/l*.npz", 2), ids=lambda path: path.stem)
def test_mean_scores_are_slas(path: Path) -> None:
    golden = read(path)
    q, k = golden.q.float(), golden.k.float()
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    of_query = cut(q.shape[1], golden.block_q).means(q)
    of_key = cut(k.shape[1], golden.block_kv).means(k)
    assert torch.equal(top(mean_scores(of_query, of_key, 1.0), golden.topk), golden.selected_public)


@pytest.mark.parametrize("path", matching("block-topk/j*.npz", 2), ids=lambda path: path.stem)
def test_mass_rule_is_jengas(path: Path) -> None:
    golden = read(path)
    q = golden.q
    scores = mean_scores(*means(golden, golden.block), q.shape[-1] ** -0.5)
    chosen = mass(scores, golden.mass, golden.least)
    first = golden.first_blocks
    chosen[..., :first, :first] = True
    assert torch.equal(chosen | golden.selected_public, golden.selected_public)
    # The public mask also has static neighbours, which are no part of the rule.
    extra = golden.selected_public & ~chosen
    assert extra.float().mean() < 0.35


def test_no_part_of_the_mass_rule_is_more_than_needed() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 17, dtype=torch.float64)
    weights = scores.softmax(-1)
    for share in (0.0, 0.3, 0.9):
        chosen = mass(scores, share)
        kept = (weights * chosen).sum(-1)
        least = weights.masked_fill(~chosen, 2).amin(-1)
        assert (kept > share).all()
        assert ((kept - least) <= share).all()
        assert (weights.masked_fill(chosen, 0).amax(-1) <= least).all()
    assert mass(scores, 1.0).all()
    assert (mass(scores, 0.0, least=4).sum(-1) == 4).all()


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_scores_of_parts_are_the_log_sum_exp_of_means(
    tokens: int, block: int, part: int, heads: int, masked: bool
) -> None:
    q, k = torch.randn(2, 2, tokens, heads, 4, dtype=torch.float64)
    blocks = cut(tokens, block)
    counted = torch.rand(2, tokens) < 0.6 if masked else None
    got = part_scores(
        q, k, blocks, blocks, part_q=part, part_kv=part + 1, scale=0.7,
        counted_queries=counted, counted_keys=counted,
    )  # fmt: skip
    for sample in range(2):
        there = torch.ones(tokens, dtype=torch.bool) if counted is None else counted[sample]
        for row in range(len(blocks.lengths)):
            for column in range(len(blocks.lengths)):
                of_q, of_k = (
                    [
                        x[sample, part_of[there[part_of]]].mean(0)
                        for part_of in torch.arange(n * block, min((n + 1) * block, tokens)).split(
                            size
                        )
                        if there[part_of].any()
                    ]
                    for x, n, size in ((q, row, part), (k, column, part + 1))
                )
                want = torch.full((heads,), -torch.inf, dtype=torch.float64)
                if of_q and of_k:
                    pairs = torch.einsum("xhd,yhd->hxy", torch.stack(of_q), torch.stack(of_k))
                    want = (pairs * 0.7).flatten(1).logsumexp(1)
                torch.testing.assert_close(got[sample, :, row, column], want)


def test_the_best_are_kept_and_of_equals_the_first() -> None:
    scores = torch.tensor([3.0, 1, 3, 3, 0, 2])[None, None, None]
    assert top(scores, 2).flatten().tolist() == [True, False, True, False, False, False]
    candidates = torch.tensor([False, True, True, True, True, False])
    kept = top(scores, 3, candidates).flatten().tolist()
    assert kept == [False, True, True, True, False, False]
    assert top(scores, 9).all()


@pytest.mark.parametrize(
    ("share", "candidates", "blocks"),
    [(1 - 0.8, 455, 91), (1 - 0.7, 10, 3), (0.25, 7, 2), (0.01, 3, 1), (1, 5, 5), (0.7, 10, 7)],
)
def test_a_share_of_blocks_is_counted_as_meant(share: float, candidates: int, blocks: int) -> None:
    assert kept_blocks(share, candidates) == blocks


@pytest.mark.parametrize("share", [0, -0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="but must be above 0, at most 1"):
        kept_blocks(share, 10)


def test_blocks_without_a_token_count_in_no_threshold() -> None:
    torch.manual_seed(0)
    of_query, of_key = torch.randn(2, 1, 6, 2, 4)
    scores = mean_scores(of_query, of_key, 0.5)
    counted = torch.tensor([[True, True, False, True, True, True]])
    for variance in ("diagonal", "exact"):
        got = row_threshold(scores, of_query, of_key, 0.5, 1.2, variance, counted)
        some = [0, 1, 3, 4, 5]
        want = row_threshold(scores[..., some], of_query, of_key[:, some], 0.5, 1.2, variance)
        torch.testing.assert_close(got, want)


@given(st.integers(1, 150), st.integers(1, 40), st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_lists_hold_the_chosen_blocks(tokens: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = -(-tokens // block)
    chosen = torch.rand(2, 3, count, count, generator=generator) < 0.4
    layout = layout_of_blocks(
        chosen, tokens_q=tokens, tokens_kv=tokens, block_q=block, block_kv=block
    )
    want = chosen.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :tokens, :tokens]
    assert torch.equal(layout.dense(), want)
    most = int(chosen.sum(-1).max())
    short = layout_of_blocks(
        chosen, tokens_q=tokens, tokens_kv=tokens, block_q=block, block_kv=block, most=most
    )
    assert short.full_index.shape[-1] == max(1, most)
    assert torch.equal(short.dense(), want)


@pytest.mark.parametrize("lengths", [[16, 3, 16, 16, 1], [5], [16, 16]])
def test_lists_hide_the_places_that_hold_no_key(lengths: list[int]) -> None:
    torch.manual_seed(len(lengths))
    blocks, places = len(lengths), 16 * len(lengths)
    filled = (torch.arange(16) < torch.tensor(lengths)[:, None]).flatten()
    chosen = torch.rand(2, 3, blocks, blocks) < 0.6
    chosen[0, 0, 0], chosen[0, 0, -1] = False, True
    layout = layout_of_blocks(
        chosen,
        tokens_q=places,
        tokens_kv=places,
        block_q=16,
        block_kv=16,
        held=Held.of(filled, 16),
    )
    want = chosen.repeat_interleave(16, 2).repeat_interleave(16, 3) & filled
    assert torch.equal(layout.dense(), want)


@pytest.mark.parametrize("columns", [9, 5000])
def test_rows_keep_numbers_of_their_own(columns: int) -> None:
    """In rows that are sorted and in rows that are counted, more than are chosen from at a time."""
    torch.manual_seed(columns)
    scores = torch.randn(2, 3, 12, columns)
    counts = torch.arange(12, dtype=torch.int32)
    kept = top(scores, counts)
    for row in range(12):
        assert torch.equal(kept[:, :, row], top(scores, row)[:, :, row])


def test_scores_may_rule_blocks_out() -> None:
    scores = torch.randn(1, 2, 3, 10)
    scores[0, 0, 0, 4:], scores[0, 0, 1, 2], scores[0, 1, 0] = -torch.inf, torch.nan, torch.nan
    scores[0, 1, 1, 7] = torch.inf
    candidates = torch.arange(10) != 9
    kept = top(scores, 5, candidates, ruled_out=True)
    assert torch.equal(kept[0, 0, 0], torch.arange(10) < 4)
    assert kept[0, 0, 1].sum() == 5
    assert not kept[0, 0, 1, 2]
    assert not kept[0, 1, 0].any()
    assert kept[0, 1, 1, 7]
    assert not kept[..., 9].any()


@pytest.mark.parametrize(("lengths", "size"), [([64, 64, 20], 16), ([7, 30, 1], 8), ([5], 9)])
def test_blocks_have_equally_many_parts_of_which_some_are_empty(
    lengths: list[int], size: int
) -> None:
    starts, exists = KeyBlocks.of_lengths(lengths).parts(size)
    number = -(-max(lengths) // size)
    assert exists.shape == (1, len(lengths), number)
    found = [list(range(starts[n], starts[n + 1])) for n in range(len(lengths) * number)]
    want, first = [], 0
    for length in lengths:
        of_block = list(range(first, first + length))
        want += [of_block[n * size : (n + 1) * size] for n in range(number)]
        first += length
    assert found == want
    assert exists.flatten().tolist() == [bool(part) for part in want]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "block"), [(330, 64), (65, 64), (7, 16), (129, 16), (200, 3)])
def test_means_with_a_short_last_block_have_the_bits_of_whole_blocks(
    dtype: torch.dtype, tokens: int, block: int
) -> None:
    torch.manual_seed(tokens)
    blocks = cut(tokens, block)
    x = torch.randn(2, tokens, 3, 40, dtype=dtype)
    filled = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -tokens % block))
    sums = filled.unflatten(1, (-1, blocks.members.shape[1])) if tokens > block else x[:, None]
    exact = torch.promote_types(dtype, torch.float32)
    want = sums.sum(2, dtype=exact) / blocks.sizes[:, None, None]
    assert torch.equal(blocks.means(x), want)
    counted = torch.rand(2, tokens) < 0.5
    hidden = x.masked_fill(~counted[:, :, None, None], torch.nan)
    alone = torch.stack([blocks.means(hidden[n : n + 1], counted[n : n + 1])[0] for n in (0, 1)])
    assert torch.equal(blocks.means(hidden, counted), alone)
