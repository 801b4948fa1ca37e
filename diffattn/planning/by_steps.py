"""The cost of a method that differs from step to step, over a whole run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffattn.planning.costs import Cost, Estimate

if TYPE_CHECKING:
    from diffattn.planning.plans import Plan


@dataclass(frozen=True, kw_only=True, repr=False)
class PlanBySteps(Cost):
    """The cost of a method that differs from step to step: means over the steps of a run.

    Attributes:
        of_steps: the cost of the method of each step, a `Plan` or an `Estimate`; None for a dense
            step.
    """

    of_steps: tuple[Plan | Estimate | None, ...]

    @property
    def densities(self) -> tuple[float | None, ...]:
        """Share of the token pairs that attend in each step; 1 in a dense step."""
        return tuple(1.0 if cost is None else cost.density for cost in self.of_steps)

    @property
    def density(self) -> float | None:
        """Mean share of the token pairs that attend, dense steps included; None if not known."""
        known = [density for density in self.densities if density is not None]
        return sum(known) / len(known) if len(known) == len(self.of_steps) else None

    @property
    def is_exact(self) -> bool:
        """Whether the figures hold for all data."""
        return all(cost.is_exact for cost in self.of_steps if isinstance(cost, Estimate))

    @property
    def sparse_flops(self) -> float:
        """FLOPs of one layer's attention, on average over sparse steps and layers."""
        return self._mean([cost.sparse_flops for cost in self._sparse], self.dense_flops)

    @property
    def sparse_forward_flops(self) -> float:
        """FLOPs of the attention of all layers, on average over the sparse steps."""
        return self._mean(
            [cost.sparse_forward_flops for cost in self._sparse], self.dense_forward_flops
        )

    @property
    def attention_speedup(self) -> float:
        """Upper bound of the speed-up of sparse attention, on average over the sparse steps."""
        return self.dense_flops / self.sparse_flops

    @property
    def _sparse(self) -> list[Plan | Estimate]:
        return [cost for cost in self.of_steps if cost is not None]

    def _mean(self, values: list[float], without: float) -> float:
        return sum(values) / len(values) if values else without

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "model": self.model,
            "method": self.method.to_dict(),
            "grid": self.grid_sizes,
            "densities": list(self.densities),
            **{name: getattr(self, name) for name in _FIGURES},
        }

    def words(self) -> str:
        """The shares of the steps in order, with how often each comes."""
        said = [
            "dense"
            if cost is None
            else "unknown"
            if cost.density is None
            else f"{cost.density:.1%}"
            for cost in self.of_steps
        ]
        runs = [(word, len(list(equal))) for word, equal in itertools.groupby(said)]
        return ", ".join(word if many == 1 else f"{word} x{many}" for word, many in runs)


_FIGURES = (
    "heads", "head_dim", "layers", "dense_layers", "steps", "dense_steps", "linear_flops", "tokens",
    "density", "is_exact", "dense_flops", "sparse_flops", "dense_forward_flops",
    "sparse_forward_flops", "run_density", "attention_speedup", "attention_share", "model_speedup",
)  # fmt: skip
