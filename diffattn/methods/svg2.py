"""SVG2Attn: clusters of queries attend to clusters of keys (arXiv 2505.18875, 2603.08982)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import ClassVar, Self

import torch

from diffattn._checks import check_fields, choice, count, number
from diffattn.grid import TokenGrid
from diffattn.kernels.autocast import autocast_off
from diffattn.kernels.clusters import spans_at_most
from diffattn.methods.base import Method, Site, Work
from diffattn.methods.selected_blocks import for_every_head
from diffattn.operator import attention
from diffattn.routing.cluster_errors import by_error, log_errors
from diffattn.routing.clusters import Clusters, first_tokens, k_means
from diffattn.routing.filled import FilledClusters, attention_of_clusters, tiles_reserved
from diffattn.routing.rules import mass
from diffattn.spans import Span, spans_of

ROUTES = ("mass", "error")
_ALLOWED = {
    "query_cluster": count(1),
    "key_cluster": count(1),
    "top_p": number(above=0, at_most=1),
    "min_ratio": number(at_least=0, at_most=1),
    "iterations": count(1),
    "warm_iterations": count(0),
    "query_block": count(16),
    "block": count(16),
    "remainder": choice(("drop", "summary")),
    "route": choice(ROUTES),
}
_DENSE_STEPS = 0.2
_DENSE_LAYERS = 1
# The logarithms of softmax weights spread by about this: a share of 0.9 of the mass then takes 24 %
# of the pairs, between the 22 and the 29 % that were published for HunyuanVideo and Wan 2.1.
_SPREAD_OF_LOG_WEIGHTS = 2.0
# Bytes of lists in memory at a time; heads take turns where all would need more.
_BYTES_AT_ONCE = 1 << 30
_BYTES_PER_PAIR_OF_TILES = 32
_SUMS_OF_SPANS = 6


@dataclass(frozen=True)
class Pool:
    """Tokens that are clustered together.

    Attributes:
        places: their places in the sequence: a slice, or int64 (tokens,) where others lie between.
        tokens: their number.
        queries, keys: the numbers of their clusters among all clusters.
    """

    places: slice | torch.Tensor
    tokens: int
    queries: range
    keys: range


@dataclass(frozen=True)
class ClusterPairs:
    """The clusters of a call, and the pairs that are computed.

    The last cluster of queries, and of keys, holds the tokens that are never clustered.

    Attributes:
        query_labels: int64 (batch, heads, tokens), the cluster of each query.
        key_labels: the same for keys; the number of key clusters for padding.
        chosen: bool (batch, heads, query clusters, key clusters).
        centroids: for each pool the centroids of its queries and of its keys, float32 (batch,
            heads, clusters, head_dim).
    """

    query_labels: torch.Tensor
    key_labels: torch.Tensor
    chosen: torch.Tensor
    centroids: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Clustered:
    """The clusters of a call.

    Attributes:
        query_labels, key_labels: as of `ClusterPairs`.
        of_pools: for each pool the clusters of its queries and of its keys.
    """

    query_labels: torch.Tensor
    key_labels: torch.Tensor
    of_pools: list[tuple[Clusters, Clusters]]

    @property
    def centroids(self) -> tuple[torch.Tensor, ...]:
        """As of `ClusterPairs`."""
        return tuple(part.centroids for both in self.of_pools for part in both)

    def pairs(self, chosen: torch.Tensor) -> ClusterPairs:
        """The clusters, and the pairs that are computed of them."""
        return ClusterPairs(self.query_labels, self.key_labels, chosen, self.centroids)

    def of_heads(self, some: slice) -> _Clustered:
        """The clusters of some heads."""
        return _Clustered(
            self.query_labels[:, some],
            self.key_labels[:, some],
            [(q.of_heads(some), k.of_heads(some)) for q, k in self.of_pools],
        )


@dataclass(frozen=True)
class _Kept:
    """The clusters of a call, for the next step to go on from.

    Attributes:
        grid: the tokens of the call.
        centroids: as of `ClusterPairs`, in the dtype of the queries.
    """

    grid: TokenGrid
    centroids: tuple[torch.Tensor, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(x.shape) for x in self.centroids]


@dataclass(frozen=True, kw_only=True)
class SVG2Attn(Method):
    """Semantic-aware permutation (SVG2, arXiv 2505.18875), with the remainder of SVG-EAR.

    In each head k-means puts similar queries into clusters, and similar keys. A query cluster
    attends to the key clusters of the largest weight, up to a share `top_p` of the softmax as the
    clusters' means estimate it. Attention inside of the chosen pairs of clusters is exact.
    SVG-EAR (arXiv 2603.08982) is `remainder="summary", route="error"`: clusters that are not chosen
    enter the softmax by their means, and those are chosen whose means err most.

    The first sparse step of a run makes clusters from tokens at even distances, with a fixed number
    of iterations. Later steps go on from the clusters of the step before, each site and each call
    of guidance from its own, as the public code does. A new run, another batch or another size
    start anew, and so does every call in training and outside of a run: the same run always gives
    the same clusters.

    Text and other tokens beside the video see every key, and every query sees them. With "visible"
    references each reference has clusters of its own, with "local" references the video and all
    references are clustered together.

    Attributes:
        query_cluster, key_cluster: mean number of tokens in a cluster of queries, and of keys.
        top_p: share of the estimated softmax that a query cluster computes; 1 is dense attention.
        min_ratio: share of the key clusters that every query cluster computes.
        iterations: iterations of k-means from tokens at even distances.
        warm_iterations: iterations from the clusters of the step before; 0 to start each call anew,
            with `iterations`. What a site keeps is of the tensors' dtype: 1300 means of 128
            channels take 0.3 MB a head at 720p.
        remainder: "drop" to leave out clusters that are not chosen, or "summary" to see each of
            them by its mean key and mean value.
        route: "mass" to choose the clusters of the largest weight, or "error" to spend the token
            pairs of "mass" where the means of clusters err most per pair.
        query_block, block: places per tile of queries, and per tile of keys, multiples of 16;
            clusters are filled up to tiles. Tiles of 128 queries take the fastest kernel of Hopper
            GPUs.

    Raises:
        ValueError: for a parameter out of range, and for `route="error"` without "summary".
    """

    type: ClassVar[str] = "svg2"
    paper: ClassVar[str] = "arXiv 2505.18875; SVG-EAR (arXiv 2603.08982)"
    most_dense_layers: ClassVar[int] = _DENSE_LAYERS
    traced_whole: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    shared_between_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "_pools": ("query_cluster", "key_cluster", "references"),
    }

    query_cluster: int = field(
        default=250, metadata={"help": "mean tokens of a cluster of queries"}
    )
    key_cluster: int = field(default=75, metadata={"help": "mean tokens of a cluster of keys"})
    top_p: float = field(
        default=0.9, metadata={"help": "share of the softmax to compute; lower is faster"}
    )
    min_ratio: float = field(
        default=0.1, metadata={"help": "share of the key clusters to compute in any case"}
    )
    iterations: int = field(
        default=4, metadata={"help": "iterations of k-means in the first sparse step of a run"}
    )
    warm_iterations: int = field(
        default=2,
        metadata={"help": "iterations in later steps, from the clusters before; 0 to start anew"},
    )
    remainder: str = field(
        default="drop", metadata={"help": "clusters that are not chosen: drop or summary"}
    )
    route: str = field(default="mass", metadata={"help": "choose clusters by mass or error"})
    query_block: int = field(
        default=128, metadata={"help": "places per tile of queries, a multiple of 16"}
    )
    block: int = field(default=64, metadata={"help": "places per tile of keys, a multiple of 16"})
    _pools: dict[tuple[TokenGrid, torch.device], tuple[Pool, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _ALLOWED)
        for name in ("query_block", "block"):
            places = getattr(self, name)
            if places % 16:
                raise ValueError(
                    f"{name} is {places}, but must be a multiple of 16: try"
                    f" {places // 16 * 16} or {places // 16 * 16 + 16}"
                )
        if self.route == "error" and self.remainder == "drop":
            raise ValueError(
                "route is 'error', the error of means in the place of clusters, but remainder is"
                " 'drop': set remainder='summary', or route='mass'"
            )

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with a fifth of the steps and the first block dense, as for Wan 2.1."""
        return replace(
            self,
            dense_layers=_DENSE_LAYERS if self.dense_layers is None else self.dense_layers,
            dense_steps=_DENSE_STEPS if self.dense_steps is None else self.dense_steps,
        )

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        return super().spans(grid) if self.references == "exact" else spans_of(grid, self.block)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        *,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        key, value = (for_every_head(x, query) for x in (key, value))
        if self.top_p == 1:
            return attention(query, key, value, scale=scale, key_mask=key_mask)
        if key_mask is not None:
            key, value = (x.masked_fill(~key_mask[..., None, None], 0) for x in (key, value))
        pools = self._pools_of(site.grid, query.device)
        clustered = self._clustered(query, key, pools, key_mask, self._starts(query, site, pools))
        step = max(1, _BYTES_AT_ONCE // self._bytes_per_head(query, pools))
        outs = []
        for first in range(0, query.shape[2], step):
            some = slice(first, first + step)
            q, k, v = (x[:, :, some] for x in (query, key, value))
            chosen, queries, keys = self._chosen(k, v, pools, clustered.of_heads(some), scale)
            out = attention_of_clusters(
                q, k, v, queries, keys, chosen, summarise=self.remainder == "summary", scale=scale
            )
            outs.append(out)
        if self.warm_iterations and site.memory is not None:
            centroids = tuple(x.to(query.dtype) for x in clustered.centroids)
            site.memory.keep(_Kept(site.grid, centroids))
        return torch.cat(outs, 2) if len(outs) > 1 else outs[0]

    def _starts(self, query: torch.Tensor, site: Site, pools: tuple[Pool, ...]) -> _Kept | None:
        """The clusters of an earlier step to go on from; None to start anew."""
        if not self.warm_iterations or site.memory is None:
            return None
        kept: _Kept | None = site.memory.recall()
        batch, _, heads, head_dim = query.shape
        sizes = [len(clusters) for pool in pools for clusters in (pool.queries, pool.keys)]
        shapes = [(batch, heads, size, head_dim) for size in sizes]
        if kept is None or kept.grid != site.grid or kept.shapes != shapes:
            return None
        return kept if kept.centroids[0].device == query.device else None

    def selection(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        *,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> ClusterPairs:
        """The clusters that `attend` makes for the same arguments, and the pairs it computes.

        `attend` makes these clusters where nothing is kept of an earlier step.
        """
        key, value = (for_every_head(x, query) for x in (key, value))
        if key_mask is not None:
            key, value = (x.masked_fill(~key_mask[..., None, None], 0) for x in (key, value))
        pools = self._pools_of(site.grid, query.device)
        clustered = self._clustered(query, key, pools, key_mask, None)
        chosen, _, _ = self._chosen(key, value, pools, clustered, scale)
        return clustered.pairs(chosen)

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work:
        """The cost of a call that goes on from clusters of an earlier step, if `warm_iterations`.

        The first sparse step of a run has `iterations` in place of these.
        """
        channels = heads * head_dim
        share = 1.0
        if self.top_p < 1:
            cut = NormalDist().inv_cdf(self.top_p) - _SPREAD_OF_LOG_WEIGHTS
            share = max(self.min_ratio, NormalDist().cdf(cut))
        pools = self._pools_of(grid, torch.device("cpu"))
        iterations = self.warm_iterations or self.iterations
        tokens, sparse, selection, summaries = grid.tokens, 0.0, 0.0, 0.0
        # Half of the last tile of a cluster is empty.
        fill_q = fill_k = 1.0
        if self.top_p < 1:
            queries, keys = pools[-1].queries.stop, pools[-1].keys.stop
            fill_q += queries * (self.query_block - 1) / 2 / tokens
            fill_k += keys * (self.block - 1) / 2 / tokens
            for pool in pools:
                n, rows, columns = pool.tokens, len(pool.queries), len(pool.keys)
                sparse += n**2
                selection += iterations * 2 * n * (rows + columns) * channels
                selection += 2 * rows * columns * channels
                if self.route == "error":
                    selection += 2 * rows * n * channels
            if self.remainder == "summary":
                summaries = 4 * tokens * keys * channels
        density = 1 - (1 - share) * sparse / tokens**2
        return Work(
            flops=4 * density * tokens**2 * fill_q * fill_k * channels + selection + summaries,
            density=density,
            selection_flops=selection,
            is_exact=False,
        )

    @torch.no_grad()
    def _clustered(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        pools: tuple[Pool, ...],
        key_mask: torch.Tensor | None,
        starts: _Kept | None,
    ) -> _Clustered:
        batch, tokens, heads, _ = query.shape
        others_q, others_k = pools[-1].queries.stop, pools[-1].keys.stop
        query_labels = torch.full((batch, heads, tokens), others_q, device=query.device)
        key_labels = torch.full((batch, heads, tokens), others_k, device=query.device)
        clusters = []
        # In an autocast region products would be in half precision.
        with autocast_off(query.device.type):
            for number, pool in enumerate(pools):
                start_q, start_k = (None, None)
                if starts is not None:
                    start_q, start_k = starts.centroids[2 * number :][:2]
                of_q = self._clusters(query, pool.places, len(pool.queries), None, start_q)
                of_k = self._clusters(key, pool.places, len(pool.keys), key_mask, start_k)
                query_labels[:, :, pool.places] = of_q.labels + pool.queries.start
                key_labels[:, :, pool.places] = of_k.labels + pool.keys.start
                clusters.append((of_q, of_k))
            if key_mask is not None:
                key_labels = key_labels.masked_fill(~key_mask[:, None], others_k + 1)
        return _Clustered(query_labels, key_labels, clusters)

    @torch.no_grad()
    def _chosen(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pools: tuple[Pool, ...],
        clustered: _Clustered,
        scale: float | None,
    ) -> tuple[torch.Tensor, FilledClusters, FilledClusters]:
        """The pairs of clusters that are computed, and the filled clusters."""
        batch, _, heads, head_dim = key.shape
        counts = pools[-1].queries.stop + 1, pools[-1].keys.stop + 1
        queries = FilledClusters.of_labels(clustered.query_labels, counts[0], self.query_block)
        keys = FilledClusters.of_labels(clustered.key_labels, counts[1], self.block)
        chosen = torch.ones(batch, heads, *counts, dtype=torch.bool, device=key.device)
        factor = head_dim**-0.5 if scale is None else scale
        # In an autocast region products would be in half precision.
        with autocast_off(key.device.type):
            errors = None
            if self.route == "error":
                centroids = torch.cat([of_q.centroids for of_q, _ in clustered.of_pools], 2)
                errors = log_errors(centroids, keys.filled(key), keys.filled(value), keys, factor)
            for pool, (of_q, of_k) in zip(pools, clustered.of_pools, strict=True):
                rows, columns = (slice(of.start, of.stop) for of in (pool.queries, pool.keys))
                own = None if errors is None else errors[:, :, rows, columns]
                chosen[:, :, rows, columns] = self.choose(of_q, of_k, factor, own)
        return chosen, queries, keys

    def choose(
        self, queries: Clusters, keys: Clusters, scale: float, errors: torch.Tensor | None
    ) -> torch.Tensor:
        """The key clusters that each query cluster computes, among clusters of one pool.

        Args:
            queries, keys: the clusters.
            scale: factor of the scores.
            errors: the result of `log_errors` for `route="error"`.

        Returns:
            bool (batch, heads, query clusters, key clusters).
        """
        scores = queries.centroids @ keys.centroids.mT * scale + keys.sizes.log()[:, :, None]
        if errors is not None:
            sizes = queries.sizes, keys.sizes
            return by_error(scores, errors, *sizes, self.top_p, self.min_ratio)
        least = max(1, int(self.min_ratio * scores.shape[-1]))
        return mass(scores, self.top_p, least)

    def _clusters(
        self,
        x: torch.Tensor,
        places: slice | torch.Tensor,
        clusters: int,
        counted: torch.Tensor | None,
        start: torch.Tensor | None,
    ) -> Clusters:
        x = x.detach()[:, places]
        if counted is not None:
            counted = counted[:, places]
        if start is not None:
            return k_means(x, start, self.warm_iterations, counted)
        start = x.index_select(1, first_tokens(x.shape[1], clusters, x.device)).transpose(1, 2)
        return k_means(x, start, self.iterations, counted)

    def _pools_of(self, grid: TokenGrid, device: torch.device) -> tuple[Pool, ...]:
        known = grid, device
        if known not in self._pools:
            with torch.inference_mode(False):
                parts: list[tuple[slice | torch.Tensor, int]]
                videos = [span.grid.video for span in self.spans(grid)]
                parts = [(video, video.stop - video.start) for video in videos]
                if self.references == "local" and len(parts) > 1:
                    places = torch.cat([torch.arange(x.start, x.stop) for x in videos])
                    parts = [(places.to(device), len(places))]
                pools, queries, keys = [], 0, 0
                for where, tokens in parts:
                    rows = max(1, round(tokens / self.query_cluster))
                    columns = max(1, round(tokens / self.key_cluster))
                    pools.append(
                        Pool(
                            where,
                            tokens,
                            range(queries, queries + rows),
                            range(keys, keys + columns),
                        )
                    )
                    queries, keys = queries + rows, keys + columns
                self._pools[known] = tuple(pools)
        return self._pools[known]

    def _bytes_per_head(self, query: torch.Tensor, pools: tuple[Pool, ...]) -> int:
        tokens, queries, keys = query.shape[1], pools[-1].queries.stop, pools[-1].keys.stop
        rows = tiles_reserved(tokens, queries + 1, self.query_block)
        columns = tiles_reserved(tokens, keys + 1, self.block)
        per_sample = rows * columns * _BYTES_PER_PAIR_OF_TILES
        if self.route == "error":
            # Sums over spans of keys for each query cluster, and what is made of them.
            spans = columns * spans_at_most(self.block, query.device)
            per_sample += _SUMS_OF_SPANS * queries * spans * 4
        return query.shape[0] * per_sample
