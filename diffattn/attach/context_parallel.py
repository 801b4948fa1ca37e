"""Attention over a sequence that diffusers' context parallelism spreads over processes.

Under Ulysses each process attends over the whole sequence for some of the heads. On a ring each
process collects all keys and values, and attends for its own queries. Both are exact: the output is
that of one process, for some of its heads or some of its queries.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from diffattn._compat import ContextParallel
from diffattn.blocks import BlockLayout
from diffattn.methods.base import Method, Site, attends_by_mask_alone
from diffattn.operator import attention
from diffattn.orders import TileOrder

# torch 2.13 has renamed `all_gather_into_tensor`.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Numbers of tokens that a process has of the first and the second part of a sequence, which is
# [text, video] or [video, text].
Parts = tuple[int, int]


class Attend(Protocol):
    """Attention over a whole sequence for some of its queries, or for all when `queries` is None.

    Tensors are (batch, tokens, heads, head_dim); `queries` are positions in the sequence.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None,
        queries: tuple[range, ...] | None,
    ) -> torch.Tensor: ...


def attend_sharded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    over: ContextParallel,
    video_tokens: int,
    text_first: bool,
    attend: Attend,
) -> torch.Tensor:
    """Self-attention of a sequence of which each process has a part; differentiable.

    Every process has a share of the text and a share of the video. The tokens of all processes,
    one process after another, are [text 0, video 0, text 1, video 1, ...]. `attend` gets the tokens
    as [text, video], as it does in one process. If the video stands before the text, text and video
    change places in both lists.

    Args:
        query, key, value: the tokens of this process, (batch, tokens, heads, head_dim).
        key_mask: bool (batch, tokens) for the tokens of this process: False for padded keys.
        over: the processes.
        video_tokens: tokens of the whole sequence but for text; those of references count.
        text_first: whether text stands before the video and its references.
        attend: computes the attention of some heads, for some queries.

    Returns:
        The output for the queries of this process, in the shape of `query`.

    Raises:
        ValueError: if the heads cannot be divided among the processes.
    """
    heads = _head_counts(query.shape[2], over)
    tokens = _token_counts(query, over)
    parts = _parts(tokens, video_tokens, text_first)
    first = over.ring_rank * over.ulysses_degree
    group = slice(first, first + over.ulysses_degree)

    joined = torch.cat([query, key, value])
    joined = _heads_to_tokens(joined, tokens[group], heads, over)
    batch = query.shape[0]
    query, key_value = joined[:batch], joined[batch:]
    if over.ring_degree > 1:
        by_ring = torch.tensor(tokens).view(over.ring_degree, -1).sum(1).tolist()
        key_value = _gather_tokens(key_value, by_ring, over.ring)
    if key_mask is not None:
        key_mask = _gather_mask(key_mask, tokens, over)
        key_mask = _sort_parts(key_mask, parts)
    key, value = _sort_parts(key_value, parts).chunk(2)
    query = _sort_parts(query, parts[group])
    queries = _positions(parts, group) if over.ring_degree > 1 else None
    out = attend(query, key, value, key_mask, queries)
    return _tokens_to_heads(_unsort_parts(out, parts[group]), tokens[group], heads, over)


def gather_tables(
    tables: Sequence[torch.Tensor],
    query: torch.Tensor,
    *,
    over: ContextParallel,
    video_tokens: int,
    text_first: bool,
) -> tuple[torch.Tensor, ...]:
    """Collect tables with a row per token from all processes, in the token order of `attend`.

    Args:
        tables: this process's rows of each table, (..., its tokens, ..., channels), without batch.
        query: the query of a call of this process, which gives the number of its tokens.
        over, video_tokens, text_first: as for `attend_sharded`.

    Returns:
        The whole tables, (all tokens, channels) each.
    """
    tokens = _token_counts(query, over)
    parts = _parts(tokens, video_tokens, text_first)
    rows = [table.reshape(1, -1, 1, table.shape[-1]) for table in tables]
    whole = [_sort_parts(_gather_tokens(x, tokens, over.group), parts) for x in rows]
    return tuple(x[0, :, 0] for x in whole)


