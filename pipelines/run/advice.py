"""What a run says before it starts: the cost of attention, and quality that may be lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffattn.attach import Description
    from diffattn.planning.by_steps import PlanBySteps
    from diffattn.planning.costs import Estimate

    from .sizing import Run

# A method whose mask holds more of the pairs than this is dense attention under another name.
_NEARLY_ALL = 0.95


def estimated_cost(pipe: Any, run: Run) -> Estimate | PlanBySteps | None:
    """The cost of a method that is no mask; None for a mask, and where the cost is not known.

    The cost of a method that differs from step to step is given in any case.
    """
    import diffattn

    request = run.request
    size = {"height": request.height, "width": request.width, "num_frames": request.num_frames}
    # Where the prompt decides how much text there is, the video alone is counted.
    for tokens in (size, {"grid": run.grid}):
        try:
            found = diffattn.plan(pipe, run.method, steps=request.steps, **tokens)
        except ValueError:
            continue
        return None if isinstance(found, diffattn.Plan) else found
    return None


def cost_words(cost: Estimate | PlanBySteps) -> str:
    """The cost in words, for the line that describes the method."""
    import diffattn

    if isinstance(cost, diffattn.PlanBySteps):
        return (
            f"token pairs by step: {cost.words()}; {cost.run_density:.1%} of dense attention's"
            f" FLOPs over the run"
        )
    pairs = ""
    if cost.density is not None:
        pairs = f"{'' if cost.is_exact else 'about '}{cost.density:.1%} of the token pairs attend, "
    share = cost.sparse_flops / cost.dense_flops
    return (
        f"{pairs}{share:.1%} of dense attention's FLOPs in a sparse call,"
        f" {cost.run_density:.1%} over the run"
    )


def cautions(run: Run, said: Description) -> Iterator[str]:
    """Warnings of a method that loses quality, or saves nothing, in this run.

    Args:
        run: the run.
        said: the description of the attachment.
    """
    trained = run.record is not None and run.record.method["type"] == run.method.type
    loss = None if trained else said.method.caution(run.grid)
    if loss is not None:
        yield (
            f"{run.method.type}: {loss}; train the model for the method"
            f" (`diffattn lora train --attn {run.method.type}`, then --lora), or choose another"
            f" method"
        )
    if run.method.type != "dense" and said.density is not None and said.density >= _NEARLY_ALL:
        yield (
            f"{run.method.type} attends to {said.density:.1%} of the token pairs of {run.grid}:"
            f" nothing is saved on a grid this small; give a smaller window by --attn-arg, or a"
            f" larger size"
        )
