"""Every method at a tiny size against its definition, computed densely in float64."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from diffattn import (
    AgentAttn,
    ByHeadAttn,
    DenseAttn,
    GNAAttn,
    LinFusionAttn,
    Policy,
    SLA2Attn,
    SVG2Attn,
    TokenGrid,
)
from diffattn.kernels.reference import reference_attention
from diffattn.methods import Method
from diffattn.methods.base import StaticMaskMethod
from diffattn.methods.registry import all_methods
from diffattn.methods.selected_blocks import SelectedBlocksMethod

from ..bench.cases import Case, Shape, attention_call, cases_of, selection_call
from ..bench.inputs import smooth_fields
from ..errors import UserError, one_line
from .backends import ALLOWED, relative_error
from .findings import Check, Finding

_GRID = TokenGrid(5, 8, 16, text_after=5)
# Parameters of methods that are dense at this size with their defaults.
_SPARSE: dict[str, dict[str, Any]] = {
    "freeswim": {"radius": (2, 3)},
    "lvsa": {"window": 1, "period": 0},
    "policy": {"rules": ({"method": {"type": "gna", "window": (3, 5, 5)}},)},
    "by-head": {"parts": ((GNAAttn(window=(3, 5, 5)), 1), (DenseAttn(), 1))},
}
_HEADS, _HEAD_DIM = 2, 32
# All methods together. Kernels for a GPU have to be compiled first.
_SECONDS = {"cpu": 5.0}
_SECONDS_WITH_COMPILING = 90.0

# The share of softmax in SLA2 before training.
_ALPHA = 0.9

Truth = torch.Tensor | None


def check_methods() -> Iterator[Finding]:
    """All methods, one finding for all that are right and one for each that is not."""
    device = _device()
    limit = _SECONDS.get(device.type, _SECONDS_WITH_COMPILING)
    start = time.perf_counter()
    right: dict[str, float] = {}
    left_out: list[str] = []
    unknown: list[str] = []
    for name, kind in all_methods().items():
        if time.perf_counter() - start > limit:
            left_out.append(name)
            continue
        try:
            error = error_of(kind(**_SPARSE.get(name, {})), device)
        except Exception as failure:  # kernels raise errors of many types
            said = f"fails on {device}: {type(failure).__name__}: {one_line(failure)[:200]}"
            yield Finding("problem", name, said, "see the backends above, or use another method")
            continue
        if error is None:
            unknown.append(name)
        elif error > ALLOWED[_dtype(device)]:
            yield Finding(
                "problem",
                name,
                f"computes wrong numbers on {device}: off by {error:.2g} of the largest value,"
                f" {ALLOWED[_dtype(device)]:g} is allowed",
                "do not use the method here; please report this with diffattn doctor --json",
            )
        else:
            right[name] = error
    if right:
        worst = max(right, key=lambda name: right[name])
        yield Finding(
            "ok",
            "methods",
            f"{', '.join(right)} equal dense float64 on {device}; the largest error is"
            f" {right[worst]:.1g} ({worst})",
        )
    if unknown:
        yield Finding("ok", "not checked", f"{', '.join(unknown)}: no definition is known here")
    if left_out:
        yield Finding(
            "warning",
            "not checked",
            f"{', '.join(left_out)}: {limit:g} s were over",
            "the machine is busy or slow: try again later",
        )


def error_of(method: Method, device: torch.device) -> float | None:
    """The largest error of a method's output over the largest value; None without a definition."""
    # The definitions of these two, written below, are those among video tokens.
    grid = _GRID.alone if isinstance(method, AgentAttn | LinFusionAttn) else _GRID
    dtype = _dtype(device)
    shape = Shape(grid, _HEADS, _HEAD_DIM, 1, str(dtype).removeprefix("torch."))
    try:
        case = cases_of(method, "", "", grid, 1)[0]
    except UserError:
        return None
    qkv = smooth_fields(grid, _HEADS, _HEAD_DIM, dtype, device)
    truth = _truth(case, shape, qkv)
    if truth is None:
        return None
    with torch.no_grad():
        out = attention_call(case, shape, device)(*qkv)
    return relative_error(out.double().cpu(), truth)


def _truth(case: Case, shape: Shape, qkv: list[torch.Tensor]) -> Truth:
    method, grid = case.method, shape.grid
    exact = [x.double().cpu() for x in qkv]
    q, k, v = exact
    if isinstance(method, StaticMaskMethod):
        if not method.is_mask_alone:
            return None
        scale = method.score_scale(grid, shape.head_dim, None)
        return reference_attention(q, k, v, method.mask(grid).dense(), scale=scale)[0]
    if isinstance(method, LinFusionAttn):
        return _linear(q, k, v, method.eps)
    if isinstance(method, AgentAttn):
        return _by_agents(method, grid, q, k, v)
    if isinstance(method, ByHeadAttn):
        return _by_head(case, shape, qkv)
    if isinstance(method, Policy):
        of_layer = method.at_layer(case.layer, case.layers).at_step(0, 0)
        return _truth(replace(case, method=of_layer.for_model("", grid.alone)), shape, qkv)
    selection = selection_call(case, shape, qkv)
    if selection is None:
        return None
    found: Any = selection()
    if isinstance(method, SVG2Attn):
        return _under(exact, _pairs_of_clusters(found)) if method.remainder == "drop" else None
    to_mask: Callable[..., Any] | None = getattr(method, "selection_mask", None)
    if to_mask is None:
        return None
    extra = (case.layer,) if "layer" in inspect.signature(to_mask).parameters else ()
    masks = [to_mask(one.cpu(), grid, *extra) for one in found[0]]
    allowed = torch.stack([mask.dense() for mask in masks])[None]
    if isinstance(method, SelectedBlocksMethod) and method.remainder == "summary":
        return _with_summaries(exact, allowed, masks[0].block_of)
    if isinstance(method, SLA2Attn):
        return _with_linear_rest(exact, allowed, grid.video)
    return _under(exact, allowed)


