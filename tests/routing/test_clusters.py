"""Clusters, filled tiles and the choice by errors: goldens of SVG2 and SVG-EAR, and definitions."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import matching
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn.routing.cluster_errors import by_error, log_errors
from diffattn.routing.clusters import Clusters, first_tokens, k_means
from diffattn.routing.filled import FilledClusters, attention_of_clusters, tiles_reserved
from diffattn.routing.rules import mass


@dataclass(frozen=True)
class Golden:
    """The tensors of a file by name, heads of samples apart, and its parameters."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]

    def tokens(self, name: str) -> torch.Tensor:
        """Queries, keys, values or their gradients as (batch, tokens, heads, head_dim)."""
        x = self.tensors[name]
        x = x / 16 if x.dtype == torch.int8 else x
        return x.float().transpose(1, 2).contiguous()

    def by_head(self, name: str) -> torch.Tensor:
        x = self.tensors[name]
        return x.view(*self.tensors["q"].shape[:2], *x.shape[1:])

    def clusters(self, side: str) -> Clusters:
        """The clusters of queries or keys by `k_means`, from the golden's first tokens."""
        iterations = self.meta["iterations"]
        warm = self.meta["first_iterations"]
        x = self.tokens(f"first_{side}" if warm else side)
        picked = self.by_head(f"init_{side}").long()[..., None].expand(-1, -1, -1, x.shape[-1])
        start = x.transpose(1, 2).gather(2, picked)
        if warm:
            first = k_means(x, start, warm)
            assert torch.equal(first.labels, self.by_head(f"first_{side}_labels").long())
            x, start = self.tokens(side), first.centroids
        return k_means(x, start, iterations)


def read(path: Path) -> Golden:
    with np.load(path) as file:
        meta = ast.literal_eval(str(file["meta"]))
        tensors = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
    return Golden(tensors, meta)


GOLDENS = matching("svg2/*.npz", 11)
by_file = pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)


def choice_of(golden: Golden, queries: Clusters, keys: Clusters, tile: int = 16) -> torch.Tensor:
    p, ratio, ear = (golden.meta[name] for name in ("top_p", "min_ratio", "ear"))
    scale = queries.centroids.shape[-1] ** -0.5
    scores = queries.centroids @ keys.centroids.mT * scale + keys.sizes.log()[:, :, None]
    if ear is None:
        return mass(scores, p, max(1, int(ratio * scores.shape[-1])))
    filled = FilledClusters.of_labels(keys.labels, scores.shape[-1], tile)
    k, v = (filled.filled(golden.tokens(name)) for name in "kv")
    errors = log_errors(queries.centroids, k, v, filled, scale)
    return by_error(scores, errors, queries.sizes, keys.sizes, p, ratio, ear["gamma"])


@by_file
def test_clusters_of_the_public_code(path: Path) -> None:
    golden = read(path)
    for side in "qk":
        got = golden.clusters(side)
        assert torch.equal(got.labels, golden.by_head(f"{side}_labels").long())
        assert torch.equal(got.sizes, golden.by_head(f"{side}_sizes").long())
        want = golden.by_head(f"{side}_centroids")
        torch.testing.assert_close(got.centroids, want, atol=1e-4, rtol=1e-5)


@by_file
def test_choices_of_the_public_code(path: Path) -> None:
    golden = read(path)
    chosen = choice_of(golden, golden.clusters("q"), golden.clusters("k"))
    assert torch.equal(chosen, golden.tensors["cluster_map"].bool())


