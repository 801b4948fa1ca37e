"""SLA: softmax attention to the best blocks, linear attention to others, added up.

Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear
Attention", arXiv 2509.24006. The weights of TurboDiffusion (arXiv 2512.16093) are for this method.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from diffattn._checks import check_fields, choice, number
from diffattn.grid import TokenGrid
from diffattn.kernels.autocast import autocast_off
from diffattn.methods.base import Work
from diffattn.methods.sla.base import Others, SparseLinearMethod
from diffattn.methods.sla.linear import (
    FEATURES,
    linear_over_all,
    linear_over_blocks,
    takes_kernels,
)
from diffattn.methods.sla.weights import SLAWeights
from diffattn.routing.rules import top
from diffattn.routing.scores import mean_scores

_ALLOWED = {
    "linear": choice(("all", "rest")),
    "drop": number(at_least=0, below=1),
    "features": choice(tuple(FEATURES)),
}
# Added to the denominator where linear attention is over all blocks, as in the public code.
_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class SLAAttn(SparseLinearMethod):
    """SLA, sparse-linear attention (arXiv 2509.24006), which must be trained.

    Video tokens are cut, in the order of the model, into query blocks and key blocks. The score of
    a pair of blocks is the product of their mean query and mean key. Each query block attends by
    softmax to its best key blocks, the critical ones. In addition, linear attention over many
    blocks passes through a trained layer of each attention site, `proj_l`, the same for all heads.
    The two outputs are added. The layer begins as 0: before training, the site computes block top-k
    attention, and all other blocks are lost.

    With `linear="all"` linear attention is over all blocks, the critical ones among them. That is
    the form of published weights, see `load_sla_checkpoint`. With `linear="rest"` it is over the
    blocks that are not critical, the marginal ones. With `drop`, the lowest blocks of each row, the
    negligible ones, are left out of both, as in the paper. Weights of one form do not fit another.

    Text sees everything by softmax. Video tokens see text in the same softmax as their critical
    blocks. Linear attention is from video to video.

    Attributes:
        keep: share of the key blocks that are critical, rounded down, and at least one block.
        linear: "all" or "rest", the blocks of linear attention.
        drop: share of the key blocks that are negligible, rounded down, with `linear="rest"`. The
            paper has keep=0.05 and drop=0.1.
        features: features of linear attention: "softmax" over the channels, "elu" or "relu".
        block_q, block_kv: tokens per query block and per key block: 16, 32, 64, 128 or 256.
            Published weights were trained with 64 x 64; their authors' inference has 128 x 64.
        references: with "exact" and "visible" references are treated as text is. With "local" the
            tokens of references are cut into blocks with those of the video.

    Raises:
        ValueError: for a parameter out of range, `drop` with `linear="all"`, and if `keep` and
            `drop` leave no block to be marginal.
    """

    type: ClassVar[str] = "sla"
    paper: ClassVar[str] = "arXiv 2509.24006"

    linear: str = field(default="all", metadata={"help": "blocks of linear attention: all or rest"})
    drop: float = field(
        default=0.0, metadata={"help": "share of the blocks that are left out, with linear=rest"}
    )
    features: str = field(default="softmax", metadata={"help": "softmax, elu or relu"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _ALLOWED)
        if self.drop and self.linear == "all":
            raise ValueError(
                f"drop is {self.drop}, but linear='all' leaves no block out; pass linear='rest', or"
                f" leave drop out"
            )
        if self.drop and self.keep + self.drop >= 1:
            raise ValueError(
                f"keep is {self.keep} and drop {self.drop}, which leaves no block for linear"
                f" attention; their sum must be below 1"
            )

    def site_weights(self, module: torch.nn.Module, joint: bool) -> SLAWeights:
        return SLAWeights(module)

    def caution(self, grid: TokenGrid) -> str:
        return (
            f"without trained weights only {self.keep:.0%} of the blocks are seen, and all else is"
            f" lost: the paper measures 41 of 77 points of quality before training"
        )

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work:
        division, channels = self._division(grid), heads * head_dim
        video, others = division.tokens, division.others
        rows, columns = -(-video // self.block_q), -(-video // self.block_kv)
        seen = min(video, self._critical(columns) * self.block_kv)
        pairs = video * seen + video * others + others * grid.tokens
        selection = 2 * video * channels + 2 * rows * columns * channels
        linear = 6 * video * channels * head_dim
        if self.linear == "rest":
            linear += 2 * rows * columns * channels * head_dim
        return Work(
            flops=4 * pairs * channels + selection + linear,
            density=pairs / grid.tokens**2,
            selection_flops=selection,
            # A short last block may be critical or not.
            is_exact=seen == video or video % self.block_kv == 0,
        )

    def critical(
        self, query: torch.Tensor, key: torch.Tensor, counted: torch.Tensor | None, weights: Any
    ) -> torch.Tensor:
        scores, candidates = self._scores(query, key, counted)
        return top(scores, self._critical(scores.shape[-1]), candidates)

    def _attend_by_heads(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        others: Others | None,
        counted: torch.Tensor | None,
        heads: slice,
        weights: Any,
        scale: float | None,
    ) -> torch.Tensor:
        scores, candidates = self._scores(query, key, counted)
        critical = top(scores, self._critical(scores.shape[-1]), candidates)
        out = self._softmax_branch(query, key, value, critical, counted, others, heads, scale)
        if self.linear == "all":
            linear = linear_over_all(
                query, key, value, features=self.features, eps=_EPS, counted=counted
            )
        else:
            linear = linear_over_blocks(
                query,
                key,
                value,
                self._marginal(scores, critical, candidates),
                block_q=self.block_q,
                block_kv=self.block_kv,
                features=self.features,
                counted=counted,
            )
        added = weights.project(linear, out.dtype)
        return (out.to(linear.dtype) + added).to(out.dtype)

    def _states(self, rows: int, columns: int) -> int:
        return rows + columns if self.linear == "rest" else 1

    def _floats_per_channel(self, query: torch.Tensor) -> int:
        is_lean = self.linear == "all" and takes_kernels(query)
        return 2 if is_lean else super()._floats_per_channel(query)

    @torch.no_grad()
    def _scores(
        self, query: torch.Tensor, key: torch.Tensor, counted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The scores of the pairs of blocks, and which pairs count; None if all do."""
        tokens, device = query.shape[1], query.device
        tiles, blocks = (self._cut(tokens, b, device) for b in (self.block_q, self.block_kv))
        # In an autocast region the scores would be in half precision.
        with autocast_off(device.type):
            of_keys = blocks.means(key, counted)
            # A vector taken off all keys changes no ranking, but leaves less to round.
            of_keys = of_keys - of_keys.mean(1, keepdim=True)
            scores = mean_scores(tiles.means(query, counted), of_keys, 1.0)
        if counted is None:
            return scores, None
        return scores, blocks.holds_any(counted)[:, None, None]

    @torch.no_grad()
    def _marginal(
        self, scores: torch.Tensor, critical: torch.Tensor, candidates: torch.Tensor | None
    ) -> torch.Tensor:
        """The blocks of linear attention, bool in the shape of the scores."""
        marginal = ~critical if candidates is None else candidates & ~critical
        negligible = int(self.drop * scores.shape[-1])
        return marginal & ~top(-scores, negligible, marginal) if negligible else marginal
