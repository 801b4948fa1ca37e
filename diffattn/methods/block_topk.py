"""BlockTopKAttn: the best key blocks of each query block, by pooled scores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from diffattn._checks import Allowed, check_fields, choice, is_whole, number
from diffattn.grid import TokenGrid
from diffattn.methods.base import Work
from diffattn.methods.selected_blocks import Pooled, SelectedBlocksMethod
from diffattn.routing.rules import kept_blocks, top
from diffattn.routing.scores import mean_scores, part_scores

_PARTS = (1, 2, 4, 8)
_ALLOWED = {
    "keep": number(above=0, at_most=1),
    "score": choice(("parts", "mean")),
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

    Attributes:
        keep: share of the blocks that each query block selects, beside those that it always sees.
            1 is dense attention.
        score: "parts" or "mean".
        parts: runs that a block is cut into for "parts": 1, 2, 4 or 8.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "block-topk"
    paper: ClassVar[str] = "SGLang SubBlock; SLA (arXiv 2509.24006)"

    keep: float = field(default=0.25, metadata={"help": "share of the blocks to select"})
    score: str = field(default="parts", metadata={"help": "parts (SubBlock) or mean"})
    parts: int = field(default=4, metadata={"help": "runs of a block whose means are scored"})

    def __post_init__(self) -> None:
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

    def choose(self, pooled: Pooled) -> torch.Tensor:
        if self.score == "mean":
            scores = mean_scores(pooled.query_means, pooled.key_means, pooled.scale)
        else:
            part = -(-self.block // self.parts)
            scores = part_scores(
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
        candidates = ~pooled.always.pairs
        there = pooled.holds_any
        if there is not None:
            candidates = candidates & there[:, None, None]
            # No query of such a block counts, and a score of -inf would rank nothing.
            scores = scores.nan_to_num(0, neginf=0)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        # Rows of one span have as many candidates, up to neighbours that they see anyway.
        for count in pooled.always.counts:
            best = top(scores, kept_blocks(self.keep, count), candidates)
            chosen |= best & (pooled.always.candidates == count)[:, None]
        return chosen

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work:
        channels = heads * head_dim
        always = self._always(grid, torch.device("cpu"))
        kept = sum(kept_blocks(self.keep, n) for n in always.candidates.tolist() if n)
        density = (int(always.pairs.sum()) + kept) / always.pairs.numel()
        selection = self._pooling_flops(grid, channels)
        if self.score == "parts":
            selection *= self.parts**2
        return Work(
            flops=4 * density * grid.tokens**2 * channels
            + selection
            + self._summary_flops(grid, channels),
            density=density,
            selection_flops=selection,
            is_exact=False,
        )
