"""Tokens sorted by their cluster, with each cluster filled up to whole tiles.

Borders of clusters are ragged and differ from head to head. Tiles of sorted tokens would hold
parts of several clusters, and compute two to five times the pairs that are chosen. In filled
clusters no tile lies in two clusters: a pair of tiles is computed whole or not at all, but for the
last tile of a key cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from diffattn.blocks import BlockLayout, pack_bits
from diffattn.kernels.autocast import autocast_off
from diffattn.operator import attention
from diffattn.routing.lists import index_list
from diffattn.selected.summary import Summary, summarised_attention


@dataclass(frozen=True)
class FilledClusters:
    """Where the tokens of filled clusters stand. All sizes follow from shapes, none from labels.

    Attributes:
        token: int64 (batch, heads, places), the token at each place. Some token stands at each
            place that fills a cluster up, too; the layout hides these places.
        place: int64 (batch, heads, tokens), the place of each token that has a cluster.
        cluster: int64 (batch, heads, tiles), the cluster of each tile; the number of clusters for a
            tile without a cluster.
        held: int64 (batch, heads, tiles), the number of tokens in each tile.
        sizes: int64 (batch, heads, clusters).
        tile: places per tile.
    """

    token: torch.Tensor
    place: torch.Tensor
    cluster: torch.Tensor
    held: torch.Tensor
    sizes: torch.Tensor
    tile: int

    @classmethod
    def of_labels(cls, labels: torch.Tensor, clusters: int, tile: int) -> FilledClusters:
        """Fill clusters up.

        Args:
            labels: int64 (batch, heads, tokens), the cluster of each token; `clusters` for a token
                that is left out.
            clusters: number of clusters; some may be empty.
            tile: places per tile.
        """
        batch, heads, tokens = labels.shape
        device = labels.device
        tiles = tiles_reserved(tokens, clusters, tile)
        counts = labels.new_zeros(batch, heads, clusters + 1)
        sizes = counts.scatter_add_(2, labels, torch.ones_like(labels))[..., :clusters]
        runs = (sizes + tile - 1) // tile
        ends = runs.cumsum(-1)
        # Tokens that are left out come last in the sort.
        order = labels.int().argsort(dim=-1, stable=True)  # half as many digits to sort by
        label = labels.gather(-1, order)
        shift = pad((ends - runs) * tile - (sizes.cumsum(-1) - sizes), (0, 1))
        to = torch.arange(tokens, device=device) + shift.gather(-1, label)
        to = to.masked_fill(label == clusters, tiles * tile)
        # Places of filling spread over the tokens: additions of zeros in a backward then do not
        # wait for each other.
        token = torch.arange(tiles * tile + 1, device=device) % tokens
        token = token.repeat(batch, heads, 1).scatter_(-1, to, order)[..., :-1]
        place = torch.empty_like(labels).scatter_(-1, order, to)
        number = torch.arange(tiles, device=device).repeat(batch, heads, 1)
        cluster = torch.searchsorted(ends, number, right=True)
        first = pad(ends - runs, (0, 1)).gather(-1, cluster)
        held = pad(sizes, (0, 1)).gather(-1, cluster) - (number - first) * tile
        return cls(token, place, cluster, held.clamp(0, tile), sizes, tile)

    def filled(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens of `x`, (batch, tokens, heads, head_dim), at their places."""
        return _at(x, self.token)

    def unfilled(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `filled`, for clusters that leave no token out."""
        return _at(x, self.place)

    def means(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of each cluster, 0 for an empty cluster; differentiable.

        Args:
            x: (batch, places, heads, head_dim), from `filled`.

        Returns:
            (batch, clusters, heads, head_dim), in at least float32.
        """
        tiled = x.unflatten(1, (-1, self.tile))
        there = self.there.unflatten(2, (-1, self.tile)).permute(0, 2, 3, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        of_tiles = tiled.masked_fill(~there[..., None], 0).sum(2, dtype=wide)
        sums = self.sums(of_tiles.permute(0, 2, 3, 1))  # (batch, heads, head_dim, clusters)
        return (sums / self.sizes.clamp(min=1)[:, :, None]).permute(0, 3, 1, 2)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """The sums over the tiles of each cluster; differentiable.

        Args:
            x: (batch, heads, rows, tiles).

        Returns:
            (batch, heads, rows, clusters).
        """
        # A product adds in the same order every time; atomic additions would not.
        number = torch.arange(self.sizes.shape[2], device=x.device)
        return x @ (self.cluster[..., None] == number).to(x.dtype)

    def of_clusters(self, x: torch.Tensor) -> torch.Tensor:
        """The number of each tile's cluster, 0 for a tile without a cluster.

        Args:
            x: (batch, heads, rows, clusters).

        Returns:
            (batch, heads, rows, tiles).
        """
        of_tile = self.cluster[:, :, None].expand(-1, -1, x.shape[2], -1)
        return pad(x, (0, 1)).gather(3, of_tile)

    @property
    def there(self) -> torch.Tensor:
        """Whether a place holds a token of its cluster: bool (batch, heads, places)."""
        return (torch.arange(self.tile, device=self.held.device) < self.held[..., None]).flatten(2)


def tiles_reserved(tokens: int, clusters: int, tile: int) -> int:
    """The most tiles that any labels can fill."""
    return max(1, (tokens + clusters * (tile - 1)) // tile)


def attention_of_clusters(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: FilledClusters,
    keys: FilledClusters,
    chosen: torch.Tensor,
    *,
    summarise: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of query clusters to the key clusters that they have chosen; differentiable.

    Args:
        query, key, value: (batch, tokens, heads, head_dim).
        queries: the clusters of the queries, which leave none out.
        keys: the clusters of the keys. Keys that are left out must be finite.
        chosen: bool (batch, heads, query clusters, key clusters).
        summarise: whether clusters that are not chosen enter the softmax by their means.
        scale: factor of the scores; 1 / sqrt(head_dim) when None.

    Returns:
        (batch, tokens, heads, head_dim).
    """
    q, k, v = queries.filled(query), keys.filled(key), keys.filled(value)
    seen = _rows(queries, chosen)
    layout = _layout(queries, keys, seen)
    if summarise:
        with autocast_off(query.device.type):
            bias = keys.sizes.float().log()
            summary = Summary(keys.means(k), keys.means(v), bias, pack_bits(seen))
        out = summarised_attention(q, k, v, layout, summary, scale=scale)
    else:
        out = attention(q, k, v, layout, scale=scale)
    assert isinstance(out, torch.Tensor)
    return queries.unfilled(out)


def _at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index.transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[-1]))


def _rows(queries: FilledClusters, chosen: torch.Tensor) -> torch.Tensor:
    """The key clusters that each query tile has chosen, bool (batch, heads, tiles, clusters)."""
    of_tile = queries.cluster[..., None].expand(-1, -1, -1, chosen.shape[3])
    return pad(chosen, (0, 0, 0, 1)).gather(2, of_tile)


def _layout(queries: FilledClusters, keys: FilledClusters, seen: torch.Tensor) -> BlockLayout:
    seen = keys.of_clusters(seen)  # (batch, heads, query tiles, key tiles)
    held = keys.held[:, :, None].expand_as(seen)
    whole = held == keys.tile
    full_count, full_index = index_list(seen & whole, seen.shape[3])
    # A cluster has one tile at most that is not whole.
    partial_count, partial_index = index_list(seen & ~whole & (held > 0), keys.sizes.shape[2])
    number = torch.arange(keys.tile, device=seen.device)
    first_keys = pack_bits(number <= number[:, None])[:, None]  # mask n: the first n + 1 keys
    return BlockLayout(
        tokens_q=queries.token.shape[2],
        tokens_kv=keys.token.shape[2],
        block_q=queries.tile,
        block_kv=keys.tile,
        full_count=full_count,
        full_index=full_index,
        partial_count=partial_count,
        partial_index=partial_index,
        partial_mask=(held - 1).clamp(min=0).gather(3, partial_index.long()).to(torch.int32),
        bit_masks=first_keys.repeat(1, queries.tile, 1),
    )
