"""VSAAttn: the best tiles of the video for each tile, and a gated coarse attention of tiles.

Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv 2505.13389.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from diffattn._checks import FLAG, Allowed, check_fields, count, lists_to_tuples, number
from diffattn.grid import TokenGrid
from diffattn.kernels.autocast import autocast_off
from diffattn.masks.base import AttentionMask
from diffattn.methods.base import Compiled, Method, Site, SiteState, SiteWeights, Work
from diffattn.methods.selected_blocks import for_every_head, joined
from diffattn.methods.vsa.gate import VSAGate, gate_of_call, with_gate
from diffattn.methods.vsa.tiling import BLOCK, Tiling, tiling_of
from diffattn.operator import attention
from diffattn.routing.lists import bytes_of_pair, layout_of_blocks
from diffattn.routing.rules import kept_blocks, neighbours, top
from diffattn.routing.scores import mean_scores
from diffattn.selected.attention import SelectionMask
from diffattn.spans import Span, spans_of

TILES = ((4, 4, 4), (4, 4, 8), (4, 8, 8))
_ALLOWED = {
    "keep": number(above=0, at_most=1),
    "tile": Allowed(f"one of {', '.join(map(str, TILES))}", lambda value: value in TILES),
    "coarse": FLAG,
    "neighbours": count(0),
}
# The shares that the published models are trained with: FastH3's, and FastWan's.
_KEEP = {"minimax-h3": 0.1}
_KEEP_ELSEWHERE = 0.2
_DENSE_STEPS = 0.2
# Bytes of scores and lists in memory at a time; heads take turns where all heads would need more.
_BYTES_AT_ONCE = 1 << 29


@dataclass(frozen=True, kw_only=True)
class VSAAttn(Method):
    """VSA (arXiv 2505.13389): attention to the best tiles, with a trained coarse branch.

    The video is cut into boxes of 4 x 4 x 4 tokens. The score of a pair of tiles is the product of
    their mean query and mean key. Each tile attends token by token to a fixed share of the tiles,
    those of the highest scores. With `coarse`, attention among the means of the tiles is added to
    the output of each token, weighed by a gate: a linear layer `to_gate_compress` of what the site
    projects to queries. The gate begins as 0, which adds nothing. FastWan and FastH3 are models
    with a trained gate, see `load_vsa_checkpoint`.

    Other tokens are cut into runs of as many tokens as a tile. They see every token, and every
    token sees them. Their means take part in the coarse attention, and where the model projects
    them by `to_q` they have a gate, too.

    In compiled code with `coarse`, attention modules run outside of the graph.

    Attributes:
        keep: share of the video's tiles that each tile attends to. 1 is all of them.
        tile: frames, rows and columns of a tile: (4, 4, 4), (4, 4, 8) or (4, 8, 8).
        coarse: whether sites have a gate. Without, the method is plain attention to the best tiles,
            for models that were not trained with a gate.
        neighbours: tiles before and after itself that a tile of the video attends to beside the
            share, in the raster order of tiles: 0 for itself alone, as SGLang's cube attention
            does, 1 as ComfyUI's VSA does. None for no such tiles, as the published models were
            trained.
        references: with "visible" references the tiles of a reference select among themselves, and
            all other pairs with a reference attend. With "local" references every tile selects
            the share `keep` of the video's tiles, and of each reference's.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "vsa"
    paper: ClassVar[str] = "arXiv 2505.13389"
    traced_whole: ClassVar[bool] = True
    same_in_every_step: ClassVar[frozenset[str]] = frozenset(("coarse",))
    shared_between_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "_tilings": ("tile", "references"),
        "_always": ("tile", "references"),
    }

    keep: float | None = field(default=None, metadata={"help": "share of the tiles to attend to"})
    tile: tuple[int, int, int] = field(
        default=TILES[0], metadata={"help": "latent frames,rows,columns of a tile"}
    )
    coarse: bool = field(
        default=False, metadata={"help": "add attention among tiles by a trained gate"}
    )
    neighbours: int | None = field(
        default=None, metadata={"help": "tiles beside itself that a tile sees; 0 for itself alone"}
    )
    _tilings: dict[tuple[TokenGrid, torch.device], Tiling] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _always: dict[tuple[TokenGrid, torch.device], torch.Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lists_to_tuples(self, "tile")
        check_fields(self, _ALLOWED)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the share that FastH3 or FastWan was trained with.

        No step is dense with a gate, as in the trained models. Without a gate, the first fifth is.
        """
        dense_steps = 0 if self.coarse else _DENSE_STEPS
        return replace(
            self,
            keep=_KEEP.get(family, _KEEP_ELSEWHERE) if self.keep is None else self.keep,
            dense_layers=0 if self.dense_layers is None else self.dense_layers,
            dense_steps=dense_steps if self.dense_steps is None else self.dense_steps,
        )

    def site_weights(self, module: torch.nn.Module, joint: bool) -> SiteWeights | None:
        return VSAGate(module) if self.coarse else None

    def site_processor(self, processor: Any, state: SiteState) -> Any:
        return with_gate(processor, self.type, state) if self.coarse else processor

    @property
    def changes_the_model(self) -> bool:
        return self.coarse

    def compiled_as(self, family: str) -> Compiled:
        return "outside" if self.coarse else super().compiled_as(family)

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        if self.references == "exact":
            return super().spans(grid)
        return spans_of(grid, math.prod(self.tile))

    def tiling(self, grid: TokenGrid, device: torch.device | str = "cpu") -> Tiling:
        """The tiles of a sequence, kept for the next call."""
        known = grid, torch.device(device)
        if known not in self._tilings:
            # Training after a run in inference mode must be able to use these tensors.
            with torch.inference_mode(False):
                tiling = tiling_of(grid.tokens, self.spans(grid), self.tile, known[1])
                self._tilings[known] = tiling
        return self._tilings[known]

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
        """Attention of one call.

        The gate is that of the site whose processor runs. Outside of a processor there is none.
        """
        gate = gate_of_call(query, site.grid) if self.coarse else None
        return self.attend_gated(query, key, value, gate, site.grid, scale=scale, key_mask=key_mask)

    def attend_gated(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gate: torch.Tensor | None,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention to the selected tiles, plus the gate times the attention among tiles.

        Args:
            query, key, value: (batch, tokens, heads, head_dim).
            gate: in the shape of `query`; None for no coarse attention.
            grid: the tokens of the call.
            scale: factor of the scores; 1 / sqrt(head_dim) when None.
            key_mask: bool (batch, tokens): False for padded keys.

        Returns:
            (batch, tokens, heads, head_dim).
        """
        key, value = (for_every_head(x, query) for x in (key, value))
        if self._keep == 1 and gate is None:
            return attention(query, key, value, scale=scale, key_mask=key_mask)
        tiling = self.tiling(grid, query.device)
        counted = tiling.counted(key_mask, query.shape[0])
        holds_any = _holds_any(tiling, key_mask, counted)
        query, of_query = tiling.pooled(query, counted)
        key, of_key = tiling.pooled(key, counted)
        value = tiling.placed(value)
        means = of_query, of_key
        padded = None if key_mask is None else counted
        out = self._fine(query, key, value, means, tiling, grid, scale, padded, holds_any)
        if gate is not None:
            # Means are rounded as the tokens are, as in the public code.
            of_value = tiling.tiles.means(value, counted)
            q, k, v = (x.to(query.dtype) for x in (of_query, of_key, of_value))
            coarse = attention(q, k, v, scale=scale, key_mask=holds_any)
            out = out + tiling.placed(gate).to(out.dtype) * tiling.spread(coarse)
        return tiling.unplaced(out)

    def selection(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        site: Site,
        *,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The pairs of tiles that `attend` computes for the same arguments.

        Returns:
            bool (batch, heads, tiles, tiles), with tiles of other tokens first.
        """
        key = for_every_head(key, query)
        tiling = self.tiling(site.grid, query.device)
        counted = tiling.counted(key_mask, query.shape[0])
        of_q, of_k = (tiling.pooled(x, counted)[1] for x in (query, key))
        holds_any = _holds_any(tiling, key_mask, counted)
        return self._chosen(of_q, of_k, tiling, site.grid, scale, holds_any)

    def selection_mask(self, chosen: torch.Tensor, grid: TokenGrid) -> AttentionMask:
        """The selection of one head as a mask.

        Args:
            chosen: bool (tiles, tiles), of one head and sample from `selection`.
            grid: the tokens of the call.
        """
        tile_of = self.tiling(grid).tile_of_token
        return SelectionMask(grid, chosen.cpu()[tile_of], tile_of)

    def choose(
        self, scores: torch.Tensor, tiling: Tiling, holds_any: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The best tiles of each span, for every row of scores.

        Args:
            scores: (batch, heads, tiles, tiles).
            tiling: the tiles.
            holds_any: bool (batch, tiles), False for a tile of padding alone; None without padding.

        Returns:
            bool, in the shape of `scores`.
        """
        chosen = None
        for span, tiles in enumerate(tiling.span_tiles):
            candidates = None
            if tiles < len(tiling.lengths):
                candidates = (tiling.owner == span)[None, None, None]
            if holds_any is not None:
                there = holds_any[:, None, None]
                candidates = there if candidates is None else candidates & there
            best = top(scores, kept_blocks(self._keep, tiles), candidates)
            chosen = best if chosen is None else chosen | best
        assert chosen is not None  # the video is a span
        return chosen

    @property
    def _keep(self) -> float:
        return _KEEP_ELSEWHERE if self.keep is None else self.keep

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work:
        """The cost of a call, with the places that fill up short tiles; the density is expected."""
        channels = heads * head_dim
        tiling = self.tiling(grid)
        pairs, places = self._expected_pairs(tiling, tiling.lengths), tiling.places
        tiles = len(tiling.lengths)
        selection = 2 * places * channels + 2 * tiles**2 * channels
        coarse = 0
        if self.coarse:
            coarse = places * channels + 4 * tiles**2 * channels
            coarse += 2 * grid.tokens * channels * (channels + 1)
        computed = self._expected_pairs(tiling, tiling.tiles.lengths)
        return Work(
            flops=4 * computed * channels + selection + coarse,
            density=pairs / grid.tokens**2,
            selection_flops=selection,
            is_exact=False,
        )

    def _expected_pairs(self, tiling: Tiling, lengths: tuple[int, ...]) -> float:
        """Pairs that attend if all tiles of a span are selected equally often."""
        size = torch.tensor(lengths, dtype=torch.float64)
        shares = torch.ones_like(size)
        for span, tiles in enumerate(tiling.span_tiles):
            shares[tiling.owner == span] = kept_blocks(self._keep, tiles) / tiles
        seen = torch.where(self._pairs_always(tiling), 1, shares[None])
        return float(size @ seen @ size)

    def _fine(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        means: tuple[torch.Tensor, torch.Tensor],
        tiling: Tiling,
        grid: TokenGrid,
        scale: float | None,
        counted: torch.Tensor | None,
        holds_any: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention to the selected tiles, of tokens at their places.

        Args:
            counted: bool (batch, places), False for padding and for empty places. None without
                padding: the layout then hides empty places, which costs whole tiles nothing.
        """
        batch, places, heads, _ = query.shape
        pairs = batch * len(tiling.tile_of_block) ** 2 * bytes_of_pair(query)
        step = max(1, _BYTES_AT_ONCE // pairs)
        outs = []
        for first in range(0, heads, step):
            some = (slice(None), slice(None), slice(first, first + step))
            chosen = self._chosen(means[0][some], means[1][some], tiling, grid, scale, holds_any)
            layout = layout_of_blocks(
                tiling.of_blocks(chosen),
                tokens_q=places,
                tokens_kv=places,
                block_q=BLOCK,
                block_kv=BLOCK,
                held=tiling.held if counted is None else None,
            )
            outs.append(
                attention(
                    query[some], key[some], value[some], layout, scale=scale, key_mask=counted
                )
            )
        return joined(outs)

    @torch.no_grad()
    def _chosen(
        self,
        query_means: torch.Tensor,
        key_means: torch.Tensor,
        tiling: Tiling,
        grid: TokenGrid,
        scale: float | None,
        holds_any: torch.Tensor | None,
    ) -> torch.Tensor:
        """The pairs of tiles that are computed, bool (batch, heads, tiles, tiles)."""
        device = query_means.device
        # In an autocast region the scores would be in half precision.
        with autocast_off(device.type):
            factor = query_means.shape[-1] ** -0.5 if scale is None else scale
            scores = mean_scores(query_means, key_means, factor)
            chosen = self.choose(scores, tiling, holds_any)
        known = grid, device
        if known not in self._always:
            with torch.inference_mode(False):
                self._always[known] = self._pairs_always(self.tiling(grid)).to(device)
        chosen |= self._always[known]
        return chosen if holds_any is None else chosen & holds_any[:, None, None]

    def _pairs_always(self, tiling: Tiling) -> torch.Tensor:
        """The pairs of tiles that attend in any case: bool (tiles, tiles)."""
        owner = tiling.owner
        pairs = (owner < 0)[:, None] | (owner < 0)
        same = owner[:, None] == owner
        if self.references != "local":
            pairs |= ~same
        if self.neighbours is not None:
            pairs |= same & neighbours(len(owner), len(owner), self.neighbours)
        return pairs


def _holds_any(
    tiling: Tiling, key_mask: torch.Tensor | None, counted: torch.Tensor | None
) -> torch.Tensor | None:
    """Whether any key of a tile counts: bool (batch, tiles); None without padding."""
    if key_mask is None or counted is None:
        return None
    return tiling.tiles.holds_any(counted)