@pytest.mark.parametrize("tile", [16, 32, 64])
@by_file
def test_outputs_and_gradients_of_the_public_code(path: Path, tile: int) -> None:
    golden = read(path)
    chosen = golden.tensors["cluster_map"].bool()
    queries, keys = (
        FilledClusters.of_labels(golden.by_head(f"{side}_labels").long(), count, tile)
        for side, count in zip("qk", chosen.shape[2:], strict=True)
    )
    leaves = [golden.tokens(name).requires_grad_() for name in "qkv"]
    summarise = golden.meta["ear"] is not None
    out = attention_of_clusters(*leaves, queries, keys, chosen, summarise=summarise)
    torch.testing.assert_close(out, golden.tokens("o"), atol=2e-6, rtol=1e-5)
    grads = torch.autograd.grad(out, leaves, golden.tokens("do"))
    for name, grad in zip("qkv", grads, strict=True):
        torch.testing.assert_close(grad, golden.tokens(f"d{name}"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", matching("svg2/e*.npz", 3), ids=lambda path: path.stem)
def test_error_scores_of_the_public_code(path: Path) -> None:
    golden = read(path)
    queries, keys = golden.clusters("q"), golden.clusters("k")
    filled = FilledClusters.of_labels(keys.labels, keys.sizes.shape[2], 16)
    k, v = (filled.filled(golden.tokens(name)) for name in "kv")
    errors = log_errors(queries.centroids, k, v, filled, 16**-0.5)
    area = queries.sizes[..., None] * keys.sizes[:, :, None]
    got = errors - golden.meta["ear"]["gamma"] * area.log()
    want = golden.tensors["ear_scores"]
    several = (keys.sizes > 1)[:, :, None] & (queries.sizes > 0)[..., None]
    torch.testing.assert_close(got[several], want[several], atol=1e-3, rtol=1e-4)


def test_errors_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    centroids = torch.randn(1, 2, 3, 8)
    key, value = torch.randn(2, 1, 40, 2, 8) * 2
    labels = torch.randint(0, 5, (1, 2, 40))
    labels[labels == 4] = 3
    labels[..., 7] = 4
    filled = FilledClusters.of_labels(labels, 6, 16)
    got = log_errors(centroids, filled.filled(key), filled.filled(value), filled, 0.5)
    want = torch.zeros(2, 3, 4, dtype=torch.float64)
    for head in range(2):
        for cluster in range(4):
            inside = labels[0, head] == cluster
            k, v = (x[0, inside, head].double() for x in (key, value))
            mean_k, mean_v = k.mean(0), v.mean(0)
            for row, q in enumerate(centroids[0, head].double()):
                of_tokens = (k @ q * 0.5).exp()[:, None] * v
                want[head, row, cluster] = (
                    (of_tokens - (mean_k @ q * 0.5).exp() * mean_v).square().sum()
                )
    want = want.log()
    got = got[0, :, :, :4].double()
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def test_clusters_of_one_token_have_no_error() -> None:
    torch.manual_seed(0)
    filled = FilledClusters.of_labels(torch.tensor([[[0, 0, 1, 3, 3]]]), 4, 16)
    key, value = (filled.filled(x) for x in torch.randn(2, 1, 5, 1, 8))
    errors = log_errors(torch.randn(1, 1, 2, 8), key, value, filled, 1.0)
    assert (errors[..., 1:3] < -1e6).all()
    assert (errors[..., [0, 3]] > -1e3).all()


def test_scores_beyond_the_range_of_float32_keep_their_order() -> None:
    filled = FilledClusters.of_labels(torch.tensor([[[0, 0, 1, 1]]]), 2, 16)
    key = torch.tensor([100.0, 90.0, 60.0, 50.0]).view(1, 4, 1, 1)
    value = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    got = log_errors(torch.ones(1, 1, 1, 1), filled.filled(key), filled.filled(value), filled, 1.0)
    torch.testing.assert_close(got[0, 0, 0], torch.tensor([200.0, 120.0]), atol=0.1, rtol=0)


@given(
    st.integers(1, 90), st.integers(1, 12), st.sampled_from([16, 32]), st.integers(0, 99),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_filled_places_hold_each_token_once(
    tokens: int, clusters: int, tile: int, seed: int, left_out: bool
) -> None:
    torch.manual_seed(seed)
    labels = torch.randint(0, clusters + left_out, (2, 3, tokens))
    filled = FilledClusters.of_labels(labels, clusters, tile)
    x = torch.randn(2, tokens, 3, 4)
    at_places = filled.filled(x).unflatten(1, (-1, tile))
    there = filled.there.unflatten(2, (-1, tile))
    for sample in range(2):
        for head in range(3):
            for cluster in range(clusters):
                inside = labels[sample, head] == cluster
                rows = at_places[sample, :, :, head][filled.cluster[sample, head] == cluster]
                held = there[sample, head][filled.cluster[sample, head] == cluster]
                assert torch.equal(rows[held], x[sample, inside, head])
    assert filled.there.sum() == (labels < clusters).sum()
    if not left_out:
        assert torch.equal(filled.unfilled(filled.filled(x)), x)


@pytest.mark.parametrize("rest", [0, 1, 15])
def test_reserved_tiles_suffice_for_the_worst_sizes(rest: int) -> None:
    sizes = [16 * n + rest for n in (1, 2, 1, 3)]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[None, None]
    filled = FilledClusters.of_labels(labels, 4, 16)
    assert filled.held.sum() == sum(sizes)
    assert tiles_reserved(sum(sizes), 4, 16) >= sum(-(-size // 16) for size in sizes)


def test_means_of_clusters_and_their_gradient() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (1, 2, 50))
    labels[labels == 2] = 3
    filled = FilledClusters.of_labels(labels, 4, 16)
    x = torch.randn(1, 50, 2, 3, dtype=torch.float64, requires_grad=True)
    got = filled.means(filled.filled(x))
    assert torch.equal(got[:, 2], torch.zeros_like(got[:, 2]))
    shares = torch.nn.functional.one_hot(labels, 4).double()
    shares = shares / shares.sum(2, keepdim=True).clamp(min=1)
    want = torch.einsum("bhnc,bnhd->bchd", shares, x)
    torch.testing.assert_close(got, want)
    along = torch.randn_like(got)
    grads = (torch.autograd.grad(y, x, along, retain_graph=True)[0] for y in (got, want))
    torch.testing.assert_close(*grads)


def test_every_label_is_the_nearest_centroid_and_every_centroid_a_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 61, 3, 8)
    start = x[:, first_tokens(61, 5, x.device)].transpose(1, 2)
    got = k_means(x, start, 3)
    before = k_means(x, start, 2).centroids.double()
    points = x.transpose(1, 2).double()
    assert torch.equal(got.labels, torch.cdist(points, before).argmin(-1))
    assert (got.sizes.sum(-1) == 61).all()
    shares = torch.nn.functional.one_hot(got.labels, 5).double() / got.sizes[:, :, None]
    torch.testing.assert_close(got.centroids.double(), shares.mT @ points, atol=1e-6, rtol=1e-6)


def test_empty_clusters_keep_their_centroids() -> None:
    x = torch.randn(1, 20, 1, 4)
    far = torch.full((1, 1, 1, 4), 1e3)
    start = torch.cat([x[:, :3].transpose(1, 2), far], 2)
    got = k_means(x, start, 4)
    assert got.sizes[0, 0, 3] == 0
    assert torch.equal(got.centroids[:, :, 3:], far)


def test_of_equal_distances_the_first_wins() -> None:
    x = torch.ones(1, 10, 1, 4)
    got = k_means(x, torch.ones(1, 1, 6, 4), 3)
    assert torch.equal(got.labels, torch.zeros(1, 1, 10, dtype=torch.int64))
    assert got.sizes.tolist() == [[[10, 0, 0, 0, 0, 0]]]


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-12, 1.0, 6e4, 1e30])
def test_means_at_any_magnitude(size: float) -> None:
    x = torch.randn(1, 30, 2, 4).clamp(-3, 3) * size
    got = k_means(x, x[:, :2].transpose(1, 2), 1)
    shares = torch.nn.functional.one_hot(got.labels, 2).double()
    shares = shares / got.sizes[:, :, None].clamp(min=1)
    want = (shares.mT @ x.transpose(1, 2).double()).float()
    there = (got.sizes > 0)[..., None].expand_as(want)
    torch.testing.assert_close(got.centroids[there], want[there], rtol=1e-5, atol=size * 1e-6)


def test_the_order_of_tokens_changes_no_cluster() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 200, 2, 8) * torch.logspace(-6, 3, 200)[None, :, None, None]
    order = torch.randperm(200)
    start = x[:, :9].transpose(1, 2)
    got, other = k_means(x, start, 5), k_means(x[:, order], start, 5)
    assert torch.equal(got.centroids, other.centroids)
    assert torch.equal(got.labels[:, :, order], other.labels)


