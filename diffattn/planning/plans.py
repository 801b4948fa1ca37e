"""plan(): the cost of a method on a model at a size of video, before anything runs.

The module is not called `plan` because `diffattn.plan` is the function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffattn._checks import did_you_mean
from diffattn.grid import TokenGrid
from diffattn.masks.base import allowed_pairs
from diffattn.methods.base import Method, StaticMaskMethod
from diffattn.methods.gna import GNAAttn, Tile
from diffattn.methods.registry import as_method
from diffattn.models.base import SizeRules
from diffattn.planning.block_sparse import has_masked_blocks, in_one_of, nearest_on
from diffattn.planning.by_steps import PlanBySteps
from diffattn.planning.costs import Cost, Estimate
from diffattn.planning.published import PUBLISHED, ModelShape, published_shape
from diffattn.schedule import resolve_steps

# Blocks are counted in tables of blocks x blocks, which take gigabytes beyond this many tokens.
_MOST_TOKENS = 1 << 21


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Cost):
    """The cost of a method that is a mask, by the blocks that its mask visits.

    Attributes:
        density: share of the token pairs that attend, exact; text included.
        extra_keys: keys that every video token sees in addition, such as CLEAR's pooled keys. FLOPs
            and speed-ups include them, `density` and the blocks do not.
        block_size: tokens of a block.
        tile: frames, rows and columns of a block; None where blocks are cut from the tokens in
            their own order.
        blocks: all blocks of a head's attention matrix.
        full_blocks: visited blocks that attend everywhere.
        partial_blocks: visited blocks that need a bit mask.
        worst_blocks: the most key blocks that a query block of video tokens alone visits.
        columns: key blocks in a row.
        layout_bytes: memory of the index lists and bit masks, which all heads and layers share.
        is_block_sparse: whether every visited block is full. Blocks that hold text, or tokens of
            two pictures, and blocks at the ragged end of the sequence, do not count.
        nearest_block_sparse: for GNA, the nearest setting that is block-sparse, which may be the
            method itself. None for other methods, and where no setting but dense attention is
            block-sparse in whole tiles of the grid.
    """

    method: StaticMaskMethod
    density: float
    extra_keys: int
    block_size: int
    tile: Tile | None
    blocks: int
    full_blocks: int
    partial_blocks: int
    worst_blocks: int
    columns: int
    layout_bytes: int
    is_block_sparse: bool
    nearest_block_sparse: GNAAttn | None

    @property
    def visited_blocks(self) -> int:
        """Blocks that are visited, full and partial."""
        return self.full_blocks + self.partial_blocks

    @property
    def block_density(self) -> float:
        """Share of the blocks that are visited: the work done relative to dense attention."""
        return self.visited_blocks / self.blocks

    @property
    def extra_share(self) -> float:
        """Pairs of a video token and an extra key, relative to all pairs of tokens."""
        return self.grid.video_tokens * self.extra_keys / self.tokens**2

    @property
    def sparse_flops(self) -> float:
        """FLOPs of one layer's attention: in the visited blocks, and to extra keys."""
        return self.dense_flops * (self.block_density + self.extra_share)

    @property
    def sparse_forward_flops(self) -> float:
        """FLOPs of the attention of all layers in a sparse step, dense layers included."""
        sparse_layers = self.layers - self.dense_layers
        return self.dense_flops * self.dense_layers + self.sparse_flops * sparse_layers

    @property
    def flop_speedup(self) -> float:
        """Upper bound of the speed-up of one sparse attention if a block were one token."""
        return 1 / (self.density + self.extra_share)

    @property
    def attention_speedup(self) -> float:
        """Upper bound of the speed-up of one sparse attention, by the visited blocks."""
        return self.dense_flops / self.sparse_flops

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        best = self.nearest_block_sparse
        stored = {name: getattr(self, name) for name in _STORED}
        derived = {name: getattr(self, name) for name in _DERIVED}
        return {
            "model": self.model,
            "method": self.method.to_dict(),
            "grid": self.grid_sizes,
            **stored,
            "nearest_block_sparse": None if best is None else best.to_dict(),
            **derived,
        }


_STORED = (
    "heads", "head_dim", "layers", "dense_layers", "steps", "dense_steps", "density",
    "extra_keys", "block_size", "tile", "blocks", "full_blocks", "partial_blocks", "worst_blocks",
    "columns", "layout_bytes", "is_block_sparse", "linear_flops",
)  # fmt: skip
_DERIVED = (
    "tokens", "visited_blocks", "block_density", "extra_share", "dense_flops", "sparse_flops",
    "dense_forward_flops", "sparse_forward_flops", "run_density", "flop_speedup",
    "attention_speedup", "attention_share", "model_speedup",
)  # fmt: skip


