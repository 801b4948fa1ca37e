"""Costs: what is reckoned alike for every method, and estimates where the data decide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.methods.base import Method, Work

# TFLOP/s of an H200 in bfloat16, measured: large matrix products, and cuDNN's dense attention. Only
# their ratio counts here: attention's share of the time is larger than its share of the FLOPs.
_LINEAR_RATE, _ATTENTION_RATE = 790, 690


@dataclass(frozen=True, kw_only=True)
class Cost(ABC):
    """What attention by a method costs, against dense attention.

    FLOPs are those of a forward on one sample: a multiplication and an addition are two, softmax is
    not counted, and classifier-free guidance makes two forwards a step. Speed-ups are upper bounds:
    they take a sparse attention to be as fast at its work as a dense one, and everything but
    attention and the linear layers to cost nothing.

    Attributes:
        model: what was planned for; None for a bare grid.
        method: the method with its parameters as they are used here.
        grid: the tokens of an attention call, text included.
        heads, head_dim: of the attention.
        layers: attention calls of a forward.
        dense_layers: those of them that stay dense.
        steps: denoising steps of a run; None where not given.
        dense_steps: those of them that stay dense; 0 where `steps` is not given.
        linear_flops: FLOPs of a forward outside self-attention; None where they are not known.
    """

    model: str | None
    method: Method
    grid: TokenGrid
    heads: int
    head_dim: int
    layers: int
    dense_layers: int
    steps: int | None
    dense_steps: int
    linear_flops: int | None

    @property
    def tokens(self) -> int:
        """Length of the sequence, text included."""
        return self.grid.tokens

    @property
    def dense_flops(self) -> int:
        """FLOPs of one layer's dense attention."""
        return 4 * self.tokens**2 * self.heads * self.head_dim

    @property
    def dense_forward_flops(self) -> int:
        """FLOPs of the dense attention of all layers."""
        return self.dense_flops * self.layers

    @property
    @abstractmethod
    def sparse_forward_flops(self) -> float:
        """FLOPs of the attention of all layers in a sparse step, those that stay dense included."""

    @property
    def run_density(self) -> float:
        """Attention FLOPs of a run, dense layers and steps included, relative to a dense run."""
        forward = self.sparse_forward_flops / self.dense_forward_flops
        if self.steps is None:
            return forward
        return (self.dense_steps + (self.steps - self.dense_steps) * forward) / self.steps

    @property
    def attention_share(self) -> float | None:
        """Attention's share of the time of a dense forward, at the rates of an H200."""
        if self.linear_flops is None:
            return None
        attention = self.dense_forward_flops / _ATTENTION_RATE
        return attention / (attention + self.linear_flops / _LINEAR_RATE)

    @property
    def model_speedup(self) -> float | None:
        """Bound of the speed-up of the whole denoiser over a run, by Amdahl's law.

        Dense layers are counted, and dense steps where `steps` is given.
        """
        share = self.attention_share
        return None if share is None else 1 / (1 - share * (1 - self.run_density))

    @property
    def grid_sizes(self) -> dict[str, int]:
        """The grid, ready for JSON."""
        return asdict(self.grid)


@dataclass(frozen=True, kw_only=True)
class Estimate(Cost):
    """The cost of a method whose work no mask tells: by its own reckoning, call by call.

    Attributes:
        work: of each attention call of a sparse forward that does not stay dense, in their order.
    """

    work: tuple[Work, ...]

    @property
    def density(self) -> float | None:
        """Share of the token pairs that attend in a sparse call, on average; None if none is."""
        found = [work.density for work in self.work if work.density is not None]
        return sum(found) / len(found) if found else None

    @property
    def is_exact(self) -> bool:
        """Is it what is computed, whatever the data are?"""
        return all(work.is_exact for work in self.work)

    @property
    def sparse_flops(self) -> float:
        """FLOPs of one layer's attention, on average over those that are not dense."""
        return sum(work.flops for work in self.work) / max(1, len(self.work))

    @property
    def selection_flops(self) -> float:
        """Those of them that decide what attends."""
        return sum(work.selection_flops for work in self.work) / max(1, len(self.work))

    @property
    def sparse_forward_flops(self) -> float:
        return self.dense_flops * self.dense_layers + sum(work.flops for work in self.work)

    @property
    def attention_speedup(self) -> float:
        """Bound of the speed-up of one sparse attention."""
        return self.dense_flops / self.sparse_flops if self.work else 1.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "model": self.model,
            "method": self.method.to_dict(),
            "grid": self.grid_sizes,
            **{name: getattr(self, name) for name in _FIGURES},
        }


_FIGURES = (
    "heads", "head_dim", "layers", "dense_layers", "steps", "dense_steps", "linear_flops", "tokens",
    "density", "is_exact", "dense_flops", "sparse_flops", "selection_flops", "dense_forward_flops",
    "sparse_forward_flops", "run_density", "attention_speedup", "attention_share", "model_speedup",
)  # fmt: skip
