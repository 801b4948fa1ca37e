"""selection_of_call(): the token pairs that one head of a selecting method attends to in a call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch.nn.functional import interpolate, pad

from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask
from diffattn.methods.base import Method, Site
from diffattn.methods.selected_blocks import SelectedBlocksMethod
from diffattn.methods.sla.method import SLAAttn
from diffattn.methods.svg2 import SVG2Attn
from diffattn.methods.vmoba.method import VMoBAAttn
from diffattn.methods.vsa.method import VSAAttn
from diffattn.selected.attention import SelectionMask

# Queries whose blocks are in memory as numbers at a time.
_QUERIES_AT_ONCE = 4096
# A smooth field changes over about so many tokens.
_COARSER = 4


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of `Method.attend`.

    Attributes:
        query, key, value: (batch, tokens, heads, head_dim).
        site: the layer and the tokens of the call.
        scale: factor of the scores; 1 / sqrt(head_dim) when None.
        key_mask: bool (batch, tokens): False for padded keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    site: Site
    scale: float | None = None
    key_mask: torch.Tensor | None = None


@dataclass(frozen=True)
class CallSelection:
    """What the queries of one head and sample see in a call.

    Attributes:
        pairs: the token pairs that attend token by token.
        blocks: what is selected, as in "tiles of 4x4x4 tokens".
        row_of: int64 (tokens,), the block of each query.
        rest: the pairs whose key is seen only together with its block; None if there are none.
        rest_words: how keys of `rest` are seen, as in "by its block's mean".
    """

    pairs: SelectionMask
    blocks: str
    row_of: torch.Tensor
    rest: SelectionMask | None = None
    rest_words: str = ""

    def block_shares(self) -> torch.Tensor:
        """The share of a block's queries (rows) that selects each block, float32."""
        chosen = self.pairs.chosen
        sizes = torch.bincount(self.row_of)
        counts = torch.zeros(len(sizes), chosen.shape[1])
        for rows, part in zip(
            self.row_of.split(_QUERIES_AT_ONCE), chosen.split(_QUERIES_AT_ONCE), strict=True
        ):
            counts.index_add_(0, rows, part.float())
        return counts / sizes.clamp(min=1)[:, None]

    def key_counts(self) -> torch.Tensor:
        """The number of keys that each query sees token by token, float64 (tokens,)."""
        chosen = self.pairs.chosen
        sizes = torch.bincount(self.pairs.block_of, minlength=chosen.shape[1]).double()
        return torch.cat([part.double() @ sizes for part in chosen.split(_QUERIES_AT_ONCE)])


@singledispatch
def selection_of_call(
    method: Method, call: AttentionCall, *, head: int = 0, sample: int = -1
) -> CallSelection | None:
    """The selection that `method.attend` makes in a call, for one head and sample.

    A method of one's own joins in by `selection_of_call.register(TheClass, function)`.

    Returns:
        The selection; None for a method that does not select token pairs by content.
    """
    return None


def selects_by_content(method: Method) -> bool:
    """Whether `selection_of_call` knows the method."""
    return selection_of_call.dispatch(type(method)) is not selection_of_call.dispatch(Method)


@selection_of_call.register
def _of_blocks(
    method: SelectedBlocksMethod, call: AttentionCall, *, head: int = 0, sample: int = -1
) -> CallSelection:
    chosen = method.selection(
        call.query, call.key, call.site, scale=call.scale, key_mask=call.key_mask
    )
    return _selection(
        method.selection_mask(chosen[sample, head], call.site.grid),
        f"blocks of {method.block} tokens, order {method.order}",
        _counted(call, sample),
        "by its block's mean" if method.remainder == "summary" else "",
    )


@selection_of_call.register
def _of_tiles(
    method: VSAAttn, call: AttentionCall, *, head: int = 0, sample: int = -1
) -> CallSelection:
    chosen = method.selection(
        call.query, call.key, call.site, scale=call.scale, key_mask=call.key_mask
    )
    return _selection(
        method.selection_mask(chosen[sample, head], call.site.grid),
        f"tiles of {'x'.join(map(str, method.tile))} tokens",
        _counted(call, sample),
        "by its tile's mean, times the gate" if method.coarse else "",
    )


