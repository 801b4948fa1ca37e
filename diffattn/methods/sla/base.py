"""SparseLinearMethod: softmax attention to the best blocks, beside linear attention."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch

from diffattn._checks import Allowed, check_fields, is_whole, number
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.interception import through_modes
from diffattn.kernels.autocast import cast_as_sdpa
from diffattn.masks.base import BLOCK, AttentionMask
from diffattn.methods.base import Compiled, Method, Site
from diffattn.methods.selected_blocks import for_every_head, joined
from diffattn.operator import add_keys, attention, every_pair
from diffattn.routing.lists import bytes_of_pair, layout_of_blocks
from diffattn.selected.attention import SelectionMask
from diffattn.selected.key_blocks import KeyBlocks
from diffattn.spans import Division, Span, division_of, spans_of

# The blocks that the kernels of all devices have.
_BLOCKS = (16, 32, 64, 128, 256)
_BLOCK = Allowed("16, 32, 64, 128 or 256", lambda value: is_whole(value) and value in _BLOCKS)
_ALLOWED = {"keep": number(above=0, at_most=1), "block_q": _BLOCK, "block_kv": _BLOCK}
# Bytes of scores, lists and states in memory at a time; heads take turns where all would need more.
_BYTES_AT_ONCE = 1 << 30


@dataclass(frozen=True)
class Others:
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
class SparseLinearMethod(Method):
    """A method that adds linear attention to softmax attention over the best blocks.

    Video tokens are cut into query blocks and key blocks in the order of the model. All other
    tokens see every token, and video tokens see them in the same softmax as their best blocks.
    Linear attention is from video to video.

    Attributes:
        keep: share of the key blocks that are critical, rounded down, and at least one block.
        block_q, block_kv: tokens per query block and per key block: 16, 32, 64, 128 or 256.

    Raises:
        ValueError: for a parameter out of range.
    """

    shared_between_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {"_cuts": (), "_every_pair": ()}

    keep: float = field(default=0.1, metadata={"help": "share of the blocks seen by softmax"})
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

    @abstractmethod
    def critical(
        self, query: torch.Tensor, key: torch.Tensor, counted: torch.Tensor | None, weights: Any
    ) -> torch.Tensor:
        """The best blocks: bool (batch, heads, query blocks, key blocks).

        Args:
            query, key: (batch, tokens, heads, head_dim), of the video alone.
            counted: bool (batch, tokens), False for padding; None without padding.
            weights: the weights of the site.
        """

    @abstractmethod
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
        """The output of the video tokens for some heads.

        Args:
            query, key, value: (batch, tokens, some heads, head_dim), of the video alone.
            others: keys beside the video, of all heads.
            counted: bool (batch, tokens), False for padding.
            heads: the heads of the tensors.
            weights: the weights of the site.
            scale: factor of the scores; 1 / sqrt(head_dim) when None.
        """

    def _floats_per_channel(self, query: torch.Tensor) -> int:
        """Floats in memory at a time for each channel of a token of a head."""
        return 8

    @abstractmethod
    def _states(self, rows: int, columns: int) -> int:
        """Sums of products of keys and values in memory, for a number of blocks."""

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with all layers and steps sparse, as in all published uses."""
        return replace(self, dense_layers=self.dense_layers or 0, dense_steps=self.dense_steps or 0)

    def compiled_as(self, family: str) -> Compiled:
        # An operator of a whole group of blocks does not know the weights of one block.
        return "outside"

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
        return self.critical(division.inside(query), division.inside(key), counted, site.weights)

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
        others = Others(
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
        others: Others | None,
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
            outs.append(self._attend_by_heads(q, k, v, others, counted, some, weights, scale))
        return joined(outs)

    def _softmax_branch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        critical: torch.Tensor,
        counted: torch.Tensor | None,
        others: Others | None,
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
        numbers = self._floats_per_channel(query) * tokens * head_dim + self._states(
            rows, columns
        ) * head_dim * (head_dim + 1)
        per_head = batch * (rows * columns * bytes_of_pair(query) + 4 * numbers)
        return min(heads, max(1, _BYTES_AT_ONCE // per_head))

    def _division(self, grid: TokenGrid) -> Division:
        """The tokens that are cut into blocks, apart from those that see and are seen."""
        return division_of(grid, self.spans(grid))