def plan(
    target: TokenGrid | str | Path | ModelShape | Any,
    method: Method | str,
    *,
    grid: TokenGrid | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    text: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    layers: int | None = None,
    steps: int | None = None,
) -> Plan | Estimate | PlanBySteps:
    """Work out the cost of `method`, without weights, network or accelerator.

    Args:
        target: a token grid, the repository id of a published model, a pipeline's folder, a
            pipeline of diffusers, a denoiser without its pipeline, or the result of `model_shape`.
        method: the method or its name; parameters left at None take the values recommended for the
            model.
        grid: the tokens of a model's call, text included, in place of pixels and frames; needed
            for a denoiser without its pipeline.
        height, width: pixels of a model's video; the model's default when None.
        num_frames: frames of a model's video; the model's default when None.
        text: text tokens in a model's sequence; the length that its pipeline pads prompts to when
            None.
        heads, head_dim, layers: attention over a grid; 1 head of 128 in 1 layer when None.
        steps: denoising steps of a run; the model's default when None.

    Returns:
        A `Plan` for a method that is a mask, an `Estimate` for other methods, and a `PlanBySteps`
        for a method that differs from step to step.

    Raises:
        ValueError: if the model is not known or cannot make the size; if sizes come with a grid, or
            heads with a model; if the method does not fit the grid or the model, or cannot state
            its cost; if a list of the method has another number of values than the run has steps.
        TypeError: if `target` or `method` is none of the above.
    """
    method = as_method("method", method)
    attention = {"heads": heads, "head_dim": head_dim, "layers": layers}
    size = {"height": height, "width": width, "num_frames": num_frames, "text": text}
    for name, value in {**attention, "steps": steps}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if isinstance(target, TokenGrid):
        _refuse({**size, "grid": grid}, "a token grid says it all; give them with a model")
        shape = ModelShape(
            name="", variant="", heads=heads or 1, head_dim=head_dim or 128,
            block_of_site=tuple(range(layers or 1)), sizes=SizeRules.images(1), steps=steps,
        )  # fmt: skip
        return _plan(target, method, shape, None)
    _refuse(attention, "the model says it; give them with a token grid")
    shape = target if isinstance(target, ModelShape) else model_shape(target)
    shape = replace(shape, steps=steps or shape.steps)
    method.check_family(shape.family)
    if grid is None:
        grid = shape.grid(**size)
    else:
        _refuse(size, "the grid says them")
    return _plan(grid, method, shape, shape.name)


def model_shape(model: str | Path | Any) -> ModelShape:
    """The shape of a model, by its repository id or its folder, or of a model in memory.

    Args:
        model: a repository id, a folder, a pipeline of diffusers, or a denoiser.

    Raises:
        ValueError: for a string that is neither; the message names the known models. For a model in
            memory that is of no known family.
        TypeError: if `model` is none of the above.
    """
    if not isinstance(model, str | Path):
        return _shape_in_memory(model)
    published = published_shape(str(model))
    if published is not None:
        return published
    folder = Path(model).expanduser()
    if folder.is_dir():
        from diffattn.planning.folder import folder_shape  # imports diffusers

        return folder_shape(folder)
    raise ValueError(
        f"{str(model)!r} is neither a folder nor a model whose shape is known"
        f"{did_you_mean(str(model), PUBLISHED, or_list=True)}"
    )


def _shape_in_memory(model: Any) -> ModelShape:
    from diffattn.planning.folder import denoiser_shape, pipeline_shape  # imports diffusers

    if isinstance(model, torch.nn.Module):
        return denoiser_shape(model)
    if not isinstance(getattr(model, "components", None), Mapping) or isinstance(model, type):
        raise TypeError(
            f"target is {_a(model)}, but must be a TokenGrid, the repository id of a model, a"
            f" pipeline's folder, a pipeline of diffusers, or its denoiser"
        )
    name = getattr(model.config, "_name_or_path", None)
    return pipeline_shape(model, name or type(model).__name__)


def _a(value: Any) -> str:
    is_class = isinstance(value, type)
    return f"the class {value.__name__}" if is_class else f"a {type(value).__name__}"


def check_tokens(grid: TokenGrid) -> None:
    """Raise ValueError for a grid whose blocks would not fit into memory."""
    if grid.tokens > _MOST_TOKENS:
        raise ValueError(
            f"the grid {grid} has {grid.tokens:,} tokens, but at most {_MOST_TOKENS:,} are"
            f" possible: take fewer frames or a smaller size"
        )


def _refuse(given: dict[str, Any], why: str) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise ValueError(f"{', '.join(names)} cannot be given here: {why}")


