"""Costs: the figures that all methods have in common, and estimates for methods without a mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.methods.attention_share import attention_share
from diffattn.methods.base import Method, Work
from diffattn.methods.words import as_table


@dataclass(frozen=True, kw_only=True, repr=False)
class Cost(ABC):
    """The cost of attention by a method, relative to dense attention.

    FLOPs are counted for a forward on one sample. A multiplication and an addition are two FLOPs;
    softmax is not counted. Classifier-free guidance makes two forwards a step. Speed-ups are upper
    bounds, by two assumptions: sparse attention reaches the FLOP rate of dense attention, and only
    attention and linear layers take time.

    Attributes:
        model: name of the model; None for a bare grid.
        method: the method with its parameters resolved.
        grid: the tokens of an attention call, text included.
        heads, head_dim: number of attention heads, and their dimension.
        layers: number of attention calls of a forward.
        dense_layers: number of attention calls of a forward that stay dense.
        steps: denoising steps of a run; None where not given.
        dense_steps: denoising steps that stay dense; 0 where `steps` is None.
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

    def __repr__(self) -> str:
        from diffattn.planning.table import headline  # imports this module

        return f"<{type(self).__name__}: {headline(self)}>"

    def __str__(self) -> str:
        from diffattn.planning.table import rows  # imports this module

        return as_table(list(rows(self)))

    @property
    @abstractmethod
    def attention_speedup(self) -> float:
        """Upper bound of the speed-up of one sparse attention."""

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
        """FLOPs of the attention of all layers in a sparse step, dense layers included."""

    @property
    @abstractmethod
    def sparse_flops(self) -> float:
        """FLOPs of one layer's attention, on average over the layers that are not dense."""

    @property
    def run_density(self) -> float:
        """Attention FLOPs of a run, dense layers and steps included, relative to a dense run."""
        forward = self.sparse_forward_flops / self.dense_forward_flops
        if self.steps is None:
            return forward
        return (self.dense_steps + (self.steps - self.dense_steps) * forward) / self.steps

    @property
    def attention_share(self) -> float | None:
        """Attention's share of the time of a dense forward, at the rates of an H200.

        None where `linear_flops` is None.
        """
        if self.linear_flops is None:
            return None
        return attention_share(self.dense_forward_flops, self.linear_flops)

    @property
    def model_speedup(self) -> float | None:
        """Upper bound of the speed-up of the whole denoiser over a run, by Amdahl's law.

        Dense layers count, and dense steps where `steps` is given. None where `linear_flops` is
        None.
        """
        share = self.attention_share
        return None if share is None else 1 / (1 - share * (1 - self.run_density))

    @property
    def grid_sizes(self) -> dict[str, Any]:
        """The grid, ready for JSON."""
        sizes = asdict(self.grid)
        if not self.grid.references:
            del sizes["references"]
        return sizes


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(Cost):
    """The cost of a method without a mask: the method itself states the work of each call.

    Attributes:
        work: the work of each attention call that does not stay dense, in the order of a forward.
    """

    work: tuple[Work, ...]

    @property
    def density(self) -> float | None:
        """Mean share of the token pairs that attend, over sparse calls; None if no call has one."""
        found = [work.density for work in self.work if work.density is not None]
        return sum(found) / len(found) if found else None

    @property
    def is_exact(self) -> bool:
        """Whether the figures hold for all data."""
        return all(work.is_exact for work in self.work)

    @property
    def sparse_flops(self) -> float:
        """FLOPs of one layer's attention, on average over the layers that are not dense."""
        return sum(work.flops for work in self.work) / max(1, len(self.work))

    @property
    def selection_flops(self) -> float:
        """FLOPs among `sparse_flops` that decide which tokens attend."""
        return sum(work.selection_flops for work in self.work) / max(1, len(self.work))

    @property
    def sparse_forward_flops(self) -> float:
        return self.dense_flops * self.dense_layers + sum(work.flops for work in self.work)

    @property
    def attention_speedup(self) -> float:
        """Upper bound of the speed-up of one sparse attention."""
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