@selection_of_call.register
def _of_linear(
    method: SLAAttn, call: AttentionCall, *, head: int = 0, sample: int = -1
) -> CallSelection:
    chosen = method.selection(call.query, call.key, call.site, key_mask=call.key_mask)
    # Which blocks are negligible the selection does not tell.
    words = "by linear attention, if at all" if method.drop else "by linear attention"
    return _selection(
        method.selection_mask(chosen[sample, head], call.site.grid),
        f"blocks of {method.block_kv} keys by {method.block_q} queries",
        _counted(call, sample),
        words,
    )


@selection_of_call.register
def _of_clusters(
    method: SVG2Attn, call: AttentionCall, *, head: int = 0, sample: int = -1
) -> CallSelection:
    found = method.selection(
        call.query, call.key, call.value, call.site, scale=call.scale, key_mask=call.key_mask
    )
    of_query, of_key = (x[sample, head].cpu() for x in (found.query_labels, found.key_labels))
    chosen = found.chosen[sample, head].cpu()
    rows, columns = chosen.shape
    if call.key_mask is not None:
        # Padding has a label past the clusters, which no query sees.
        chosen = pad(chosen, (0, 1))
    return _selection(
        SelectionMask(call.site.grid, chosen[of_query], of_key),
        f"{rows - 1} clusters of queries and {columns - 1} of keys",
        _counted(call, sample),
        "by its cluster's mean" if method.remainder == "summary" else "",
        of_query,
    )


@selection_of_call.register
def _of_chunks(
    method: VMoBAAttn, call: AttentionCall, *, head: int = 0, sample: int = -1
) -> CallSelection:
    site = call.site
    bits = method.selection(call.query, call.key, site, key_mask=call.key_mask)
    mask = method.selection_mask(bits[sample, head], site.grid, site.layer)
    kind = method.partitions[method.layer_kind(site.layer)]
    return CallSelection(mask, f"{kind} blocks", mask.block_of)


def _counted(call: AttentionCall, sample: int) -> torch.Tensor | None:
    return None if call.key_mask is None else call.key_mask[sample].cpu()


def _selection(
    mask: AttentionMask,
    blocks: str,
    counted: torch.Tensor | None,
    rest_words: str,
    row_of: torch.Tensor | None = None,
) -> CallSelection:
    """A selection whose other blocks are all seen in the way of `rest_words`, or not at all.

    Args:
        mask: the pairs that attend.
        blocks: what is selected.
        counted: bool (tokens,), False for padded keys; None without padding.
        rest_words: how other blocks are seen; "" if they are not.
        row_of: the block of each query; the block of the key in its place when None.
    """
    assert isinstance(mask, SelectionMask)
    row_of = mask.block_of if row_of is None else row_of
    if not rest_words:
        return CallSelection(mask, blocks, row_of)
    keys = mask.block_of if counted is None else mask.block_of[counted]
    holds_any = torch.bincount(keys, minlength=mask.chosen.shape[1]) > 0
    rest = SelectionMask(mask.grid, ~mask.chosen & holds_any, mask.block_of)
    return CallSelection(mask, blocks, row_of, rest, rest_words)


def smooth_tokens(
    grid: TokenGrid, head_dim: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values to select by without a model, of one sample and head.

    Keys of the video and of each reference are smooth random fields. A query is its token's key
    with noise. Other tokens are random, and so are all values.

    Returns:
        q, k and v: float32 (1, tokens, 1, head_dim).
    """
    generator = torch.Generator().manual_seed(seed)
    key, noise, value = torch.randn(3, 1, grid.tokens, 1, head_dim, generator=generator)
    rectangles = [(grid.video, (grid.frames, grid.height, grid.width))]
    for one in grid.references:
        rectangles.append((slice(one.start, one.stop), (one.frames, one.height, one.width)))
    for places, sizes in rectangles:
        shape = [max(2, size // _COARSER) for size in sizes]
        coarse = torch.randn(1, head_dim, *shape, generator=generator)
        field = interpolate(coarse, size=sizes, mode="trilinear", align_corners=True)
        key[:, places, 0] = (field / field.square().mean().sqrt()).flatten(2).mT
    return key + noise, key, value
