"""SLA2: a learnt router selects blocks for softmax, and a learnt share mixes linear attention in.

Zhang et al., "SLA2", arXiv 2602.12675. There is no public code, and there are no public weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from diffattn._checks import check_fields, choice, count, number
from diffattn.grid import TokenGrid
from diffattn.kernels.autocast import autocast_off
from diffattn.methods.base import Work
from diffattn.methods.sla.base import Others, SparseLinearMethod
from diffattn.methods.sla.linear import linear_over_blocks
from diffattn.methods.sla.soft import soft_attention, soft_top
from diffattn.methods.sla.weights import SLA2Weights
from diffattn.routing.rules import top
from diffattn.selected.key_blocks import KeyBlocks

_ALLOWED = {
    "selecting": choice(("hard", "soft")),
    "tau": number(above=0),
    "positions": count(1),
}


@dataclass(frozen=True)
class _Routed:
    """What the router says of a call.

    Attributes:
        scores: (batch, heads, query blocks, key blocks).
        candidates: bool (batch, 1, 1, key blocks), whether any token of a block counts.
        alpha: (heads of the site, query blocks), the share of softmax attention.
        centre: (batch, 1, heads, head_dim), the mean key.
    """

    scores: torch.Tensor
    candidates: torch.Tensor
    alpha: torch.Tensor
    centre: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SLA2Attn(SparseLinearMethod):
    """SLA2, sparse-linear attention with a learnt router (arXiv 2602.12675), which must be trained.

    The score of a query block and a key block is the product of their mean query and mean key, each
    multiplied by a learnt matrix, the router. Each query block attends by softmax to its best key
    blocks. Linear attention is over all other blocks, with keys that the mean key is taken off. The
    output is alpha of the former and 1 - alpha of the latter, with a learnt alpha for each head.
    Where no other block is left, the output is the softmax attention alone.

    The router begins as the selection of SLA, and alpha at 0.9. No weights are published. The paper
    trains in two stages: `selecting="soft"` trains the router and alpha alone, on the output of the
    dense model's attention; `selecting="hard"` then trains alpha and the model, with the router as
    it is. `save_sla_checkpoint` and `load_sla_checkpoint` write and read the weights.

    Text sees everything by softmax. Video tokens see text in the same softmax as their best blocks.
    Linear attention is from video to video. Context parallelism is refused: alpha is of all heads.

    Attributes:
        keep: share of the key blocks that softmax sees, rounded down, and at least one block.
        selecting: "hard" for the best blocks alone. "soft" gives each pair of blocks a weight, so
            that gradients reach the router; it computes all token pairs, and is for training.
        tau: temperature of the weights, for "soft"; the smaller, the nearer they are to "hard".
        positions: places of the sequence with an alpha of their own, at even distances; query
            blocks between them take values between. The paper has one for each query block.
        block_q, block_kv: tokens per query block and per key block: 16, 32, 64, 128 or 256.
        references: with "exact" and "visible" references are treated as text is. With "local" the
            tokens of references are cut into blocks with those of the video.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "sla2"
    paper: ClassVar[str] = "arXiv 2602.12675"
    same_in_every_step: ClassVar[frozenset[str]] = frozenset(("positions", "selecting"))

    keep: float = field(default=0.05, metadata={"help": "share of the blocks seen by softmax"})
    selecting: str = field(
        default="hard", metadata={"help": "hard, or soft to train the router through"}
    )
    tau: float = field(default=0.1, metadata={"help": "temperature of a soft selection"})
    positions: int = field(
        default=1, metadata={"help": "places of the sequence with an alpha of their own"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _ALLOWED)

    def site_weights(self, module: torch.nn.Module, joint: bool) -> SLA2Weights:
        return SLA2Weights(module, self.positions, trains_router=self.selecting == "soft")

    def caution(self, grid: TokenGrid) -> str:
        return (
            f"without trained weights softmax sees {self.keep:.0%} of the blocks, by a router that"
            f" has learnt nothing, and the shares of the two attentions are guesses"
        )

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work:
        division, channels = self._division(grid), heads * head_dim
        video, others = division.tokens, division.others
        rows, columns = -(-video // self.block_q), -(-video // self.block_kv)
        seen = video if self.selecting == "soft" else self._critical(columns) * self.block_kv
        seen = min(video, seen)
        pairs = video * seen + video * others + others * grid.tokens
        selection = 2 * video * channels + 2 * rows * columns * channels
        selection += 2 * (rows + columns) * channels * head_dim
        linear = 4 * video * channels * head_dim + 2 * rows * columns * channels * head_dim
        return Work(
            flops=4 * pairs * channels + selection + linear,
            density=pairs / grid.tokens**2,
            selection_flops=selection,
            # A short last block may be among the best or not.
            is_exact=seen == video or video % self.block_kv == 0,
        )

    @torch.no_grad()
    def critical(
        self, query: torch.Tensor, key: torch.Tensor, counted: torch.Tensor | None, weights: Any
    ) -> torch.Tensor:
        return self._hard(self._route(query, key, counted, weights))

    def _attend_in_video(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        others: Others | None,
        counted: torch.Tensor | None,
        weights: Any,
        scale: float | None,
    ) -> torch.Tensor:
        heads = weights.alpha_logits.shape[0]
        if query.shape[2] != heads:
            raise NotImplementedError(
                f"sla2 has an alpha for each of the {heads} heads of its site, but this call has"
                f" {query.shape[2]} heads, as with Ulysses: use SLAAttn, or no context parallelism"
            )
        return super()._attend_in_video(query, key, value, others, counted, weights, scale)

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
        routed = self._route(query, key, counted, weights)
        of_softmax: torch.Tensor
        if self.selecting == "soft":
            logits = self._soft(routed)
            of_softmax = self._soft_branch(query, key, value, logits, counted, others, heads, scale)
            rest = (-logits).sigmoid()
        else:
            best = self._hard(routed)
            of_softmax = self._softmax_branch(
                query, key, value, best, counted, others, heads, scale
            )
            rest = routed.candidates & ~best
        tokens = query.shape[1]
        with autocast_off(query.device.type):
            centre = routed.centre
            of_linear = linear_over_blocks(
                query,
                key.to(centre.dtype) - centre,
                value,
                rest,
                block_q=self.block_q,
                block_kv=self.block_kv,
                features="softmax",
                counted=counted,
            )
            alpha = self._alpha(routed, heads, tokens)
            out: torch.Tensor = of_linear.lerp(of_softmax.to(of_linear.dtype), alpha)
        return out.to(query.dtype)

    def _route(
        self, query: torch.Tensor, key: torch.Tensor, counted: torch.Tensor | None, weights: Any
    ) -> _Routed:
        tokens, device = query.shape[1], query.device
        tiles, blocks = (self._cut(tokens, b, device) for b in (self.block_q, self.block_kv))
        # In an autocast region the scores would be in half precision.
        with autocast_off(device.type):
            of_keys = blocks.means(key, counted)
            centre = _centre(of_keys, blocks, counted)
            of_keys = of_keys - centre
            of_queries = tiles.means(query, counted)
            of_queries, of_keys, alpha = weights(of_queries, of_keys)
            scores = of_queries.transpose(1, 2) @ of_keys.permute(0, 2, 3, 1)
        if counted is None:
            candidates = torch.ones_like(scores[:1, :1, :1], dtype=torch.bool)
        else:
            candidates = blocks.holds_any(counted)[:, None, None]
        return _Routed(scores, candidates, alpha, centre)

    def _hard(self, routed: _Routed) -> torch.Tensor:
        return top(routed.scores, self._critical(routed.scores.shape[-1]), routed.candidates)

    def _soft(self, routed: _Routed) -> torch.Tensor:
        """The logits of the weights of all pairs of blocks."""
        return soft_top(routed.scores, self._kept(routed), self.tau, routed.candidates)

    def _kept(self, routed: _Routed) -> float:
        """The sum of the weights of a row."""
        columns = routed.scores.shape[-1]
        return max(1, self.keep * columns) if self.selecting == "soft" else self._critical(columns)

    def _soft_branch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        logits: torch.Tensor,
        counted: torch.Tensor | None,
        others: Others | None,
        heads: slice,
        scale: float | None,
    ) -> torch.Tensor:
        log_weights = F.logsigmoid(logits)
        if others is not None:
            whole = -query.shape[1] % self.block_kv
            # Keys beside the video come after the last whole block, with the weight 1.
            key, value = (F.pad(x, (0, 0, 0, 0, 0, whole)) for x in (key, value))
            there = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
            beside = others.counted
            if beside is None:
                beside = there.new_ones(query.shape[0], others.key.shape[1])
            counted = torch.cat(
                [F.pad(there if counted is None else counted, (0, whole)), beside], 1
            )
            key = torch.cat([key, others.key[:, :, heads]], 1)
            value = torch.cat([value, others.value[:, :, heads]], 1)
        out: torch.Tensor = soft_attention(
            query,
            key,
            value,
            log_weights,
            block_q=self.block_q,
            block_kv=self.block_kv,
            scale=scale,
            counted=counted,
        )
        return out

    def _alpha(self, routed: _Routed, heads: slice, tokens: int) -> torch.Tensor:
        """The share of softmax attention, (batch or 1, tokens, heads, 1)."""
        alpha = routed.alpha[heads]
        # Where softmax sees every block, no block is left to linear attention.
        all_seen = routed.candidates.sum(-1, keepdim=True) <= self._kept(routed)
        alpha = alpha[None].masked_fill(all_seen[..., 0], 1)  # (batch or 1, heads, query blocks)
        return alpha.mT.repeat_interleave(self.block_q, 1)[:, :tokens, :, None]

    def _states(self, rows: int, columns: int) -> int:
        return rows + columns


def _centre(of_keys: torch.Tensor, blocks: KeyBlocks, counted: torch.Tensor | None) -> torch.Tensor:
    """The mean key, (batch, 1, heads, head_dim), from the means of blocks."""
    sizes = blocks.sizes[None].to(of_keys.dtype)
    if counted is not None:
        # The shares of the blocks' tokens that count.
        sizes = sizes * blocks.means(counted[:, :, None, None].to(of_keys.dtype))[:, :, 0, 0]
    weights = sizes / sizes.sum(1, keepdim=True).clamp(min=1)
    return (of_keys * weights[:, :, None, None]).sum(1, keepdim=True)