def test_tokens_that_do_not_count_move_no_centroid() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 60, 2, 8)
    counted = torch.arange(60)[None] % 3 > 0
    start = x[:, 1:3].transpose(1, 2)
    alone = k_means(x[:, counted[0]], start, 4)
    x[~counted] = torch.nan
    got = k_means(x, start, 4, counted)
    assert torch.equal(got.centroids, alone.centroids)
    assert torch.equal(got.sizes, alone.sizes)
    assert torch.equal(got.labels[:, :, counted[0]], alone.labels)


def test_the_budget_of_errors() -> None:
    torch.manual_seed(0)
    scores, errors = torch.randn(2, 1, 2, 30, 12)
    query_sizes = torch.randint(1, 30, (1, 2, 30))
    key_sizes = torch.randint(1, 30, (1, 2, 12))
    area = query_sizes[..., None] * key_sizes[:, :, None]
    for ratio in (0.0, 0.2):
        chosen = by_error(scores, errors, query_sizes, key_sizes, 0.6, ratio)
        weights, order = scores.softmax(-1).sort(-1, descending=True)
        before = weights.cumsum(-1) - weights
        place = torch.arange(12)
        within = (before <= 0.6) | (place < max(1, int(2 * ratio * 12)))
        budget = (area.gather(-1, order) * within).sum(-1)
        kept = (area * chosen).sum(-1)
        assert (kept >= budget).all()
        assert (kept < budget + area.amax(-1)).all()
        if ratio:
            first = order[..., : int(ratio * 12)]
            assert chosen.gather(-1, first).all()
    everything = by_error(scores, errors, query_sizes, key_sizes, 1.0, 0.0)
    assert everything.all()