def _plan(
    grid: TokenGrid, method: Method, shape: ModelShape, model: str | None
) -> Plan | Estimate | PlanBySteps:
    check_tokens(grid)
    figures = None if model is None else shape
    method = method.on_model(figures).for_run(shape.variant, grid.alone, shape.steps)
    if method.differs_by_step:
        return _plan_by_steps(grid, method, shape, model)
    return _plan_fitted(grid, method.for_model(shape.variant, grid.alone), shape, model)


def _plan_by_steps(
    grid: TokenGrid, method: Method, shape: ModelShape, model: str | None
) -> PlanBySteps:
    if shape.steps is None:
        raise ValueError(
            f"{method.type} differs from step to step: give the number of steps of a run, steps="
        )
    in_run = method.in_run(shape.variant, grid.alone, shape.steps)
    # Costs by the identity of the method, which steps with equal values share.
    of_a_step = replace(shape, steps=None)
    costs = {id(m): _plan_fitted(grid, m, of_a_step, model) for m in in_run if m is not None}
    of_steps = tuple(None if m is None else costs[id(m)] for m in in_run)
    method = method.with_dense_ends(shape.variant, grid.alone)
    return PlanBySteps(
        method=method,
        **_of_any_method(grid, method, shape, model)
        | {
            "dense_layers": min((cost.dense_layers for cost in costs.values()), default=0),
            "dense_steps": of_steps.count(None),
        },
        of_steps=of_steps,
    )


def _plan_fitted(
    grid: TokenGrid, fitted: Method, shape: ModelShape, model: str | None
) -> Plan | Estimate:
    if not isinstance(fitted, StaticMaskMethod):
        return _estimate(grid, fitted, shape, model)
    extra_keys = fitted.extra_keys(grid)
    if extra_keys is None:
        raise ValueError(
            f"{fitted.type} with these parameters does more than attend under its mask, and that is"
            f" not counted here"
        )
    order = fitted.order(grid)
    layout = fitted.layout(grid, torch.device("cpu"), order)
    masked = has_masked_blocks(layout, fitted.spans(grid))
    best = None
    if isinstance(fitted, GNAAttn):
        best = nearest_on(fitted, grid) if masked else fitted
    with_text = ~in_one_of(layout.block_q, fitted.spans(grid)[:1])
    visited = (layout.full_count + layout.partial_count)[0, 0]
    video_rows = visited if bool(with_text.all()) else visited[~with_text]
    return Plan(
        method=fitted,
        **_of_any_method(grid, fitted, shape, model),
        density=allowed_pairs(layout) / grid.tokens**2,
        extra_keys=extra_keys,
        block_size=layout.block_q,
        # Where only references are tiled, the order's own tile is one token.
        tile=None if order is None or order.tile == (1, 1, 1) else order.tile,
        blocks=layout.rows * layout.columns,
        full_blocks=layout.full_blocks,
        partial_blocks=layout.partial_blocks,
        worst_blocks=int(video_rows.max()),
        columns=layout.columns,
        layout_bytes=layout.nbytes,
        is_block_sparse=not masked,
        nearest_block_sparse=best,
    )


def _of_any_method(
    grid: TokenGrid, method: Method, shape: ModelShape, model: str | None
) -> dict[str, Any]:
    """The fields of `Cost`, except the method."""
    steps = shape.steps
    return {
        "model": model,
        "grid": grid,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "layers": len(shape.block_of_site),
        "dense_layers": sum(block < (method.dense_layers or 0) for block in shape.block_of_site),
        "steps": steps,
        "dense_steps": 0 if steps is None else _dense_steps(method, steps),
        "linear_flops": shape.linear_flops(grid.tokens),
    }


def _estimate(grid: TokenGrid, method: Method, shape: ModelShape, model: str | None) -> Estimate:
    sparse = [block for block in shape.block_of_site if block >= (method.dense_layers or 0)]
    # Layers of one kind cost the same.
    by_kind = {
        method.layer_kind(block): method.work(grid, block, shape.heads, shape.head_dim)
        for block in sparse
    }
    work = []
    for block in sparse:
        known = by_kind[method.layer_kind(block)]
        if known is None:
            raise ValueError(
                f"{method.type} has no mask that the grid alone decides: its token pairs depend on"
                f" what the tokens hold, and cannot be planned"
            )
        work.append(known)
    common = _of_any_method(grid, method, shape, model)
    return Estimate(method=method, **common, work=tuple(work))


def _dense_steps(method: Method, steps: int) -> int:
    """Number of steps that stay dense, at both ends of a run."""
    ends = (method.dense_steps or 0, method.last_dense_steps)
    return min(steps, sum(resolve_steps(end, steps) for end in ends))