# The rows of a layout depend on the mask and cannot be traced: compiled code breaks here.
@torch.compiler.disable
def attend_queries(
    method: Method,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    site: Site,
    queries: tuple[range, ...],
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    order: TileOrder | None = None,
) -> torch.Tensor:
    """`method.attend` for some of the queries of a site.

    The call computes rows of the whole sequence's layout. So each query keeps the place in its
    block that it has in the whole sequence. Where the queries begin or end inside a block, empty
    queries fill up the block. Context parallelism leaves the tokens in the sequence's own order,
    even if the method is faster in another order: in their own order the queries of a process are
    runs of blocks.

    Args:
        query: (batch, tokens in `queries`, heads, head_dim).
        key, value: (batch, tokens, heads, head_dim), all of the site's tokens.
        queries: positions of the queries in the sequence, in order.
        order: the order that the tokens of the tensors come in; None for the sequence's own.

    Returns:
        (batch, tokens in `queries`, heads, head_dim).

    Raises:
        NotImplementedError: if the method does more than attend under a mask.
    """
    if not attends_by_mask_alone(method):
        raise NotImplementedError(
            f"{method.type} attention cannot be computed for a part of the queries, as ring"
            f" attention does; use Ulysses: ContextParallelConfig(ulysses_degree=...)"
        )
    whole = method.layout(site.grid, query.device, order)
    size = whole.block_q
    pieces = query.split([len(part) for part in queries], dim=1)
    # (before, after): empty queries that fill up the first and the last block of each part
    margins = [(part.start % size, -part.stop % size) for part in queries]
    padded = [
        F.pad(piece, (0, 0, 0, 0, *margin)) for piece, margin in zip(pieces, margins, strict=True)
    ]
    out = attention(
        torch.cat(padded, dim=1),
        key,
        value,
        _rows_of(whole, queries),
        scale=method.score_scale(site.grid, query.shape[-1], scale),
        key_mask=key_mask,
    )
    blocks = out.split([piece.shape[1] for piece in padded], dim=1)
    return torch.cat(
        [
            block[:, before : block.shape[1] - after]
            for block, (before, after) in zip(blocks, margins, strict=True)
        ],
        dim=1,
    )


# Kept with each layout: kernels cache what they derive from tensors while the tensors live.
_selected: weakref.WeakKeyDictionary[BlockLayout, dict[tuple[range, ...], BlockLayout]] = (
    weakref.WeakKeyDictionary()
)


