"""What pictures draw of methods that select by content is what these methods attend to."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffattn import (
    AgentAttn,
    BlockTopKAttn,
    GNAAttn,
    LinFusionAttn,
    Method,
    Reference,
    SLAAttn,
    SolAttn,
    SVG2Attn,
    TokenGrid,
    VMoBAAttn,
    VSAAttn,
)
from diffattn.methods.base import Site
from diffattn.methods.call_selection import (
    AttentionCall,
    CallSelection,
    selection_of_call,
    selects_by_content,
    smooth_tokens,
)
from diffattn.selected.attention import SelectionMask

GRIDS = (
    TokenGrid(3, 6, 7),
    TokenGrid(3, 5, 6, text_before=5, text_after=9),
    TokenGrid(1, 8, 9, 4, 75, references=(Reference(79, 1, 8, 9),)),
)
# Summaries and linear attention are left out: all that is left is what is selected.
ALONE: dict[str, Method] = {
    "sol": SolAttn(block=16, tau=0.3, remainder="drop"),
    "block-topk": BlockTopKAttn(block=16, keep=0.3),
    "block-topk, raster, local": BlockTopKAttn(
        block=16, keep=0.3, score="mean", order="raster", references="local"
    ),
    "svg2": SVG2Attn(query_cluster=20, key_cluster=8, block=16, top_p=0.4),
    "vsa": VSAAttn(keep=0.3),
    "sla": SLAAttn(keep=0.4, block_q=32, block_kv=16),
    "vmoba 1d": VMoBAAttn(topk=2),
    "vmoba 3d, local": VMoBAAttn(topk=2, partitions=("3d",), references="local"),
}
each = pytest.mark.parametrize("method", ALONE.values(), ids=ALONE.keys())


def call_of(grid: TokenGrid, padded: bool = False, head_dim: int = 8) -> AttentionCall:
    torch.manual_seed(grid.tokens)
    q, k, v = torch.randn(3, 2, grid.tokens, 3, head_dim)
    key_mask = None
    if padded:
        key_mask = torch.ones(2, grid.tokens, dtype=torch.bool)
        key_mask[1, -7:] = key_mask[0, 20:30] = False
    # Weights of SLA whose linear branch gives nothing.
    nothing: Any = SimpleNamespace(project=lambda linear, dtype: torch.zeros_like(linear))
    return AttentionCall(q, k, v, Site("wan", 3, 6, grid, weights=nothing), key_mask=key_mask)


def weights_of(method: Method, call: AttentionCall) -> torch.Tensor:
    """The weight of each key for each query: (batch, heads, queries, keys).

    A value that is 1 for one key and 0 for all others comes out as the key's weight.
    """
    tokens, head_dim = call.query.shape[1], call.query.shape[3]
    out = []
    for first in range(0, tokens, head_dim):
        value = torch.zeros_like(call.value)
        for channel in range(min(head_dim, tokens - first)):
            value[:, first + channel, :, channel] = 1
        out.append(method.attend(call.query, call.key, value, call.site, key_mask=call.key_mask))
    return torch.cat(out, 3)[..., :tokens].transpose(1, 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@each
def test_the_pairs_are_those_that_attend(method: Method, grid: TokenGrid, padded: bool) -> None:
    call = call_of(grid, padded)
    weights = weights_of(method, call)
    for sample, head in ((0, 0), (1, 2)):
        selection = selection_of_call(method, call, head=head, sample=sample)
        assert selection is not None
        seen = selection.pairs.dense()
        if call.key_mask is not None:
            seen = seen & call.key_mask[sample]
        assert torch.equal(seen, weights[sample, head] > 0)
        assert 0.05 < seen.float().mean() < 1
        dense = selection.pairs.dense().double()
        torch.testing.assert_close(selection.key_counts(), dense.sum(1))


def test_the_last_sample_is_the_default() -> None:
    call = call_of(GRIDS[0])
    method = ALONE["sol"]
    default, last = (selection_of_call(method, call, **kwargs) for kwargs in ({}, {"sample": 1}))
    assert default is not None
    assert last is not None
    assert torch.equal(default.pairs.chosen, last.pairs.chosen)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (SolAttn(block=16, tau=0.3), "by its block's mean"),
        (BlockTopKAttn(block=16, remainder="summary"), "by its block's mean"),
        (
            SVG2Attn(query_cluster=20, key_cluster=8, block=16, top_p=0.4, remainder="summary"),
            "by its cluster's mean",
        ),
        (VSAAttn(keep=0.3, coarse=True), "by its tile's mean, times the gate"),
        (SLAAttn(keep=0.4, block_q=32, block_kv=16), "by linear attention"),
        (
            SLAAttn(keep=0.4, block_q=32, block_kv=16, linear="rest", drop=0.1),
            "by linear attention, if at all",
        ),
    ],
    ids=lambda x: getattr(x, "type", ""),
)
@pytest.mark.parametrize("padded", [False, True])
def test_all_other_keys_are_the_rest(method: Method, words: str, padded: bool) -> None:
    grid = GRIDS[1]
    call = call_of(grid, padded)
    selection = selection_of_call(method, call, sample=0)
    assert selection is not None
    assert selection.rest is not None
    assert selection.rest_words == words
    seen, rest = selection.pairs.dense(), selection.rest.dense()
    assert rest.any()
    assert not (seen & rest).any()
    there = torch.ones(grid.tokens, dtype=torch.bool)
    if call.key_mask is not None:
        there = call.key_mask[0]
    assert (seen | rest)[:, there].all()


def test_a_block_of_padding_alone_is_seen_in_no_way() -> None:
    grid = TokenGrid(1, 8, 8, text_after=32)
    call = call_of(grid)
    key_mask = torch.ones(2, grid.tokens, dtype=torch.bool)
    key_mask[1, 64:80] = False
    call = AttentionCall(call.query, call.key, call.value, call.site, key_mask=key_mask)
    selection = selection_of_call(SolAttn(block=16), call)
    assert selection is not None
    assert selection.rest is not None
    assert not selection.pairs.dense()[:, 64:80].any()
    assert not selection.rest.dense()[:, 64:80].any()


@each
def test_shares_of_blocks(method: Method) -> None:
    selection = selection_of_call(method, call_of(GRIDS[1]))
    assert selection is not None
    shares, chosen = selection.block_shares(), selection.pairs.chosen
    assert shares.shape == (int(selection.row_of.max()) + 1, chosen.shape[1])
    for row in range(len(shares)):
        mine = chosen[selection.row_of == row].float()
        if len(mine):
            torch.testing.assert_close(shares[row], mine.mean(0))


@pytest.mark.parametrize("method", [AgentAttn(), LinFusionAttn(), GNAAttn()])
def test_other_methods_have_no_selection(method: Method) -> None:
    assert not selects_by_content(method)
    assert selection_of_call(method, call_of(GRIDS[0])) is None


def test_a_method_of_ones_own_joins_in() -> None:
    @dataclass(frozen=True, kw_only=True)
    class OwnAttn(GNAAttn):
        type = "own"

    @dataclass(frozen=True, kw_only=True)
    class LikeSol(SolAttn):
        type = "like-sol"

    assert not selects_by_content(OwnAttn())
    assert selects_by_content(LikeSol())

    def own(
        method: OwnAttn, call: AttentionCall, *, head: int = 0, sample: int = -1
    ) -> CallSelection:
        block_of = torch.zeros(call.site.grid.tokens, dtype=torch.int64)
        mask = SelectionMask(call.site.grid, torch.ones(len(block_of), 1, dtype=bool), block_of)
        return CallSelection(mask, "one block", block_of)

    selection_of_call.register(OwnAttn, own)
    assert selects_by_content(OwnAttn())
    found = selection_of_call(OwnAttn(), call_of(GRIDS[0]))
    assert found is not None
    assert found.pairs.dense().all()


def test_smooth_tokens_are_smooth_and_follow_the_seed() -> None:
    grid = TokenGrid(4, 12, 16, 5, 200, references=(Reference(800, 1, 12, 14),))
    q, k, v = smooth_tokens(grid, 32, 3)
    assert q.shape == k.shape == v.shape == (1, grid.tokens, 1, 32)
    again, other = smooth_tokens(grid, 32, 3), smooth_tokens(grid, 32, 4)
    assert all(torch.equal(*pair) for pair in zip((q, k, v), again, strict=True))
    assert not torch.equal(k, other[1])
    for start, frames, width in ((5, 4, 16), (800, 1, 14)):
        field = k[0, start : start + frames * 12 * width, 0].view(frames, 12, width, 32)
        near = torch.cosine_similarity(field[:, :, 1:], field[:, :, :-1], dim=-1).mean()
        far = torch.cosine_similarity(field[:, :, 10:], field[:, :, :-10], dim=-1).mean()
        assert near > 0.7
        assert abs(far) < 0.3
    text = torch.cosine_similarity(k[0, 780:790, 0], k[0, 781:791, 0], dim=-1)
    assert abs(text.mean()) < 0.3
