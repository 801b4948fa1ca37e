"""The passes of k-means, in torch and in Triton, against their definition in float64."""

from __future__ import annotations

import pytest
import torch

from diffattn.kernels.clusters import Passes, fixed_point, span_sums
from diffattn.kernels.clusters.torch_passes import TorchPasses
from diffattn.routing.clusters import k_means

HALVES = (torch.bfloat16, torch.float16)
# Batch, tokens, heads, head_dim, clusters: around the tiles of 128 or 32 tokens and 64 clusters.
SIZES = [(1, 130, 2, 16, 65), (2, 33, 3, 24, 7), (1, 128, 1, 64, 64), (1, 1, 1, 5, 1)]


def passes_of(backend: str, x: torch.Tensor, counted: torch.Tensor | None = None) -> Passes:
    if backend == "torch":
        return TorchPasses(x, counted)
    from diffattn.kernels.clusters.triton_passes import TritonPasses

    return TritonPasses(x, counted)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def distances(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Squared distances in float64, (batch, heads, tokens, clusters)."""
    points = x.double().nan_to_num(0, 0, 0).transpose(1, 2)
    return (points[:, :, :, None] - centroids.double()[:, :, None]).square().sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("of_tokens", [False, True], ids=["means", "tokens"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_labels_are_of_the_nearest_centroid(
    size: tuple[int, ...], of_tokens: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    batch, tokens, heads, head_dim, clusters = size
    x = torch.randn(batch, tokens, heads, head_dim, device=device).to(dtype)
    centroids = torch.randn(batch, heads, clusters, head_dim, device=device)
    if of_tokens:
        centroids = centroids.to(dtype)
    labels = passes_of(backend, x).nearest(centroids)
    assert labels.dtype == torch.int64
    far = distances(x, centroids)
    own = far.gather(3, labels[..., None])[..., 0]
    # Rounding of float32 alone may decide: never that of 16 bits.
    assert (own <= far.amin(-1) * (1 + 1e-5) + 1e-5).all()
    assert (labels == far.argmin(-1)).float().mean() > 0.99


@pytest.mark.parametrize("dtype", HALVES)
def test_centroids_are_not_rounded_to_the_dtype_of_tokens(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    """The nearest of centroids that are one number in 16 bits."""
    x = torch.ones(1, 4, 1, 1, device=device).to(dtype)
    far = torch.tensor([2 + 2.0**-14, 2 + 2.0**-15, 2.0], device=device)
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
        labels = passes_of(backend, x).nearest(far[order].view(1, 1, 3, 1))
        assert labels.tolist() == [[[order.index(2)] * 4]]


@pytest.mark.parametrize("magnitude", [2.0**-20, 2.0**-8, 1.0, 3e4])
def test_labels_at_any_magnitude(magnitude: float, backend: str, device: str) -> None:
    dtype = torch.float16 if magnitude > 2.0**-10 else torch.bfloat16
    x = (torch.rand(1, 40, 2, 16, device=device) * magnitude).to(dtype)
    centroids = torch.rand(1, 2, 5, 16, device=device) * magnitude
    labels = passes_of(backend, x).nearest(centroids)
    far = distances(x, centroids)
    own = far.gather(3, labels[..., None])[..., 0]
    assert (own <= far.amin(-1) * (1 + 1e-5)).all()


def test_of_equal_distances_the_first_wins(backend: str, device: str) -> None:
    x = torch.ones(1, 40, 1, 16, device=device, dtype=torch.bfloat16)
    centroids = torch.full((1, 1, 150, 16), 5.0, device=device)
    centroids[:, :, [69, 70, 140]] = 2.0
    labels = passes_of(backend, x).nearest(centroids)
    assert torch.equal(labels, torch.full_like(labels, 69))


def test_labels_are_labels_even_where_distances_overflow(backend: str, device: str) -> None:
    x = torch.full((1, 40, 1, 16), 3e38, device=device)
    labels = passes_of(backend, x).nearest(x[:, :3].transpose(1, 2))
    assert ((labels >= 0) & (labels < 3)).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_and_sizes(
    size: tuple[int, ...], some: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    batch, tokens, heads, head_dim, clusters = size
    x = torch.randn(batch, heads, tokens, head_dim, device=device).to(dtype).transpose(1, 2)
    counted = torch.rand(batch, tokens, device=device) < 0.7 if some else None
    counts = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if counted is not None:
        counts = counted
    x[:, 0, 0, 0] = torch.nan
    x[~counts] = torch.inf
    labels = torch.randint(0, clusters, (batch, heads, tokens), device=device)
    tokens_of = passes_of(backend, x, counted)
    largest = tokens_of.largest()
    points = x.double().nan_to_num(0, 0, 0).transpose(1, 2) * counts[:, None, :, None]
    assert torch.equal(largest.double(), points.abs().amax((2, 3)))
    factor = fixed_point(largest)
    sums, sizes = tokens_of.sums(labels, clusters, factor)
    shares = torch.nn.functional.one_hot(labels, clusters).double() * counts[:, None, :, None]
    fixed = (points * factor.double()[..., None, None]).round()
    assert torch.equal(sums, (shares.mT @ fixed).long())
    assert torch.equal(sizes, shares.sum(2).long())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_all_passes_make_the_same_clusters(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 150, 2, 24, device=device).to(dtype)
    counted = torch.arange(150, device=device).expand(2, -1) % 5 > 0
    start = x[:, 2:40:2].transpose(1, 2)
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(
            "diffattn.routing.clusters.passes", lambda x, some, of=backend: passes_of(of, x, some)
        )
        found.append(k_means(x, start, 3, counted))
    one, other = found
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.sizes, other.sizes)
    assert torch.equal(one.centroids, other.centroids)


# Tiles of a power of 2 and others; one that is more than a span.
@pytest.mark.parametrize("tile", [16, 48, 128])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_sums_over_spans(tile: int, dtype: torch.dtype, backend: str, device: str) -> None:
    batch, tiles, heads, head_dim, count, clusters = 2, 3, 2, 24, 70, 3
    rows = torch.randn(batch, heads, count, head_dim, device=device)
    key, value = torch.randn(2, batch, tiles * tile, heads, head_dim, device=device).to(dtype)
    mean = torch.randn(batch, heads, clusters, head_dim, device=device)
    cluster = torch.randint(0, clusters + 1, (batch, heads, tiles), device=device)
    held = torch.randint(1, tile + 1, (batch, heads, tiles), device=device)
    held[cluster == clusters] = 0
    held[0, 0, 1] = min(tile, 20)
    if backend == "torch":
        got = span_sums(rows, key, value, mean, cluster, held, 0.4)
    else:
        from diffattn.kernels.clusters.triton_errors import span_sums as in_triton

        got = in_triton(rows, key, value, mean, cluster, held, 0.4)
    length = tiles * tile // got.highest.shape[3]
    k, v = (x.double().transpose(1, 2) for x in (key, value))
    place = torch.arange(tiles * tile, device=device)
    there = place % tile < held.repeat_interleave(tile, 2)
    scores = (rows.double() @ k.mT * 0.4).masked_fill(~there[:, :, None], -torch.inf)
    spans = scores.unflatten(3, (-1, length))
    top = spans.amax(-1)
    torch.testing.assert_close(got.highest.double(), top, atol=1e-5, rtol=1e-5)
    own = torch.cat([mean, mean[:, :, :1]], 2).double().gather(
        2, cluster.repeat_interleave(tile, 2)[..., None].expand(-1, -1, -1, head_dim)
    )  # fmt: skip
    square, product = (x.sum(-1).unflatten(2, (-1, length)) for x in (v * v, v * own))
    weights = (spans - top.masked_fill(top == -torch.inf, 0)[..., None]).exp()
    held_any = (top > -torch.inf).expand_as(top)
    for found, want in (
        (got.squares, (weights.square() * square[:, :, None]).sum(-1)),
        (got.products, (weights * product[:, :, None]).sum(-1)),
    ):
        torch.testing.assert_close(found.double()[held_any], want[held_any], atol=2e-4, rtol=1e-5)
        if backend == "triton":
            assert (found[~held_any] == 0).all()
