"""SolAttn: blocks above a threshold exactly, all others by their means (arXiv 2607.24027)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from diffattn._checks import check_fields, choice, number
from diffattn.grid import TokenGrid
from diffattn.methods.base import Work
from diffattn.methods.selected_blocks import REMAINDER_HELP, SelectedBlocksMethod
from diffattn.routing.keep import AboveMean
from diffattn.routing.pooled import Pooled
from diffattn.routing.scores import mean_scores

_ALLOWED = {"tau": number(), "variance": choice(("diagonal", "exact"))}
_DENSE_STEPS = 0.2
_DENSE_LAYERS = 1


@dataclass(frozen=True, kw_only=True)
class SolAttn(SelectedBlocksMethod):
    """Sol-Attn (arXiv 2607.24027): no token is dropped, and no training is needed.

    Tokens are put along a Morton curve and cut into blocks of 64. The score of a pair of blocks is
    the product of their mean query and mean key. A query block attends token by token to the blocks
    whose score is more than `tau` standard deviations above the mean of its row, to its neighbours,
    and to blocks with text. Every other block enters the same softmax as one key, its mean, with
    the weight of its tokens. Scores of models are nearly normally distributed: a `tau` of 0.5,
    1, 1.3 and 2 keeps some 31, 16, 10 and 2 % of the blocks.

    The public code leaves rows of text tokens to the rule; here text sees everything, as under
    every method.

    Attributes:
        tau: standard deviations above the mean score. Lower keeps more blocks.
        variance: "diagonal" for an estimate of the variance by channels, as published, or "exact".

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "sol"
    paper: ClassVar[str] = "arXiv 2607.24027"
    most_dense_layers: ClassVar[int] = _DENSE_LAYERS

    tau: float = field(
        default=1.0, metadata={"help": "standard deviations above the mean; lower keeps more"}
    )
    variance: str = field(default="diagonal", metadata={"help": "diagonal or exact"})
    neighbours: int = field(
        default=1, metadata={"help": "blocks beside its own that a query block always sees"}
    )
    remainder: str = field(default="summary", metadata={"help": REMAINDER_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _ALLOWED)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with a fifth of the steps and the first block dense, as recommended."""
        return replace(
            self,
            dense_layers=_DENSE_LAYERS if self.dense_layers is None else self.dense_layers,
            dense_steps=_DENSE_STEPS if self.dense_steps is None else self.dense_steps,
        )

    def choose(self, pooled: Pooled) -> torch.Tensor:
        scores = mean_scores(pooled.query_means, pooled.key_means, pooled.scale)
        return self._rule(scores, pooled)

    @property
    def _rule(self) -> AboveMean:
        return AboveMean(self.tau, self.variance)

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work | None:
        channels = heads * head_dim
        return self._work(grid, channels, self._rule, self._pooling_flops(grid, channels))
