"""SLA: softmax attention to the best blocks, linear attention to others, added up.

Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear
Attention", arXiv 2509.24006. The weights of TurboDiffusion (arXiv 2512.16093) are for this method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch

from diffattn._checks import Allowed, check_fields, choice, is_whole, number
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.interception import through_modes
from diffattn.kernels.autocast import autocast_off, cast_as_sdpa
from diffattn.masks.base import BLOCK, AttentionMask
from diffattn.methods.base import Compiled, Method, Site, Work
from diffattn.methods.selected_blocks import for_every_head
from diffattn.methods.sla.linear import FEATURES, linear_over_blocks
from diffattn.methods.sla.weights import SLAWeights
from diffattn.operator import add_keys, attention, every_pair
from diffattn.routing.lists import layout_of_blocks
from diffattn.routing.rules import top
from diffattn.routing.scores import mean_scores
from diffattn.selected.attention import SelectionMask
from diffattn.selected.key_blocks import KeyBlocks
from diffattn.spans import Division, Span, division_of, spans_of

# The blocks that the kernels of all devices have.
_BLOCKS = (16, 32, 64, 128, 256)
_BLOCK = Allowed("16, 32, 64, 128 or 256", lambda value: is_whole(value) and value in _BLOCKS)
_ALLOWED = {
    "keep": number(above=0, at_most=1),
    "linear": choice(("all", "rest")),
    "drop": number(at_least=0, below=1),
    "features": choice(tuple(FEATURES)),
    "block_q": _BLOCK,
    "block_kv": _BLOCK,
}
# Added to the denominator where linear attention is over all blocks, as in the public code.
_EPS = 1e-5
# Bytes of scores, lists and states in memory at a time; heads take turns where all would need more.
_BYTES_AT_ONCE = 1 << 30
_BYTES_PER_PAIR = 24


@dataclass(frozen=True)
class _Others:
    """Keys beside the video that every query sees, such as text.

    Attributes:
        key, value: (batch, keys, heads, head_dim).
        counted: bool (batch, keys), False for padding; None without padding.
        layout: the layout of all pairs of a video token and such a key.
    """

    key: torch.Tensor
    value: torch.Tensor
    counted: torch.Tensor | None
    layout: BlockLayout


@dataclass(frozen=True, kw_only=True)
class SLAAttn(Method):
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
    shared_between_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {"_cuts": (), "_every_pair": ()}

    keep: float = field(default=0.1, metadata={"help": "share of the blocks seen by softmax"})
    linear: str = field(default="all", metadata={"help": "blocks of linear attention: all or rest"})
    drop: float = field(
        default=0.0, metadata={"help": "share of the blocks that are left out, with linear=rest"}
    )
    features: str = field(default="softmax", metadata={"help": "softmax, elu or relu"})
    block_q: int = field(default=128, metadata={"help": "tokens per query block"})
    block_kv: int = field(default=64, metadata={"help": "tokens per key block"})
    _cuts: dict[tuple[int, int, torch.device], KeyBlocks] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _every_pair: dict[tuple[int, int, torch.device], BlockLayout] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with all layers and steps sparse, as in all published uses."""
        return replace(self, dense_layers=self.dense_layers or 0, dense_steps=self.dense_steps or 0)

    def site_weights(self, module: torch.nn.Module, joint: bool) -> SLAWeights:
        return SLAWeights(module)

    def compiled_as(self, family: str) -> Compiled:
        # An operator of a whole group of blocks does not know the weights of one block.
        return "outside"

    def caution(self, grid: TokenGrid) -> str:
        return (
            f"without trained weights only {self.keep:.0%} of the blocks are seen, and all else is"
            f" lost: the paper measures 41 of 77 points of quality before training"
        )

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        return spans_of(grid, BLOCK) if self.references == "local" else super().spans(grid)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        *,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        attend = partial(self._attend, site=site, scale=scale, key_mask=key_mask)
        return through_modes(attend, query, key, value)

    def selection(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        site: Site,
        *,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The critical blocks of the video tokens that `attend` computes for the same arguments.

        Returns:
            bool (batch, heads, query blocks, key blocks).
        """
        division = self._division(site.grid)
        counted = None if key_mask is None else division.inside(key_mask)
        key = for_every_head(key, query)
        return self._ranked(division.inside(query), division.inside(key), counted)[0]

    def selection_mask(self, chosen: torch.Tensor, grid: TokenGrid) -> AttentionMask:
        """The pairs of tokens that softmax attention sees, of one head.

        Args:
            chosen: bool (query blocks, key blocks), of one head and sample from `selection`.
            grid: the tokens of the call.
        """
        division = self._division(grid)
        number = division.inside(torch.arange(grid.tokens)[None])[0]
        place, blocks = torch.arange(division.tokens), chosen.shape[1]
        # All tokens beside the video are one further block, which sees and is seen.
        block_of = torch.full((grid.tokens,), blocks)
        block_of[number] = place // self.block_kv
        rows = torch.ones(grid.tokens, blocks + 1, dtype=torch.bool)
        rows[number, :blocks] = chosen.cpu()[place // self.block_q]
        return SelectionMask(grid, rows, block_of)

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

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        query, key, value = cast_as_sdpa(query, key, value)
        key, value = (for_every_head(x, query) for x in (key, value))
        division = self._division(site.grid)
        q, k, v = (division.inside(x) for x in (query, key, value))
        counted = None if key_mask is None else division.inside(key_mask)
        if not division.others:
            return self._attend_in_video(q, k, v, None, counted, site.weights, scale)
        of_others = attention(division.outside(query), key, value, scale=scale, key_mask=key_mask)
        sizes = division.tokens, division.others, query.device
        if sizes not in self._every_pair:
            with torch.inference_mode(False):
                self._every_pair[sizes] = every_pair(*sizes)
        others = _Others(
            division.outside(key),
            division.outside(value),
            None if key_mask is None else division.outside(key_mask),
            self._every_pair[sizes],
        )
        of_video = self._attend_in_video(q, k, v, others, counted, site.weights, scale)
        return division.joined(of_video, of_others)

    def _attend_in_video(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        others: _Others | None,
        counted: torch.Tensor | None,
        weights: Any,
        scale: float | None,
    ) -> torch.Tensor:
        """The output of the video tokens, some heads at a time."""
        step = self._heads_at_once(query)
        outs = []
        for first in range(0, query.shape[2], step):
            some = slice(first, first + step)
            q, k, v = (x[:, :, some] for x in (query, key, value))
            critical, marginal = self._ranked(q, k, counted)
            out = self._softmax_branch(q, k, v, critical, counted, others, some, scale)
            linear = self._linear_branch(q, k, v, marginal, counted)
            added = weights.project(linear, out.dtype)
            outs.append((out.to(linear.dtype) + added).to(out.dtype))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _softmax_branch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        critical: torch.Tensor,
        counted: torch.Tensor | None,
        others: _Others | None,
        heads: slice,
        scale: float | None,
    ) -> torch.Tensor:
        tokens = query.shape[1]
        layout = layout_of_blocks(
            critical,
            tokens_q=tokens,
            tokens_kv=tokens,
            block_q=self.block_q,
            block_kv=self.block_kv,
            most=self._critical(critical.shape[-1]),
        )
        if others is None:
            return attention(query, key, value, layout, scale=scale, key_mask=counted)
        out, lse = attention(
            query, key, value, layout, scale=scale, key_mask=counted, return_lse=True
        )
        key, value = others.key[:, :, heads], others.value[:, :, heads]
        return add_keys(out, lse, query, key, value, others.layout, scale, others.counted)

    def _linear_branch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        marginal: torch.Tensor,
        counted: torch.Tensor | None,
    ) -> torch.Tensor:
        """The output of linear attention before the trained layer, in float32 at least."""
        block_q, block_kv, eps = self.block_q, self.block_kv, 0.0
        if self.linear == "all":
            # All tokens are one block.
            block_q = block_kv = query.shape[1]
            marginal, eps = torch.ones_like(marginal[:, :, :1, :1]), _EPS
        out: torch.Tensor = linear_over_blocks(
            query,
            key,
            value,
            marginal,
            block_q=block_q,
            block_kv=block_kv,
            features=self.features,
            eps=eps,
            counted=counted,
        )
        return out

    @torch.no_grad()
    def _ranked(
        self, query: torch.Tensor, key: torch.Tensor, counted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The critical and the marginal blocks: bool (batch, heads, query blocks, key blocks)."""
        tokens, device = query.shape[1], query.device
        tiles, blocks = (self._cut(tokens, b, device) for b in (self.block_q, self.block_kv))
        # In an autocast region the scores would be in half precision.
        with autocast_off(device.type):
            # A vector taken off all keys changes no ranking, but leaves less to round.
            centre = self._cut(tokens, tokens, device).means(key, counted)
            of_keys = blocks.means(key, counted) - centre
            scores = mean_scores(tiles.means(query, counted), of_keys, 1.0)
            candidates = torch.ones_like(scores, dtype=torch.bool)
            if counted is not None:
                there = blocks.means(counted[:, :, None, None].float())[:, :, 0, 0] > 0
                candidates &= there[:, None, None]
            columns = scores.shape[-1]
            critical = top(scores, self._critical(columns), candidates)
            marginal = candidates & ~critical
            negligible = int(self.drop * columns)
            if negligible:
                marginal &= ~top(-scores, negligible, marginal)
        return critical, marginal

    def _critical(self, blocks: int) -> int:
        """The number of key blocks of a row that are critical; rounded down, as published."""
        return max(1, int(self.keep * blocks))

    def _cut(self, tokens: int, block: int, device: torch.device) -> KeyBlocks:
        known = tokens, block, device
        if known not in self._cuts:
            whole, rest = divmod(tokens, block)
            # Training after a run in inference mode must be able to use these tensors.
            with torch.inference_mode(False):
                self._cuts[known] = KeyBlocks.of_lengths(
                    [block] * whole + [rest] * (rest > 0), device
                )
        return self._cuts[known]

    def _heads_at_once(self, query: torch.Tensor) -> int:
        batch, tokens, heads, head_dim = query.shape
        rows, columns = -(-tokens // self.block_q), -(-tokens // self.block_kv)
        states = rows + columns if self.linear == "rest" else 1
        numbers = 8 * tokens * head_dim + states * head_dim * (head_dim + 1)
        per_head = batch * (rows * columns * _BYTES_PER_PAIR + 4 * numbers)
        return min(heads, max(1, _BYTES_AT_ONCE // per_head))

    def _division(self, grid: TokenGrid) -> Division:
        """The tokens that are cut into blocks, apart from those that see and are seen."""
        return division_of(grid, self.spans(grid))
