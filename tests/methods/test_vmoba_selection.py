"""Partitions and the choice of blocks: the public code's masks, its bugs, and the definition."""

import math
from fractions import Fraction
from typing import Any

import golden_files
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn import BlockTopKAttn, TokenGrid, VMoBAAttn
from diffattn.blocks import unpack_bits
from diffattn.methods.base import Site
from diffattn.methods.vmoba.selection import Rule, select_blocks
from diffattn.routing import Count, Pooled, choosing, pools
from diffattn.routing.choosing import choose
from diffattn.selected.key_blocks import Chunk, KeyBlocks, Partition

GOLDENS = golden_files.GOLDENS / "vmoba"

SCOPES = {
    "query_head": "query",
    "head_global": "head",
    "block": "unpublished-block",
    "overall": "unpublished-all",
}
RULES = [
    Rule("query", topk=2),
    Rule("head", topk=2),
    Rule("unpublished-all", topk=2),
    Rule("query", tau=0.4),
    Rule("head", tau=0.4),
    Rule("unpublished-block", tau=0.4),
    Rule("unpublished-all", tau=0.4),
]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.scope}-{r.topk or r.tau}")


def golden_chunk(golden: Any, grid: TokenGrid) -> Chunk:
    chunk = golden["chunk"]
    if chunk.ndim == 0:
        return (int(chunk) * grid.frame_tokens,)
    return (*((grid.frames,) if len(chunk) == 2 else ()), *chunk.tolist())


def golden_rule(golden: Any) -> Rule:
    scope = SCOPES[str(golden["scope"])]
    if str(golden["select_mode"]) == "topk":
        return Rule(scope, topk=int(golden["topk"]))
    return Rule(scope, tau=float(golden["tau"]))


def selected(query: torch.Tensor, key: torch.Tensor, blocks: KeyBlocks, rule: Rule) -> torch.Tensor:
    """Bool (batch, heads, tokens, blocks)."""
    return unpack_bits(select_blocks(query, key, blocks, rule), blocks.blocks)


