"""SelectedBlocksMethod: attention of query blocks to the key blocks that their content selects."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from diffattn._checks import Allowed, check_fields, choice, count, is_whole, lists_to_tuples
from diffattn.curves import CURVES, along_curve
from diffattn.grid import TokenGrid
from diffattn.kernels.autocast import autocast_off
from diffattn.masks.base import AttentionMask
from diffattn.methods.base import Method, Site, Work
from diffattn.operator import attention
from diffattn.orders import TileOrder, permuted, tile_for
from diffattn.routing.keep import Value
from diffattn.routing.lists import bytes_of_pair
from diffattn.routing.pooled import Always, Pooled
from diffattn.routing.remainders import REMAINDERS, attention_of_blocks
from diffattn.routing.rules import neighbours
from diffattn.selected.attention import SelectionMask
from diffattn.selected.key_blocks import KeyBlocks
from diffattn.spans import Span, spans_of

ORDERS = ("raster", "tile", *CURVES)
# Sizes that the kernels take on every device.
_BLOCKS = (16, 32, 64, 128, 256)
_ALLOWED = {
    "block": Allowed(
        f"{', '.join(map(str, _BLOCKS[:-1]))} or {_BLOCKS[-1]}",
        lambda value: is_whole(value) and value in _BLOCKS,
    ),
    "order": choice(ORDERS),
    "neighbours": count(0),
    "frames": Allowed(
        "integers, the indices of latent frames",
        lambda value: isinstance(value, tuple) and all(map(is_whole, value)),
    ),
    "remainder": choice(REMAINDERS),
}
REMAINDER_HELP = f"blocks that are not selected: {', '.join(REMAINDERS)}"
# Bytes of scores and lists in memory at a time; heads take turns where all heads would need more.
_BYTES_AT_ONCE = 1 << 29


@dataclass(frozen=True, kw_only=True)
class SelectedBlocksMethod(Method):
    """A method that cuts all tokens into equal blocks, and selects key blocks for query blocks.

    Blocks count from the start of the sequence; the last block may be short. Text and other tokens
    beside the video keep their places: blocks with such tokens see every key, and every query sees
    them. With "visible" references a block of a reference selects among the blocks of the same
    reference, with "local" references each block selects among those of the video and of all
    references.

    Attributes:
        block: tokens per block: 16, 32, 64, 128 or 256.
        order: the order of the video tokens that blocks are cut from: "raster" for the model's own,
            "tile" for boxes of `block` tokens, or a curve of `diffattn.curves`.
        neighbours: blocks before and after its own that a query block always sees; 0 for its own
            block alone.
        frames: latent frames of the video whose blocks every query sees, such as (0,) for the first
            and (0, -1) for the first and the last. References have no such frames.
        remainder: "drop" to leave out blocks that are not selected; "summary" to see each of them
            by its mean key and mean value (arXiv 2607.24027); "block-summary" for the same by the
            scores of a query block's mean, which cost next to nothing (comfy-kitchen).

    Raises:
        ValueError: for a parameter out of range.
    """

    traced_whole: ClassVar[bool] = True
    shared_between_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "_seen": ("block", "order", "neighbours", "frames", "references"),
        "_places": ("block", "order", "references"),
        "_blocks": ("block",),
    }

    block: int = field(default=64, metadata={"help": "tokens per block: 16, 32, 64, 128 or 256"})
    order: str = field(default="morton", metadata={"help": f"one of {', '.join(ORDERS)}"})
    neighbours: int = field(
        default=0, metadata={"help": "blocks beside its own that a query block always sees"}
    )
    frames: tuple[int, ...] = field(
        default=(), metadata={"help": "latent frames that every query sees, such as 0 or 0,-1"}
    )
    remainder: str = field(default="drop", metadata={"help": REMAINDER_HELP})
    _places: dict[tuple[TokenGrid, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _seen: dict[tuple[TokenGrid, torch.device], Always] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _blocks: dict[tuple[int, torch.device], KeyBlocks] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lists_to_tuples(self, "frames")
        if is_whole(self.frames):
            object.__setattr__(self, "frames", (self.frames,))
        check_fields(self, _ALLOWED)

    @abstractmethod
    def choose(self, pooled: Pooled) -> torch.Tensor:
        """The key blocks that each query block selects, beside those that it always sees.

        Args:
            pooled: the tokens of the call and the means of their blocks.

        Returns:
            bool (batch, heads, blocks, blocks).
        """

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
        key, value = (for_every_head(x, query) for x in (key, value))
        if self.is_dense:
            return attention(query, key, value, scale=scale, key_mask=key_mask)
        there, back = self._permutation(site.grid, query.device)
        # The tokens in the method's order are given up before the heads are joined.
        out = joined(self._by_heads(query, key, value, site.grid, scale, key_mask))
        return permuted(out, back, there, 1)

    def _by_heads(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: TokenGrid,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """The outputs of some heads at a time, in the method's order, of tokens in the model's."""
        there, back = self._permutation(grid, query.device)
        blocks = self._key_blocks(query.shape[1], query.device)
        counted = None if key_mask is None else key_mask.index_select(1, there)
        move = partial(permuted, there=there, back=back, dim=1)
        query, query_means = blocks.moved(query, there, move, counted)
        key, key_means = blocks.moved(key, there, move, counted)
        value_means = None
        if self.remainder == "drop":
            value = move(value)
        else:
            value, value_means = blocks.moved(value, there, move, counted)
        always = self._always(grid, query.device)
        pairs = query.shape[0] * always.pairs.numel() * bytes_of_pair(query)
        step = max(1, _BYTES_AT_ONCE // pairs)
        outs = []
        for first in range(0, query.shape[2], step):
            some = slice(first, first + step)
            q, k, v = (x[:, :, some] for x in (query, key, value))
            of_q, of_k = query_means[:, :, some], key_means[:, :, some]
            chosen = self._chosen(q, k, of_q, of_k, counted, always, scale)
            outs.append(
                attention_of_blocks(
                    q,
                    k,
                    v,
                    blocks,
                    chosen,
                    remainder=self.remainder,
                    scale=scale,
                    key_mask=counted,
                    means=None if value_means is None else (of_q, of_k, value_means[:, :, some]),
                )
            )
        return outs

    def selection(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        site: Site,
        *,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The blocks that `attend` computes for the same arguments.

        Returns:
            bool (batch, heads, blocks, blocks), of blocks in the method's order.
        """
        key = for_every_head(key, query)
        there, back = self._permutation(site.grid, query.device)
        blocks = self._key_blocks(query.shape[1], query.device)
        counted = None if key_mask is None else key_mask.index_select(1, there)
        move = partial(permuted, there=there, back=back, dim=1)
        query, query_means = blocks.moved(query, there, move, counted)
        key, key_means = blocks.moved(key, there, move, counted)
        always = self._always(site.grid, query.device)
        return self._chosen(query, key, query_means, key_means, counted, always, scale)

    def selection_mask(self, chosen: torch.Tensor, grid: TokenGrid) -> AttentionMask:
        """The selection of one head as a mask.

        Args:
            chosen: bool (blocks, blocks), of one head and sample from `selection`.
            grid: the tokens of the call.
        """
        there, _ = self._permutation(grid, torch.device("cpu"))
        block_of = torch.empty_like(there)
        block_of[there] = torch.arange(grid.tokens) // self.block
        return SelectionMask(grid, chosen.cpu()[block_of], block_of)

    @torch.no_grad()
    def _chosen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        query_means: torch.Tensor,
        key_means: torch.Tensor,
        counted: torch.Tensor | None,
        always: Always,
        scale: float | None,
    ) -> torch.Tensor:
        """The pairs of blocks that are computed, bool (batch, heads, blocks, blocks)."""
        blocks = self._key_blocks(query.shape[1], query.device)
        there = None if counted is None else blocks.holds_any(counted)
        # In an autocast region the scores would be in half precision.
        with autocast_off(query.device.type):
            pooled = Pooled(
                query,
                key,
                blocks,
                query_means,
                key_means,
                counted,
                there,
                always,
                query.shape[-1] ** -0.5 if scale is None else scale,
            )
            chosen = self.choose(pooled) | always.pairs
        # A block without a key that counts has nothing to give, summary or not.
        return chosen if there is None else chosen & there[:, None, None]

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        return super().spans(grid) if self.references == "exact" else spans_of(grid, self.block)

    def _always(self, grid: TokenGrid, device: torch.device) -> Always:
        known = grid, device
        if known not in self._seen:
            owner = self._owners(grid)
            pairs = neighbours(len(owner), len(owner), self.neighbours)
            pairs |= (owner < 0)[:, None] | (owner < 0)
            if self.references != "local":
                pairs |= owner[:, None] != owner
            pairs |= self._of_frames(grid)
            candidates = (~pairs).sum(1)
            counts = tuple(candidates[candidates > 0].unique().tolist())
            with torch.inference_mode(False):
                self._seen[known] = Always(pairs.to(device), candidates.to(device), counts)
        return self._seen[known]

    def _of_frames(self, grid: TokenGrid) -> torch.Tensor:
        """Whether each block holds a token of `frames`, bool (blocks,).

        Raises:
            ValueError: if the video has no such frame.
        """
        is_of_frames = torch.zeros(grid.frames, grid.height * grid.width, dtype=torch.bool)
        for frame in self.frames:
            if not -grid.frames <= frame < grid.frames:
                raise ValueError(
                    f"frames has {frame}, but the video has {grid.frames} latent frames: give"
                    f" numbers from 0 to {grid.frames - 1}, or from -1 back to {-grid.frames}"
                )
            is_of_frames[frame] = True
        of_token = torch.zeros(grid.tokens + -grid.tokens % self.block, dtype=torch.bool)
        of_token[grid.video] = is_of_frames.flatten()
        there, _ = self._permutation(grid, torch.device("cpu"))
        of_token[: grid.tokens] = of_token[there]
        return of_token.unflatten(0, (-1, self.block)).any(1)

    def _owners(self, grid: TokenGrid) -> torch.Tensor:
        """The number of the span that each block lies in, int64 (blocks,); -1 for no single one."""
        of_token = torch.full((grid.tokens,), -1)
        for number, span in enumerate(self.spans(grid)):
            of_token[span.grid.video] = number
        # Tokens past the end belong to whom the last token does.
        padded = torch.cat([of_token, of_token[-1:].expand(-grid.tokens % self.block)])
        in_blocks = padded.unflatten(0, (-1, self.block))
        first = in_blocks[:, 0]
        return first.masked_fill((in_blocks != first[:, None]).any(1), -1)

    def _key_blocks(self, tokens: int, device: torch.device) -> KeyBlocks:
        known = tokens, device
        if known not in self._blocks:
            whole, rest = divmod(tokens, self.block)
            lengths = [self.block] * whole + [rest] * (rest > 0)
            with torch.inference_mode(False):
                self._blocks[known] = KeyBlocks.of_lengths(lengths, device)
        return self._blocks[known]

    def _permutation(
        self, grid: TokenGrid, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The position in the model's order of each token of the method's order; the inverse."""
        known = grid, device
        if known not in self._places:
            # Training after a run in inference mode must be able to use these tensors.
            with torch.inference_mode(False):
                there = self._sequence(grid).to(device)
                self._places[known] = there, there.argsort()
        return self._places[known]

    def _sequence(self, grid: TokenGrid) -> torch.Tensor:
        out = torch.arange(grid.tokens)
        for span in self.spans(grid):
            out[span.grid.video] = self._in_span(span.grid)
        return out

    def _in_span(self, grid: TokenGrid) -> torch.Tensor:
        """The positions of the tokens of one span, in the method's order."""
        if self.order == "raster":
            return torch.arange(grid.video.start, grid.video.stop)
        if self.order == "tile":
            return TileOrder(grid, tile_for(grid, self.block)).positions()[grid.video]
        places = along_curve(grid, self.order)  # type: ignore[arg-type]
        # Tokens of the span fill the block that other tokens begin: later blocks then start where a
        # run of `block` tokens of the curve starts.
        return places.roll(-grid.text_before % self.block) + grid.text_before

    def _work(
        self, grid: TokenGrid, channels: int, rule: Value, selection_flops: float
    ) -> Work | None:
        """The expected cost of a call under a rule; None if the share that it keeps is unknown."""
        always = self._always(grid, torch.device("cpu"))
        share = rule.expected(always)
        if share is None:
            return None
        seen = always.pairs.float().mean().item()
        density = seen + (1 - seen) * share
        attending = 4 * density * grid.tokens**2 * channels
        return Work(
            flops=attending + selection_flops + self._summary_flops(grid, channels),
            density=density,
            selection_flops=selection_flops,
            is_exact=False,
        )

    def _pooling_flops(self, grid: TokenGrid, channels: int) -> float:
        """Operations that pool and score: sums over queries and keys, and a product of means."""
        blocks = -(-grid.tokens // self.block)
        return 2 * grid.tokens * channels + 2 * blocks**2 * channels

    def _summary_flops(self, grid: TokenGrid, channels: int) -> float:
        blocks = -(-grid.tokens // self.block)
        seen_by = {"drop": 0, "summary": grid.tokens, "block-summary": blocks}[self.remainder]
        return (4 * seen_by * blocks + grid.tokens) * channels if seen_by else 0


def joined(outs: list[torch.Tensor]) -> torch.Tensor:
    """The outputs of some heads each, (batch, tokens, heads, head_dim), as one."""
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def for_every_head(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values, repeated for the query heads that share them.

    Raises:
        ValueError: if the heads do not divide.
    """
    groups, left = divmod(query.shape[2], x.shape[2])
    if left:
        raise ValueError(
            f"query has {query.shape[2]} heads and key {x.shape[2]}: with grouped queries the"
            f" former must be a multiple of the latter"
        )
    return x.repeat_interleave(groups, 2) if groups > 1 else x