def _rows_of(layout: BlockLayout, queries: tuple[range, ...]) -> BlockLayout:
    """The rows of a self-attention's layout that hold `queries`, part by part."""
    known = _selected.setdefault(layout, {})
    if queries not in known:
        size = layout.block_q
        rows = torch.cat(
            [torch.arange(part.start // size, -(-part.stop // size)) for part in queries]
        ).to(layout.device)
        known[queries] = replace(
            layout,
            tokens_q=rows.numel() * size,
            **{
                name: getattr(layout, name).index_select(2, rows)
                for name in (
                    "full_count",
                    "full_index",
                    "partial_count",
                    "partial_index",
                    "partial_mask",
                )
            },
        )
    return known[queries]


def _head_counts(heads: int, over: ContextParallel) -> list[int]:
    """Number of heads that each process of a Ulysses group attends for."""
    processes = over.ulysses_degree
    if heads % processes and not over.uneven:
        raise ValueError(
            f"{heads} attention heads cannot be divided among {processes} processes: choose a"
            f" ulysses_degree that divides {heads}, ulysses_anything=True, or ring attention"
        )
    if heads < processes:
        raise ValueError(f"{heads} attention heads are too few for {processes} processes")
    return _nearly_equal(heads, processes)


def _token_counts(query: torch.Tensor, over: ContextParallel) -> list[int]:
    """Number of tokens that each process has, by rank."""
    here = query.shape[1]
    if not over.uneven:
        return [here] * (over.ring_degree * over.ulysses_degree)
    counts = torch.empty(
        over.ring_degree * over.ulysses_degree, dtype=torch.int64, device=query.device
    )
    _all_gather(counts, torch.tensor([here], device=query.device), group=over.group)
    return counts.tolist()


def _parts(tokens: Sequence[int], video_tokens: int, text_first: bool) -> list[Parts]:
    """Tokens that each process has of the sequence's first and of its second part, by rank."""
    video = _nearly_equal(video_tokens, len(tokens))
    text = [total - part for total, part in zip(tokens, video, strict=True)]
    if min(text) < 0:
        raise RuntimeError(
            f"the attention call has {sum(tokens)} tokens over all processes, but the model's input"
            f" makes a grid of {video_tokens}"
        )
    first, second = (text, video) if text_first else (video, text)
    return list(zip(first, second, strict=True))


def _nearly_equal(total: int, parts: int) -> list[int]:
    """The sizes of the pieces that `torch.tensor_split` makes; diffusers cuts sequences by it."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def _positions(parts: Sequence[Parts], ranks: slice) -> tuple[range, ...]:
    """Positions of the tokens of consecutive ranks in [all first parts, all second parts]."""
    out = []
    start = 0
    for sizes in zip(*parts, strict=True):
        before, here = sum(sizes[: ranks.start]), sum(sizes[ranks])
        if here:
            out.append(range(start + before, start + before + here))
        start += sum(sizes)
    return tuple(out)


def _sort_parts(x: torch.Tensor, parts: Sequence[Parts]) -> torch.Tensor:
    """Reorder tokens (dim 1) from the order of ranks to [all first parts, all second parts]."""
    if not all(map(all, parts)):
        return x  # The sequence has only one part.
    pieces = x.split([size for both in parts for size in both], dim=1)
    return torch.cat([*pieces[0::2], *pieces[1::2]], dim=1)


def _unsort_parts(x: torch.Tensor, parts: Sequence[Parts]) -> torch.Tensor:
    """Inverse of `_sort_parts`."""
    if not all(map(all, parts)):
        return x
    pieces = x.split([size for sizes in zip(*parts, strict=True) for size in sizes], dim=1)
    half = len(parts)
    pairs = zip(pieces[:half], pieces[half:], strict=True)
    return torch.cat([piece for pair in pairs for piece in pair], dim=1)


def _heads_to_tokens(
    x: torch.Tensor, tokens: Sequence[int], heads: Sequence[int], over: ContextParallel
) -> torch.Tensor:
    """(batch, own tokens, all heads, head_dim) -> (batch, all tokens, own heads, head_dim)."""
    if over.ulysses_degree == 1:
        return x
    batch, here, _, dim = x.shape
    own = heads[over.ulysses_rank]
    received = _AllToAll.apply(
        x.permute(2, 1, 0, 3).flatten(),
        [count * own * batch * dim for count in tokens],
        [count * here * batch * dim for count in heads],
        over.ulysses,
    )
    pieces = received.split([count * own * batch * dim for count in tokens])
    pieces = [p.view(own, count, batch, dim) for p, count in zip(pieces, tokens, strict=True)]
    return torch.cat(pieces, dim=1).permute(2, 1, 0, 3)


def _tokens_to_heads(
    x: torch.Tensor, tokens: Sequence[int], heads: Sequence[int], over: ContextParallel
) -> torch.Tensor:
    """Inverse of `_heads_to_tokens`."""
    if over.ulysses_degree == 1:
        return x
    batch, _, own, dim = x.shape
    here = tokens[over.ulysses_rank]
    received = _AllToAll.apply(
        x.permute(1, 2, 0, 3).flatten(),
        [count * here * batch * dim for count in heads],
        [count * own * batch * dim for count in tokens],
        over.ulysses,
    )
    pieces = received.split([count * here * batch * dim for count in heads])
    pieces = [p.view(here, count, batch, dim) for p, count in zip(pieces, heads, strict=True)]
    return torch.cat(pieces, dim=1).permute(2, 0, 1, 3)


def _gather_tokens(x: torch.Tensor, tokens: Sequence[int], group: Any) -> torch.Tensor:
    """(batch, own tokens, heads, head_dim) -> (batch, all tokens, heads, head_dim)."""
    longest = max(tokens)
    padded = F.pad(x.transpose(0, 1), (0, 0, 0, 0, 0, 0, 0, longest - x.shape[1]))
    pieces = _AllGather.apply(padded.contiguous(), len(tokens), group).split(longest)
    return torch.cat([p[:count] for p, count in zip(pieces, tokens, strict=True)]).transpose(0, 1)


def _gather_mask(mask: torch.Tensor, tokens: Sequence[int], over: ContextParallel) -> torch.Tensor:
    """bool (batch, own tokens) -> (batch, all tokens)."""
    return _gather_tokens(mask[:, :, None, None].to(torch.uint8), tokens, over.group)[..., 0, 0] > 0


class _AllToAll(torch.autograd.Function):
    """Exchange of pieces of flat tensors: piece i goes to process i, which sends one in return."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, received: list[int], sent: list[int], group: Any
    ) -> torch.Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        out = x.new_empty(sum(received))
        dist.all_to_all_single(out, x, received, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        grad = _AllToAll.apply(grad.contiguous(), ctx.sent, ctx.received, ctx.group)
        return grad, None, None, None


class _AllGather(torch.autograd.Function):
    """The tensors of all processes, joined along the first dimension in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, processes: int, group: Any) -> torch.Tensor:
        ctx.processes, ctx.group = processes, group
        out = x.new_empty(processes * x.shape[0], *x.shape[1:])
        _all_gather(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        sizes = [grad.numel() // ctx.processes] * ctx.processes
        received = _AllToAll.apply(grad.flatten(), sizes, sizes, ctx.group)
        return received.view(ctx.processes, -1, *grad.shape[1:]).sum(0), None, None