def _by_head(case: Case, shape: Shape, qkv: list[torch.Tensor]) -> Truth:
    """Each part's definition on its own heads."""
    assert isinstance(case.method, ByHeadAttn)
    outputs, first = [], 0
    for method, heads in case.method.parts:
        of_part = [x[:, :, first : first + heads] for x in qkv]
        part = _truth(replace(case, method=method), replace(shape, heads=heads), of_part)
        if part is None:
            return None
        outputs.append(part)
        first += heads
    return torch.cat(outputs, 2)


def _with_linear_rest(qkv: list[torch.Tensor], allowed: torch.Tensor, video: slice) -> torch.Tensor:
    """SLA2 as it begins: 0.9 of softmax, and 0.1 of linear attention to the rest of the video.

    Keys without the mean key of the video give video queries the same softmax where all keys of a
    query are of the video, so the softmax takes the keys as they are.
    """
    by_softmax = _under(qkv, allowed)
    q, k, v = (x[:, video] for x in qkv)
    q, k = q.softmax(-1), (k - k.mean(1, keepdim=True)).softmax(-1)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) * ~allowed[:, :, video, video]
    total = weights.sum(-1, keepdim=True)
    linear = torch.einsum("bhqk,bkhd->bqhd", weights / total.clamp(min=1e-300), v)
    share = torch.where(total > 0, _ALPHA, 1.0).transpose(1, 2)
    out = by_softmax.clone()
    out[:, video] = share * by_softmax[:, video] + (1 - share) * linear
    return out


def _under(qkv: list[torch.Tensor], allowed: torch.Tensor) -> torch.Tensor:
    return reference_attention(qkv[0], qkv[1], qkv[2], allowed)[0]


def _pairs_of_clusters(pairs: Any) -> torch.Tensor:
    """The token pairs of the chosen pairs of clusters, bool (1, heads, tokens, tokens)."""
    heads = zip(pairs.query_labels[0].cpu(), pairs.key_labels[0].cpu(), pairs.chosen[0].cpu(),
                strict=True)  # fmt: skip
    return torch.stack([chosen[rows][:, columns] for rows, columns, chosen in heads])[None]


def _with_summaries(
    qkv: list[torch.Tensor], allowed: torch.Tensor, block_of: torch.Tensor
) -> torch.Tensor:
    """Softmax over the seen tokens, and over the means of all blocks of which no token is seen."""
    q, k, v = qkv
    blocks = int(block_of.max()) + 1
    member = torch.nn.functional.one_hot(block_of, blocks).double()  # (tokens, blocks)
    sizes = member.sum(0)
    mean_k, mean_v = (torch.einsum("btgd,tc->bcgd", x, member / sizes) for x in (k, v))
    seen = (allowed.double() @ member) > 0  # (1, heads, tokens, blocks)
    scale = q.shape[-1] ** -0.5
    tokens = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    means = torch.einsum("bqhd,bkhd->bhqk", q, mean_k) * scale + sizes.log()
    scores = torch.cat(
        [tokens.masked_fill(~allowed, -torch.inf), means.masked_fill(seen, -torch.inf)], -1
    )
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), torch.cat([v, mean_v], 1))


def _linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """Linear attention over the features elu + 1."""
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / k.shape[1]
    weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def _by_agents(
    method: AgentAttn, grid: TokenGrid, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Truth:
    """Agents, the mean queries of cells, see all keys; queries see the agents."""
    cell, sharper, own = method.cell, method.k_scale2, method.k_shortcut
    if cell is None or isinstance(sharper, tuple) or isinstance(own, tuple):
        return None
    place = torch.arange(grid.tokens)
    axes = zip(grid.coordinates(place), cell, strict=True)
    frame, row, column = (axis // side for axis, side in axes)
    rows, columns = -(-grid.height // cell[1]), -(-grid.width // cell[2])
    member = torch.nn.functional.one_hot((frame * rows + row) * columns + column).double()
    if 2 * member.shape[1] >= grid.tokens:
        return None  # the method is dense there
    agents = torch.einsum("btgd,tc->bcgd", q, member / member.sum(0))
    gathered, _ = reference_attention(agents, k, v, None)
    scale = q.shape[-1] ** (-0.5 * sharper)
    return reference_attention(q, agents, gathered, None, scale=scale)[0] + own * v


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _device() -> torch.device:
    from ..run.loading import choose_device

    chosen = choose_device(None)
    # Other accelerators have no sparse kernels.
    return chosen if chosen.type in ("cuda", "xpu") else torch.device("cpu")


CHECKS: tuple[Check, ...] = (check_methods,)
