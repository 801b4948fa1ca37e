"""BlockTopKAttn: the best key blocks of each query block, by pooled scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from diffattn._checks import Allowed, check_fields, choice, is_whole, number
from diffattn.grid import TokenGrid
from diffattn.methods.base import Work
from diffattn.methods.selected_blocks import SelectedBlocksMethod
from diffattn.routing.keep import (
    Rule,
    Score,
    Share,
    Value,
    as_json,
    called,
    check_kept,
    check_scores,
    from_json,
)
from diffattn.routing.pooled import Pooled
from diffattn.routing.scores import mean_scores, part_scores

_PARTS = (1, 2, 4, 8)
_SCORE, _KEEP = choice(("parts", "mean")), number(above=0, at_most=1)


def _is_function(value: object) -> bool:
    # A class would be called, too, but makes an object instead of a tensor.
    return callable(value) and not isinstance(value, type)


_ALLOWED = {
    "keep": Allowed(
        f"{_KEEP.words}, or a rule: a function of scores and pooled tokens",
        lambda value: _KEEP.holds(value) or _is_function(value),
    ),
    "score": Allowed(
        f"{_SCORE.words}, or a function of pooled tokens",
        lambda value: _SCORE.holds(value) or _is_function(value),
    ),
    "parts": Allowed("1, 2, 4 or 8", lambda value: is_whole(value) and value in _PARTS),
}
_DENSE_STEPS = 0.2


@dataclass(frozen=True, kw_only=True)
class BlockTopKAttn(SelectedBlocksMethod):
    """Block top-k: each query block attends to a fixed share of the key blocks, the best ones.

    With `score="parts"` the score is that of SubBlock: blocks are cut into `parts` runs, and the
    score is the log-sum-exp over the products of the runs' means. That estimates the block's weight
    in the softmax. With `score="mean"` the score is the product of the blocks' means, as in the map
    of SLA. With `remainder="summary"` other blocks enter the softmax by their means.

    A score or a rule of one's own is a function (docs/your-own-method.md). `diffattn.routing` has
    rules: `Count(64)`, `Mass(0.9)` and `AboveMean(1.0)`. A method with a function cannot be
    written to JSON; a method with such a rule can.

    Attributes:
        keep: share of the blocks that each query block selects, beside those that it always sees.
            1 is dense attention. Or a rule: a function of the scores and the `Pooled` tokens, which
            returns the pairs to keep, bool in the shape of the scores.
        score: "parts", "mean", or a function of the `Pooled` tokens, which returns scores (batch,
            heads, query blocks, key blocks). -inf rules a pair out.
        parts: runs that a block is cut into for "parts": 1, 2, 4 or 8.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "block-topk"
    paper: ClassVar[str] = "SGLang SubBlock; SLA (arXiv 2509.24006)"

    keep: float | Rule = field(
        default=0.25, metadata={"help": "share of the blocks to select, or a rule"}
    )
    score: str | Score = field(default="parts", metadata={"help": "parts (SubBlock) or mean"})
    parts: int = field(default=4, metadata={"help": "runs of a block whose means are scored"})

    def __post_init__(self) -> None:
        if isinstance(self.keep, Mapping) and "rule" in self.keep:
            object.__setattr__(self, "keep", from_json(self.keep))
        super().__post_init__()
        check_fields(self, _ALLOWED)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the first fifth of the steps dense, as SubBlock recommends."""
        return replace(
            self,
            dense_layers=0 if self.dense_layers is None else self.dense_layers,
            dense_steps=_DENSE_STEPS if self.dense_steps is None else self.dense_steps,
        )

    @property
    def is_dense(self) -> bool:
        return self.keep == 1

    @property
    def _rule(self) -> Rule:
        return self.keep if callable(self.keep) else Share(self.keep)

    def scores(self, pooled: Pooled) -> torch.Tensor:
        """The scores of the pairs of blocks, (batch, heads, query blocks, key blocks)."""
        if callable(self.score):
            return self.score(pooled)
        if self.score == "mean":
            return mean_scores(pooled.query_means, pooled.key_means, pooled.scale)
        part = -(-self.block // self.parts)
        return part_scores(
            pooled.query,
            pooled.key,
            pooled.blocks,
            pooled.blocks,
            part_q=part,
            part_kv=part,
            scale=pooled.scale,
            counted_queries=pooled.counted,
            counted_keys=pooled.counted,
        )

    def keeps(self, scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
        """The pairs of blocks to keep, bool in the shape of the scores."""
        return self._rule(scores, pooled)

    def choose(self, pooled: Pooled) -> torch.Tensor:
        score = self.score if callable(self.score) else self.scores
        scores = check_scores(self.scores(pooled), score, pooled)
        rule = self.keep if callable(self.keep) else self.keeps
        return check_kept(self.keeps(scores, pooled), rule, pooled)

    def to_dict(self) -> dict[str, Any]:
        """Parameters and `type`, ready for JSON.

        Raises:
            ValueError: if the score or the rule is a function.
        """
        out = super().to_dict()
        if isinstance(self.keep, Value):
            out["keep"] = as_json(self.keep)
        for name in ("score", "keep"):
            if callable(out[name]):
                raise ValueError(
                    f"{called(name, out[name])}, which has no name that a file could give: write"
                    f" a method of your own that calls the function, and register that"
                    f" (docs/your-own-method.md)"
                )
        return out

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work | None:
        """The cost of a call; None if nothing is known about the rule.

        A score of one's own counts as one of means.
        """
        channels = heads * head_dim
        selection = self._pooling_flops(grid, channels)
        if self.score == "parts":
            selection *= self.parts**2
        rule = self._rule
        return self._work(grid, channels, rule, selection) if isinstance(rule, Value) else None
