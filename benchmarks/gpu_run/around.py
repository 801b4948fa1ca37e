"""What a selecting method does around its kernels: order, pooling, scores, rule, lists.

The kernels are left out, and everything else of `Method.attend` runs as it is. The same works on a
GPU, on a CPU, and on tensors without memory.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

from diffattn import (
    BlockTopKAttn,
    Method,
    SLAAttn,
    SolAttn,
    SVG2Attn,
    TokenGrid,
    VMoBAAttn,
    VSAAttn,
)
from diffattn.blocks import BlockLayout
from diffattn.methods import Site
from diffattn.methods.sla.linear import linear_over_all, linear_over_blocks
from diffattn.operator import add_keys, attention
from diffattn.selected.attention import selected_attention
from diffattn.selected.key_blocks import KeyBlocks
from diffattn.selected.summary import summarised_attention
from diffattn.selected.tiles import selected_pairs

# The methods whose tokens decide what attends, as published; SVG-EAR is svg2 with its remainder.
METHODS: dict[str, Method] = {
    "vmoba": VMoBAAttn(),
    "vmoba, training": VMoBAAttn(preset="training"),
    "vmoba, tiles of 128": VMoBAAttn(preset="training", granularity="tile"),
    "sol": SolAttn(),
    "block-topk, parts": BlockTopKAttn(),
    "block-topk, mean": BlockTopKAttn(score="mean"),
    "block-topk, mean, 128": BlockTopKAttn(score="mean", block=128),
    "svg2": SVG2Attn(),
    "svg2, ear": SVG2Attn(remainder="summary", route="error"),
    "vsa": VSAAttn(),
    "sla": SLAAttn(),
}
LAYER, LAYERS = 2, 30  # VMoBA's boxes


class _Module(torch.nn.Module):
    """Stands for a model's attention module, whose sizes a method's weights take."""

    def __init__(self, heads: int, head_dim: int, **kind: Any) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_q = self.to_k = torch.nn.Linear(heads * head_dim, heads * head_dim, **kind)


def site_of(method: Method, grid: TokenGrid, like: torch.Tensor, layer: int = LAYER) -> Site:
    """A site with the weights that the method adds, on the device and in the dtype of `like`."""
    module = _Module(*like.shape[2:], device=like.device, dtype=like.dtype)
    return Site("wan", layer, LAYERS, grid, weights=method.site_weights(module, joint=False))


@contextmanager
def kernels_left_out(
    densities: list[torch.Tensor] | None = None, tokens: int | None = None
) -> Iterator[None]:
    """Let every attention of the package give anything while the block runs.

    Args:
        densities: takes the pairs that each attention would compute, as a share of all pairs.
        tokens: of the call, whose pairs are all pairs. Methods that fill blocks up compute more
            places than tokens. By default the places that a layout has.
    """
    stand_in = partial(_anything, densities, tokens)
    places = _places(len(sys.modules))
    for module, name, _ in places:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module, name, kernel in places:
            setattr(module, name, kernel)


# The block is timed: it must not begin by looking through all modules each time.
@functools.lru_cache(maxsize=1)
def _places(modules: int) -> list[tuple[ModuleType, str, object]]:
    """Where modules of the package have kernels: module, name, kernel."""
    kernels = (
        attention, summarised_attention, selected_attention, add_keys, linear_over_all,
        linear_over_blocks,
    )  # fmt: skip
    return [
        (module, name, value)
        for path, module in list(sys.modules.items())
        if path.startswith("diffattn.")
        for name, value in list(vars(module).items())
        if any(value is kernel for kernel in kernels)
    ]


def _anything(
    densities: list[torch.Tensor] | None,
    tokens: int | None,
    query: torch.Tensor,
    *args: Any,
    return_lse: bool = False,
    **kwargs: Any,
) -> Any:
    if densities is not None:
        for first, second in pairwise(args):
            if isinstance(first, KeyBlocks):
                densities.append(selected_pairs(first, second))
        for x in args:
            if isinstance(x, BlockLayout):
                visited = (x.full_count + x.partial_count).float().mean()
                share = visited / -(-x.tokens_kv // x.block_kv)
                filled = 1 if tokens is None else x.tokens_q * x.tokens_kv / tokens**2
                densities.append(share * filled)
    out = torch.empty_like(query)
    return (out, out[..., 0].transpose(1, 2).float()) if return_lse else out
