"""Attention calls whose queries are some tokens of the sequence, and whose keys are all of them.

Some models have no queries of the text. Others keep keys and values of references from an earlier
step. The keys of such a call are the sequence that a method knows; `Family.queries` says which of
its tokens the queries are. The others are text or references: no method lets the query of such a
token change the output of another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffattn.attach.context_parallel import attend_queries
from diffattn.methods.base import Site, StaticMaskMethod


def attend_some(
    method: StaticMaskMethod,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    site: Site,
    queries: tuple[slice, ...],
    *,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention under a mask alone for some of the queries, in the method's order of tokens.

    Args:
        query: (batch, tokens in `queries`, heads, head_dim).
        key, value: (batch, tokens, heads, head_dim), all of the site's tokens.
        queries: positions of the queries in the sequence, in order. The target and each reference
            lie inside of one range or outside of all.

    Returns:
        (batch, tokens in `queries`, heads, head_dim).
    """
    order, tokens = method.order(site.grid), key.shape[1]
    if order is not None:
        query = _some(order.to_tiles(_whole(query, queries, tokens)), queries)
        key, value = order.to_tiles(key), order.to_tiles(value)
        key_mask = None if key_mask is None else order.to_tiles(key_mask)
    ranges = tuple(range(part.start, part.stop) for part in queries)
    out = attend_queries(
        method, query, key, value, site, ranges, scale=scale, key_mask=key_mask, order=order
    )
    if order is not None:
        out = _some(order.from_tiles(_whole(out, queries, tokens)), queries)
    return out


def attend_whole(
    attend: Callable[[torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    tokens: int,
    queries: tuple[slice, ...],
) -> torch.Tensor:
    """Attention of the whole sequence, for methods that do more than attend under a mask.

    Args:
        attend: gets queries of `tokens` tokens, which are 0 at other positions than `queries`.
        query: (batch, tokens in `queries`, heads, head_dim).
        tokens: of the whole sequence.
        queries: as for `attend_some`.

    Returns:
        (batch, tokens in `queries`, heads, head_dim).
    """
    return _some(attend(_whole(query, queries, tokens)), queries)


def _whole(x: torch.Tensor, queries: tuple[slice, ...], tokens: int) -> torch.Tensor:
    """A sequence of `tokens` tokens with those of `x` at the positions `queries`, and zeros."""
    parts, taken, end = [], 0, 0
    for part in queries:
        stop = taken + part.stop - part.start
        parts += [x.new_zeros(x.shape[0], part.start - end, *x.shape[2:]), x[:, taken:stop]]
        taken, end = stop, part.stop
    parts.append(x.new_zeros(x.shape[0], tokens - end, *x.shape[2:]))
    return torch.cat(parts, dim=1)


def _some(x: torch.Tensor, queries: tuple[slice, ...]) -> torch.Tensor:
    return torch.cat([x[:, part] for part in queries], dim=1)