def random_inputs(tokens: int, batch: int = 3, heads: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    query, key = torch.randn(2, batch, tokens, heads, 8, generator=generator)
    return query, key


def own_block(blocks: KeyBlocks) -> torch.Tensor:
    """Bool (tokens, blocks) of a sequence without text."""
    return blocks.block_of[:, None] == torch.arange(blocks.blocks)


# --- partitions


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("1d_2", (96,)),
        ("1d_3", (144,)),
        ("1d_1p5", (72,)),
        ("2d_3x4", (4, 3, 4)),
        ("2d_2x2", (4, 2, 2)),
        ("3d_2x3x4", (2, 3, 4)),
        ("3d_1x2x8", (1, 2, 8)),
    ],
)
def test_partitions_are_those_of_the_public_code(name: str, chunk: Chunk) -> None:
    golden = np.load(GOLDENS / "g00_partitions.npz")
    partition = Partition(TokenGrid(*golden["grid"].tolist()), chunk)
    np.testing.assert_array_equal(partition.positions(), golden[f"perm_{name}"])
    np.testing.assert_array_equal(
        partition.key_blocks(torch.device("cpu")).starts, golden[f"cu_{name}"]
    )


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 7)] * 3),
    chunk=st.one_of(st.tuples(*[st.integers(1, 8)] * 3), st.tuples(st.integers(1, 60))),
    text=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_blocks_hold_the_tokens_of_their_boxes(
    sizes: tuple[int, int, int], chunk: Chunk, text: tuple[int, int]
) -> None:
    grid = TokenGrid(*sizes, *text)
    partition = Partition(grid, chunk)
    blocks = partition.key_blocks(torch.device("cpu"))
    token = torch.arange(grid.tokens)
    order = partition.to_blocks(token[None])[0]
    assert torch.equal(partition.from_blocks(order[None])[0], token)
    assert torch.equal(order, partition.positions())
    lengths = blocks.starts.diff().tolist()
    pieces = order.split(lengths)
    assert all(len(piece) for piece in pieces)
    if text[0]:
        assert torch.equal(pieces[0], token[: text[0]])
    if text[1]:
        assert torch.equal(pieces[-1], token[grid.video.stop :])
    video = pieces[bool(text[0]) : len(pieces) - bool(text[1])]
    assert tuple(map(len, video)) == blocks.lengths == tuple(partition.lengths())
    for number, piece in enumerate(video):
        assert (piece.diff() > 0).all(), "raster order inside of a block"
        places = torch.stack(grid.coordinates(piece), 1)
        if len(chunk) == 1:
            assert int((piece - text[0])[0]) == number * chunk[0]
        else:
            boxes = places // torch.tensor(chunk)
            assert (boxes == boxes[0]).all()
    # Every box is one block: there are as many as boxes.
    if len(chunk) == 3:
        assert len(video) == math.prod(-(-n // c) for n, c in zip(sizes, chunk, strict=True))
    assert torch.equal(blocks.block_of.bincount(), blocks.sizes)


def test_means_of_ragged_blocks_count_what_is_there() -> None:
    blocks = KeyBlocks.of_lengths([3, 1, 4])
    x = torch.randn(2, 8, 2, 5, dtype=torch.bfloat16)
    counted = torch.tensor([[1, 0, 1, 0, 1, 1, 1, 1], [1] * 8]).bool()
    x[~counted] = torch.nan
    found = blocks.means(x, counted)
    assert found.dtype == torch.float32
    want = torch.zeros(2, 3, 2, 5, dtype=torch.float64)
    for b in range(2):
        for c, part in enumerate(torch.arange(8).split([3, 1, 4])):
            kept = [x[b, i].double() for i in part.tolist() if counted[b, i]]
            want[b, c] = torch.stack(kept).mean(0) if kept else 0
    torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(blocks.means(x[1:])[0].double(), want[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lengths", [[], [3, 0, 2]])
def test_blocks_without_tokens_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"blocks need at least one token each, but are of \["):
        KeyBlocks.of_lengths(lengths)


# --- the public code's masks


@pytest.mark.parametrize("longest_sorted", [1, 1 << 30], ids=["counted", "sorted"])
@pytest.mark.parametrize(
    "name",
    [
        "g01_topk_query_head_3d",
        "g02_topk_head_global_2d",
        "g04_thr_query_head_3d",
        "g05_thr_head_global_3d_grads",
        "g07_thr_block_3d",
        "g11_topk_query_head_1d_grads",
    ],
)
def test_selection_is_that_of_the_public_code(
    name: str, longest_sorted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "_LONGEST_SORTED", longest_sorted)
    golden = np.load(GOLDENS / f"{name}.npz")
    grid = TokenGrid(*golden["grid"].tolist())
    partition = Partition(grid, golden_chunk(golden, grid))
    np.testing.assert_array_equal(partition.positions(), golden["perm"])
    blocks = partition.key_blocks(torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        query, key = (partition.to_blocks(torch.from_numpy(golden[n]).to(dtype)) for n in "qk")
        found = selected(query, key, blocks, golden_rule(golden))[0].permute(2, 0, 1)
        np.testing.assert_array_equal(found, golden["mask"], err_msg=str(dtype))


def test_samples_of_any_length_are_selected_in_as_the_public_code_does() -> None:
    golden = np.load(GOLDENS / "g09_topk_query_head_varlen.npz")
    size, first_block = int(golden["block_len"]), 0
    for start, stop in zip(golden["cu_seqlens"], golden["cu_seqlens"][1:], strict=False):
        count = int(stop - start)
        lengths = [size] * (count // size) + [count % size] * (count % size > 0)
        query, key = (torch.from_numpy(golden[n])[None, start:stop] for n in "qk")
        found = selected(query, key, KeyBlocks.of_lengths(lengths), golden_rule(golden))
        want = golden["mask"][first_block : first_block + len(lengths), :, start:stop]
        np.testing.assert_array_equal(found[0].permute(2, 0, 1), want)
        first_block += len(lengths)
    assert first_block == len(golden["mask"])


# --- the definition


def best(scores: list[int], own: list[bool], tau: Fraction | None, budget: int) -> set[int]:
    """What `choose` is to choose of one pool of whole numbers, in exact arithmetic."""
    low, high = min(scores), max(scores)
    z = [Fraction(s - low, high - low) if high > low else Fraction(0) for s in scores]
    weight = z if tau is not None else [Fraction(1)] * len(z)
    target = tau * sum(z) if tau is not None else Fraction(budget)
    chosen = {i for i, mine in enumerate(own) if mine}
    reached = sum(weight[i] for i in chosen)
    for i in sorted(set(range(len(z))) - chosen, key=lambda i: (-z[i], i)):
        if reached >= target:
            break
        chosen.add(i)
        reached += weight[i]
    return chosen


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_fewest_best_entries_are_chosen(data: st.DataObject) -> None:
    entries, pools = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4))
    # 15 divides the highest fixed-point number: nothing is rounded.
    score = st.sampled_from([0, 1, 3, 7, 8, 14, 15])
    rows = [data.draw(st.lists(score, min_size=entries, max_size=entries)) for _ in range(pools)]
    for row in rows:
        if len(set(row)) > 1:
            row[row.index(min(row))], row[row.index(max(row))] = 0, 15
            if max(row) == min(row):
                row[0] = 0
    own = [[data.draw(st.integers(0, 3)) == 0 for _ in row] for row in rows]
    tau = data.draw(st.sampled_from([None, Fraction(1, 64), Fraction(1, 4), Fraction(63, 64)]))
    budget = data.draw(st.integers(0, entries + 1))
    want = torch.zeros(pools, entries, dtype=torch.bool)
    for pool, row in enumerate(rows):
        want[pool, list(best(row, own[pool], tau, budget))] = True
    threshold = {"budget": budget} if tau is None else {"tau": float(tau)}
    for longest in (0, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choosing, "_LONGEST_SORTED", longest)
            patch.setattr(choosing, "_PAIRS_AT_ONCE", {"cpu": 2 * entries})
            found = choose(torch.tensor(rows).float(), torch.tensor(own), **threshold)
        assert torch.equal(found, want)


def test_counting_chooses_what_sorting_does(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5000, generator=generator)
    scores[1] = scores[1].mul(4).round()  # many of each
    scores[2, 0] = 1e6  # so that the others are nearly equal
    own = torch.rand(3, 5000, generator=generator) < 0.01
    ranked = torch.rand(3, 5000, generator=generator) < 0.9
    for threshold in ({"tau": 0.25}, {"tau": 0.9}, {"budget": 40}, {"budget": 1200}):
        found = []
        for longest in (1, 1 << 30):
            monkeypatch.setattr(choosing, "_LONGEST_SORTED", longest)
            found.append(choose(scores, own, ranked=ranked, **threshold))
        assert torch.equal(*found)
        assert not (found[0] & ~ranked & ~own).any()
        if "budget" in threshold:
            counted = (found[0] & ranked).sum(1).tolist()
            assert counted == [max(threshold["budget"], n) for n in (own & ranked).sum(1)]


@pytest.mark.parametrize("longest", [1, 1 << 30], ids=["counting", "sorting"])
def test_own_blocks_that_are_enough_stay_alone(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public code takes one block more there (specification, B4)."""
    monkeypatch.setattr(choosing, "_LONGEST_SORTED", longest)
    scores = torch.tensor([[9.0, 1.0, 0.5, 0.25, 0.0], [9.0, 8.0, 1.0, 0.5, 0.0]])
    own = torch.tensor([[True, False, False, False, False], [True, True, False, False, False]])
    assert torch.equal(choose(scores, own, tau=0.5), own)
    assert torch.equal(choose(scores, own, budget=1), own)


@rules
def test_own_and_text_blocks_are_always_selected(rule: Rule) -> None:
    for before, after in ((0, 0), (1, 0), (0, 1), (5, 2)):
        blocks = KeyBlocks.of_lengths([4, 7, 1, 6], text_before=before, text_after=after)
        query, key = random_inputs(18 + before + after)
        found = selected(query, key, blocks, rule)
        bare = KeyBlocks.of_lengths([4, 7, 1, 6])
        video = found[:, :, blocks.video, bool(before) : blocks.blocks - bool(after)]
        assert video[:, :, own_block(bare)].all()
        # Text changes nothing among the video tokens.
        alone = query[:, blocks.video], key[:, blocks.video]
        assert torch.equal(video, selected(*alone, bare, rule))
        ends = [*range(before), *range(18 + before, 18 + before + after)]
        assert found[:, :, ends].all()
        for block in [0] * bool(before) + [-1] * bool(after):
            assert found[..., block].all()


@rules
def test_scores_are_products_of_queries_and_mean_keys(rule: Rule) -> None:
    blocks = KeyBlocks.of_lengths([5, 3, 4, 8, 2])
    query, key = random_inputs(22)
    means = [part.double().mean(1) for part in key.split(blocks.lengths, 1)]
    gates = torch.stack([torch.einsum("bshd,bhd->bhs", query.double(), m) for m in means], -1)
    found = selected(query, key, blocks, rule)
    for b in range(3):
        pools = {
            "query": gates[b].flatten(0, 1),
            "head": gates[b].flatten(1),
            "unpublished-all": gates[b].reshape(1, -1),
            "unpublished-block": gates[b].permute(2, 0, 1).flatten(1),
        }[rule.scope]
        own = own_block(blocks).expand(2, -1, -1)
        owns = {
            "query": own.flatten(0, 1),
            "head": own.flatten(1),
            "unpublished-all": own.reshape(1, -1),
            "unpublished-block": own.permute(2, 0, 1).flatten(1),
        }[rule.scope]
        queries = {"query": 1, "head": 22, "unpublished-all": 44}.get(rule.scope, 0)
        want = torch.zeros_like(owns)
        for pool in range(len(pools)):
            want[pool, list(_best_of_floats(pools[pool], owns[pool], rule, queries))] = True
        if rule.scope == "unpublished-block":
            want = want.view(5, 2, 22).permute(1, 2, 0)
        assert torch.equal(found[b], want.reshape(2, 22, 5))


def _best_of_floats(scores: torch.Tensor, own: torch.Tensor, rule: Rule, queries: int) -> set[int]:
    z = ((scores - scores.min()) / (scores.max() - scores.min())).tolist()
    weight = z if rule.tau is not None else [1.0] * len(z)
    target = rule.tau * sum(z) if rule.tau is not None else (rule.topk or 0) * queries
    chosen = set(own.nonzero().flatten().tolist())
    reached = sum(weight[i] for i in chosen)
    for i in sorted(set(range(len(z))) - chosen, key=lambda i: -z[i]):
        if reached >= target:
            break
        chosen.add(i)
        reached += weight[i]
    return chosen


@rules
def test_selection_ignores_the_size_of_queries_and_the_precision_of_a_region(rule: Rule) -> None:
    blocks = KeyBlocks.of_lengths([9, 9, 9, 3])
    query, key = random_inputs(30)
    want = selected(query, key, blocks, rule)
    assert torch.equal(selected(query * 4, key, blocks, rule), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selected(query, key, blocks, rule), want)


@rules
def test_padded_tokens_count_as_little_as_absent_ones(rule: Rule) -> None:
    lengths = [6, 5, 7, 4]
    query, key = random_inputs(22)
    # Of the third block no token counts, of the others some do not.
    counted = torch.ones(22, dtype=torch.bool)
    counted[torch.tensor([0, 5, 7, *range(11, 18), 21])] = False
    query[:, ~counted], key[:, ~counted] = torch.nan, torch.nan
    blocks = KeyBlocks.of_lengths(lengths)
    bits = select_blocks(query, key, blocks, rule, key_mask=counted.expand(3, -1))
    found = unpack_bits(bits, 4)
    left = [int(part.sum()) for part in counted.split(lengths)]
    assert left == [4, 4, 0, 3]
    fewer = KeyBlocks.of_lengths([n for n in left if n])
    want = selected(query[:, counted], key[:, counted], fewer, rule)
    assert torch.equal(found[:, :, counted][..., [0, 1, 3]], want)
    assert not found[:, :, counted, 2].any()
    # Padded queries see their own block, which keeps them out of the way.
    assert torch.equal(found[:, :, ~counted], own_block(blocks)[~counted].expand(3, 2, -1, -1))


def test_centred_keys_forget_what_all_keys_have_in_common() -> None:
    blocks = KeyBlocks.of_lengths([7, 7, 2, 7])
    query, key = random_inputs(23)
    shifted = key + 3 * torch.randn(8, generator=torch.Generator().manual_seed(1))
    for scope, matters in (("query", False), ("head", True)):
        plain, centred = Rule(scope, tau=0.4), Rule(scope, tau=0.4, centre_keys=True)
        want = selected(query, key, blocks, centred)
        assert torch.equal(selected(query, shifted, blocks, centred), want)
        assert torch.equal(selected(query, key, blocks, plain), want) != matters
    # A block whose keys are all padding has no mean.
    key_mask = torch.ones(3, 23, dtype=torch.bool)
    key_mask[:, 7:14] = False
    bits = select_blocks(query, key, blocks, centred, key_mask=key_mask)
    kept = [*range(7), *range(14, 23)]
    want = selected(query[:, kept], key[:, kept], KeyBlocks.of_lengths([7, 2, 7]), centred)
    assert torch.equal(unpack_bits(bits, 4)[:, :, kept][..., [0, 2, 3]], want)


@rules
def test_a_tile_decides_as_a_query_would_that_is_its_mean(rule: Rule) -> None:
    lengths = [6, 5, 8]
    blocks = KeyBlocks.of_lengths(lengths, text_after=2)
    query, key = random_inputs(21)
    tiled = Rule(rule.scope, topk=rule.topk, tau=rule.tau, tile=3)
    found = selected(query, key, blocks, tiled)
    tiles = [3, 3, 3, 2, 3, 3, 2]
    parts = query[:, :19].split(tiles, 1)
    for here in found[:, :, :19].split(tiles, 2):
        assert (here == here[:, :, :1]).all(), "one decision per tile"
    # Queries that all are their tile's mean decide alike where nothing is ranked beyond a query.
    if rule.scope == "query":
        means = [p.mean(1, keepdim=True).expand_as(p) for p in parts]
        same = torch.cat([*means, query[:, 19:]], 1)
        assert torch.equal(found, selected(same, key, blocks, rule))
    if rule.topk is not None:
        first = torch.tensor(tiles).cumsum(0) - torch.tensor(tiles)
        per_tile = found[:, :, first, :3].sum((2, 3)).float()
        if rule.scope == "unpublished-all":
            per_tile = per_tile.mean(1)
        assert (per_tile == rule.topk * len(tiles)).all()


# --- what the public code does wrong (its bugs B1 to B6)


def test_one_block_per_query_is_block_diagonal() -> None:
    blocks = KeyBlocks.of_lengths([4, 6, 5])
    query, key = random_inputs(15)
    for scope in ("query", "head", "unpublished-all"):
        found = selected(query, key, blocks, Rule(scope, topk=1))
        assert torch.equal(found, own_block(blocks).expand(3, 2, -1, -1))


@pytest.mark.parametrize("scope", pools.SCOPES)
def test_all_of_the_similarity_is_dense(scope: str) -> None:
    blocks = KeyBlocks.of_lengths([4] * 12)
    query, key = random_inputs(48)
    assert selected(query, key, blocks, Rule(scope, tau=1.0)).all()
    nearly = selected(query, key, blocks, Rule(scope, tau=0.9999)).float().mean()
    assert 0.9 < nearly < 1


@pytest.mark.parametrize("scope", ["query", "head", "unpublished-all"])
def test_more_blocks_than_there_are_is_dense(scope: str) -> None:
    blocks = KeyBlocks.of_lengths([4, 5, 6])
    for topk in (3, 100):
        assert selected(*random_inputs(15), blocks, Rule(scope, topk=topk)).all()


@rules
def test_samples_know_nothing_of_each_other(rule: Rule) -> None:
    blocks = KeyBlocks.of_lengths([8, 8, 8, 3])
    query, key = random_inputs(27)
    key[1] *= 10
    together = selected(query, key, blocks, rule)
    for sample in range(3):
        alone = selected(query[[sample]], key[[sample]], blocks, rule)
        assert torch.equal(together[[sample]], alone)


@pytest.mark.parametrize("scope", pools.SCOPES)
def test_own_blocks_that_have_the_share_are_enough(scope: str) -> None:
    blocks = KeyBlocks.of_lengths([4] * 4)
    query = torch.eye(4).repeat_interleave(4, 0)[None, :, None].expand(2, -1, 2, -1)
    found = selected(query, query, blocks, Rule(scope, tau=0.25))
    assert torch.equal(found, own_block(blocks).expand(2, 2, -1, -1))


@pytest.mark.parametrize("scope", pools.SCOPES)
@pytest.mark.parametrize("flat", ["queries", "keys"])
def test_pools_of_equal_scores(scope: str, flat: str) -> None:
    blocks = KeyBlocks.of_lengths([4, 4, 4, 2])
    query, key = random_inputs(14)
    if flat == "queries":
        query = torch.zeros_like(query)
    else:
        # Means of these are equal but for rounding, which must not decide.
        key = (key[:, :1] / 3).expand(-1, 14, -1, -1)
        if scope != "query":
            query = query[:, :1].expand(-1, 14, -1, -1)
    if flat == "queries" or scope in ("query", "head"):
        found = selected(query, key, blocks, Rule(scope, tau=0.9))
        assert torch.equal(found, own_block(blocks).expand(3, 2, -1, -1))
    if scope == "query":
        found = selected(query, key, blocks, Rule(scope, topk=2))
        assert (found.sum(-1) == 2).all()
        # Of equal blocks the first is taken.
        first = torch.where(blocks.block_of == 0, 1, 0)
        assert found[..., torch.arange(14), first].all()


def test_blocks_follow_from_lengths_alone() -> None:
    query, key = random_inputs(16)
    rule = Rule("query", topk=2)
    found = [
        selected(query, key, KeyBlocks.of_lengths(lengths), rule)
        for lengths in ([8, 8], [4, 4, 4, 4], [8, 8])
    ]
    assert torch.equal(found[0], found[2])
    assert found[1].shape[-1] == 4


@pytest.mark.parametrize("topk", [1, 2, 4])
def test_tiles_that_are_blocks_select_as_block_topk_does(topk: int) -> None:
    """One combination of the parts under two names: runs of tokens, means, the best, one's own."""
    torch.manual_seed(0)
    grid = TokenGrid(8, 4, 8, text_after=16)
    query, key = torch.randn(2, 2, grid.tokens, 2, 8)
    vmoba = VMoBAAttn(partitions="1d", chunk_1d=0.5, topk=topk, granularity="tile", tile=16)
    parts = BlockTopKAttn(
        block=16, order="raster", score="mean", keep=Count(topk - 1) if topk > 1 else none_of
    )
    site = Site("wan", 0, 10, grid)
    bits, chosen = vmoba.selection(query, key, site), parts.selection(query, key, site)
    for sample in range(2):
        for head in range(2):
            of_vmoba = vmoba.selection_mask(bits[sample, head], grid, 0).dense()
            of_parts = parts.selection_mask(chosen[sample, head], grid).dense()
            assert torch.equal(of_vmoba, of_parts)


def none_of(scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
    return torch.zeros_like(scores, dtype=torch.bool)
