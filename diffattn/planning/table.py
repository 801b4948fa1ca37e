"""Plans and estimates in words: one line, and the rows of a table."""

from __future__ import annotations

from collections.abc import Iterator

from diffattn.methods.gna import GNAAttn
from diffattn.methods.words import method_words, reference_words
from diffattn.planning.block_sparse import nearest_beside
from diffattn.planning.by_steps import PlanBySteps
from diffattn.planning.costs import Cost, Estimate
from diffattn.planning.plans import Plan


def headline(plan: Cost) -> str:
    """What a plan says, in one line."""
    density = plan.density if isinstance(plan, Plan | Estimate | PlanBySteps) else None
    share = "" if density is None else f"{density:.1%} of the token pairs, "
    model = "" if plan.model is None else f"{plan.model}, "
    return (
        f"{plan.method.type} on {model}{plan.grid}: {share}at most {plan.attention_speedup:.2f}x as"
        f" fast as dense attention"
    )


def rows(plan: Cost) -> Iterator[tuple[str, str]]:
    """The names and the values of the table of a plan."""
    yield "method", method_words(plan.method)
    if plan.model is not None:
        yield "model", plan.model
    yield "grid", f"{plan.grid}, {plan.tokens:,} tokens"
    if plan.grid.references:
        yield "references", reference_words(plan.method, plan.grid)
    yield "attention", f"{plan.layers} layers of {plan.heads} heads of {plan.head_dim}"
    if isinstance(plan, Plan):
        yield from _block_rows(plan)
    elif isinstance(plan, Estimate):
        yield from _estimated_rows(plan)
    elif isinstance(plan, PlanBySteps):
        if plan.density is not None:
            kind = "" if plan.is_exact else ", an estimate: what attends depends on the data"
            yield "token density", f"{plan.density:.2%} on average over the steps{kind}"
        yield "by step", plan.words()
    yield (
        "FLOPs of a layer",
        f"{_flops(plan.dense_flops)} dense, {_flops(plan.sparse_flops)} sparse",
    )
    yield (
        "FLOPs of a forward",
        f"{_flops(plan.dense_forward_flops)} dense, {_flops(plan.sparse_forward_flops)} sparse"
        f" ({plan.dense_layers} of {plan.layers} layers stay dense)",
    )
    if plan.linear_flops is not None and plan.attention_share is not None:
        yield (
            "other layers",
            f"{_flops(plan.linear_flops)}; attention is {plan.attention_share:.1%} of the time",
        )
    if plan.steps is not None:
        yield "dense steps", f"{plan.dense_steps} of {plan.steps}"
        yield "attention of a run", f"{plan.run_density:.1%} of dense"
    by_tokens = f" ({plan.flop_speedup:.2f}x by tokens)" if isinstance(plan, Plan) else ""
    yield (
        "speed-up at most",
        f"{plan.attention_speedup:.2f}x of a sparse attention{by_tokens}"
        + ("" if plan.model_speedup is None else f", {plan.model_speedup:.2f}x of the whole model"),
    )


def _estimated_rows(plan: Estimate) -> Iterator[tuple[str, str]]:
    """Rows of a method that has no mask."""
    if plan.density is not None:
        kind = "exact" if plan.is_exact else "an estimate: what attends depends on the data"
        yield "token density", f"{plan.density:.2%} on average over the layers, {kind}"
    if plan.selection_flops:
        yield (
            "selection",
            f"{_flops(plan.selection_flops)} of a layer's FLOPs decide what attends",
        )


def _block_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Rows of a mask and of the blocks that the mask visits."""
    yield "token density", f"{plan.density:.2%}"
    if plan.extra_keys:
        yield (
            "pooled keys",
            f"{plan.extra_keys:,} more for every token but those of text:"
            f" {plan.extra_share:.2%} as many pairs",
        )
    tiles = "" if plan.tile is None else f" ({'x'.join(map(str, plan.tile))} tiles)"
    yield "blocks", f"{plan.blocks:,} of {plan.block_size} tokens{tiles}"
    yield (
        "visited blocks",
        f"{plan.visited_blocks:,} ({plan.block_density:.2%}):"
        f" {plan.full_blocks:,} full, {plan.partial_blocks:,} partial",
    )
    yield "worst query block", f"visits {plan.worst_blocks:,} of {plan.columns:,} key blocks"
    yield "layout", f"{plan.layout_bytes / 2**10:,.0f} KiB"
    yield "block-sparse", _block_sparse(plan)


def _block_sparse(plan: Plan) -> str:
    if plan.is_block_sparse:
        but = " but those with text or at the end" if plan.partial_blocks else ""
        return f"yes: no block needs a mask{but}"
    if not isinstance(plan.method, GNAAttn):
        return "no"
    best = plan.nearest_block_sparse
    if best is not None:
        return f"no; the nearest setting that is: {_setting(best)}"
    only = f"no; in whole tiles of {plan.grid} only dense attention is"
    beside = nearest_beside(plan.method, plan.grid)
    return only if beside is None else f"{only}; on {beside[0]} {_setting(beside[1])} is"


def _setting(method: GNAAttn) -> str:
    """The window and the stride as the command line takes them."""
    return " ".join(
        f"{name}={','.join(map(str, getattr(method, name)))}" for name in ("window", "stride")
    )


def _flops(count: float) -> str:
    """A number of FLOPs with its unit."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.4g} {unit}FLOP"
    return f"{count:.4g} FLOP"
