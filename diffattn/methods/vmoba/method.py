"""VMoBA: each query attends to its own block and to the blocks with the best-fitting mean key.

Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv 2506.23858.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any, ClassVar, Self

import torch

from diffattn._checks import (
    FLAG,
    Allowed,
    check_fields,
    choice,
    count,
    lists_to_tuples,
    number,
    sides,
)
from diffattn.blocks import unpack_bits
from diffattn.grid import TokenGrid
from diffattn.masks.base import BLOCK
from diffattn.methods.base import Method, Site, Work
from diffattn.methods.selected_blocks import for_every_head
from diffattn.methods.vmoba.chunks import Sides, recommended_chunk
from diffattn.methods.vmoba.selection import Rule, select_blocks
from diffattn.routing.pools import SCOPES
from diffattn.selected.attention import SelectionMask, selected_attention
from diffattn.selected.key_blocks import Chunk, JointPartition, KeyBlocks, Partition
from diffattn.spans import Span, spans_of

PARTITIONS = ("1d", "2d", "3d")

_TAU = 0.25
_DENSE_STEPS = 0.25
# The paper's share of selected blocks without training: 3 of 7 "1d" blocks, a quarter of others.
_SHARE = {"1d": 3 / 7, "2d": 1 / 4, "3d": 1 / 4}
_TILE = 128  # a row of blocks of the block-sparse kernels


@dataclass(frozen=True)
class _Preset:
    select: str
    scope: str


# The paper calls the scope "query" local, and the scope "head" global.
_PRESETS = {
    "training-free": _Preset("topk", "query"),
    "training": _Preset("threshold", "head"),
}


def _are_partitions(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(kind in PARTITIONS for kind in value)


def _is_topk(value: Any) -> bool:
    each = value if isinstance(value, tuple) else (value,) * len(PARTITIONS)
    return len(each) == len(PARTITIONS) and all(map(count(1).holds, each))


_ALLOWED = {
    "preset": choice(_PRESETS),
    "granularity": choice(("query", "tile")),
    "select": choice(("topk", "threshold")),
    "scope": choice(SCOPES),
    "centre_keys": FLAG,
    "partitions": Allowed(f"some of {', '.join(PARTITIONS)}", _are_partitions),
    "chunk_1d": replace(number(above=0), words="a number of frames above 0"),
    "chunk_2d": sides(2),
    "chunk_3d": sides(3),
    "topk": Allowed(
        f"an integer of at least 1, or three of them, for {', '.join(PARTITIONS)}", _is_topk
    ),
    "tau": replace(
        number(above=0, at_most=1),
        words="a number above 0 and at most 1, which is dense attention",
    ),
    "tile": count(1),
}


@dataclass(frozen=True, kw_only=True)
class VMoBAAttn(Method):
    """VMoBA (arXiv 2506.23858): mixture of block attention, selected by content.

    The video tokens are cut into blocks. Layers take turns with runs of frames ("1d"), patches of
    the picture through all frames ("2d") and chunks of space and time ("3d"). A query's score of a
    block is the product of the query with the mean of the block's keys. The query attends to its
    own block and to the selected blocks. Text sees everything, and everything sees text. Without
    training pictures change; the paper's fine-tuning or more dense steps keep the quality.

    Attributes:
        preset: the source of `select` and `scope` at None: "training-free", the paper's setting for
            untrained models (the best blocks for each query), or "training", the paper's setting
            for models trained with VMoBA (a share of the similarity in a head).
        partitions: the kinds of blocks that the layers take in turn: some of "1d", "2d" and "3d",
            in any order, with repetitions.
        chunk_1d: latent frames of a block. A fraction cuts inside a frame.
        chunk_2d: rows and columns of a block.
        chunk_3d: latent frames, rows and columns of a block. A chunk of None is the paper's chunk
            on the paper's grids. On other grids None makes about the paper's default number of
            blocks: 8, 48 and 72. A side longer than the grid covers the grid; blocks at the ends
            may be shorter.
        select: "topk" for a number of blocks, or "threshold" for a share of the similarity.
        scope: the scores that are ranked together: the scores of a "query" (the paper's local), or
            of all queries of a "head" (the paper's global). Two more scopes are in the public code
            and not in the paper: the scores of each block by the queries of all heads
            ("unpublished-block", with a threshold only), and all scores of a sample
            ("unpublished-all").
        topk: blocks per query, the own block included; an average if the scope is wider than a
            query. One number, or one each for "1d", "2d" and "3d". All blocks or more is dense
            attention.
        tau: share of the similarity to keep, own blocks included. 1 is dense attention. Where the
            own blocks reach the share, no other block is selected; the public code takes one block
            more there.
        centre_keys: subtract the mean of all blocks from each block's mean key, which leaves
            softmax unchanged. Matters for scopes wider than a query. Not in the paper.
        granularity: "query" for a selection by each query, or "tile" for a selection by the mean
            of each run of `tile` queries. Tiles are faster on a GPU, but another model than the
            paper's.
        tile: queries of a tile with `granularity="tile"`; 128 when None.
        references: with "visible" a reference is cut into blocks of its own, by the same chunk. Its
            queries select among its own blocks, the same share as queries of the video, and see
            all other tokens. All other queries see the whole reference. With "local" every query
            selects among the blocks of the video and of all references, again the same share.

    Raises:
        ValueError: for a parameter out of range, or a parameter without effect beside another.
    """

    type: ClassVar[str] = "vmoba"
    paper: ClassVar[str] = "arXiv 2506.23858"
    traced_whole: ClassVar[bool] = True
    same_in_every_step: ClassVar[frozenset[str]] = frozenset(("partitions", "preset"))

    preset: str = field(
        default="training-free", metadata={"help": "training-free or training: the paper's"}
    )
    partitions: tuple[str, ...] = field(
        default=PARTITIONS, metadata={"help": "kinds of blocks that layers take in turn"}
    )
    chunk_1d: int | float | None = field(
        default=None, metadata={"help": "latent frames of a 1d block, may be a fraction"}
    )
    chunk_2d: tuple[int, int] | None = field(
        default=None, metadata={"help": "rows,columns of a 2d block"}
    )
    chunk_3d: tuple[int, int, int] | None = field(
        default=None, metadata={"help": "latent frames,rows,columns of a 3d block"}
    )
    select: str | None = field(default=None, metadata={"help": "topk or threshold"})
    scope: str | None = field(
        default=None, metadata={"help": "query or head: whose scores are ranked together"}
    )
    topk: int | tuple[int, int, int] | None = field(
        default=None, metadata={"help": "blocks per query, its own counted; or 1d,2d,3d"}
    )
    tau: float | None = field(
        default=None, metadata={"help": "share of the similarity to keep, at most 1"}
    )
    centre_keys: bool = field(
        default=False, metadata={"help": "leave out what all blocks have in common"}
    )
    granularity: str = field(default="query", metadata={"help": "query or tile: who selects"})
    tile: int | None = field(default=None, metadata={"help": "queries of a tile (default: 128)"})
    _partitions_known: dict[tuple[TokenGrid, str], Partition] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _joint_known: dict[tuple[TokenGrid, str], JointPartition] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lists_to_tuples(self, "partitions", "chunk_2d", "chunk_3d", "topk")
        if isinstance(self.partitions, str):
            object.__setattr__(self, "partitions", (self.partitions,))
        check_fields(self, _ALLOWED)
        self._check_selection()
        if self.tile is not None and self.granularity == "query":
            raise ValueError(
                f"tile is {self.tile}, but has no effect with granularity='query'; leave it out"
                f" or use granularity='tile'"
            )

    def _check_selection(self) -> None:
        select, scope = self._select, self._scope
        useless = "tau" if select == "topk" else "topk"
        if getattr(self, useless) is not None:
            other = "threshold" if select == "topk" else "topk"
            raise ValueError(
                f"{useless} is {getattr(self, useless)!r}, but has no effect with select={select!r}"
                f" (preset {self.preset!r}); leave it out or use select={other!r}"
            )
        if scope == "unpublished-block" and select == "topk":
            raise ValueError(
                "scope is 'unpublished-block', which is for thresholds only, but select is 'topk':"
                " use select='threshold', or scope 'query', 'head' or 'unpublished-all'"
            )

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the preset's values and, for a grid, with chunks that fit the grid.

        The values are the same for all models. The first quarter of the steps stays dense, as in
        the paper.
        """
        settled: dict[str, Any] = {
            "select": self._select,
            "scope": self._scope,
            "tau": self._tau,
            "tile": self._tile,
            "dense_layers": 0 if self.dense_layers is None else self.dense_layers,
            "dense_steps": _DENSE_STEPS if self.dense_steps is None else self.dense_steps,
        }
        if grid is not None:
            for kind in PARTITIONS:
                settled[f"chunk_{kind}"] = self._chunk(kind, grid)
            if self._select == "topk" and self.topk is None:
                settled["topk"] = tuple(self._topk(kind, grid) for kind in PARTITIONS)
        return replace(self, **settled)

    # The values of the parameters that may be None.

    @property
    def _select(self) -> str:
        return self.select or _PRESETS[self.preset].select

    @property
    def _scope(self) -> str:
        return self.scope or _PRESETS[self.preset].scope

    @property
    def _tau(self) -> float | None:
        return _TAU if self.tau is None and self._select == "threshold" else self.tau

    @property
    def _tile(self) -> int | None:
        return self.tile or (_TILE if self.granularity == "tile" else None)

    def _chunk(self, kind: str, grid: TokenGrid) -> Sides | float:
        given: Sides | float | None = getattr(self, f"chunk_{kind}")
        video = grid.alone
        return recommended_chunk(kind, video) if given is None else given

    def _topk(self, kind: str, grid: TokenGrid) -> int | None:
        if self._select == "threshold":
            return None
        if self.topk is None:
            video = grid.alone
            blocks = len(self._known_partition(kind, video).lengths())
            return max(2, round(_SHARE[kind] * blocks))
        return self.topk[PARTITIONS.index(kind)] if isinstance(self.topk, tuple) else self.topk

    def layer_kind(self, layer: int) -> int:
        return layer % len(self.partitions)

    @property
    def heads_apart(self) -> bool:
        return self._scope in ("query", "head")

    def _kind(self, layer: int) -> str:
        return self.partitions[self.layer_kind(layer)]

    def partition(self, grid: TokenGrid, layer: int) -> Partition | JointPartition:
        """The blocks of the tokens of `grid` in a layer."""
        kind = self._kind(layer)
        spans = self.spans(grid)
        if len(spans) == 1:
            return self._known_partition(kind, grid)
        if (grid, kind) not in self._joint_known:
            parts = (self._known_partition(kind, span.grid) for span in spans)
            self._joint_known[grid, kind] = JointPartition(tuple(parts))
        return self._joint_known[grid, kind]

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        return super().spans(grid) if self.references == "exact" else spans_of(grid, BLOCK)

    def pools(self, grid: TokenGrid, layer: int) -> list[Pool]:
        """The pools of blocks among which tokens of `grid` select in a layer.

        The video's tokens select in the first pool. With "visible" references each reference has a
        pool of its own, with "local" references there is one pool for all.
        """
        rule = self.rule(grid, layer)
        partition = self.partition(grid, layer)
        if not isinstance(partition, JointPartition):
            return [Pool(tuple(partition.lengths()), rule)]
        each = [tuple(part.lengths()) for part in partition.parts]
        if self.references == "local":
            each = [tuple(length for lengths in each for length in lengths)]
        blocks = len(partition.parts[0].lengths())
        return [Pool(lengths, _for_blocks(rule, len(lengths) / blocks)) for lengths in each]

    def rule(self, grid: TokenGrid, layer: int) -> Rule:
        """The rule that selects blocks on `grid` in a layer."""
        return Rule(
            self._scope,
            topk=self._topk(self._kind(layer), grid),
            tau=self._tau,
            centre_keys=self.centre_keys,
            tile=self._tile or 1,
        )

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
        query, key, value, key_mask, bits = self._selected(query, key, value, site, key_mask)
        partition = self.partition(site.grid, site.layer)
        out = selected_attention(
            query,
            key,
            value,
            partition.key_blocks(query.device),
            bits,
            scale=scale,
            key_mask=key_mask,
        )
        return partition.from_blocks(out)

    def selection(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        site: Site,
        *,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The selected blocks of `attend` for the same arguments.

        Returns:
            The bits that `select_blocks` returns, with queries in the order of the partition.
        """
        return self._selected(query, key, key, site, key_mask)[-1]

    def selection_mask(self, bits: torch.Tensor, grid: TokenGrid, layer: int) -> SelectionMask:
        """The selection of one head as a mask.

        Args:
            bits: the bits of one head and sample from `selection`, `(tokens, words)`.
            grid: the tokens of the call.
            layer: index of the block of the model.
        """
        partition = self.partition(grid, layer)
        blocks = partition.key_blocks(torch.device("cpu"))
        chosen = unpack_bits(bits.cpu(), blocks.blocks)
        block_of = torch.arange(blocks.blocks).repeat_interleave(blocks.starts.diff().long())
        there = partition.positions()
        back = there.argsort()
        return SelectionMask(grid, chosen[back], block_of[back])

    def _selected(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        key_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Query, key, value and key mask in the order of the partition, and the selected blocks."""
        key, value = (for_every_head(x, query) for x in (key, value))
        partition = self.partition(site.grid, site.layer)
        query, key, value = (partition.to_blocks(x) for x in (query, key, value))
        key_mask = None if key_mask is None else partition.to_blocks(key_mask)
        blocks: tuple[KeyBlocks, ...] = (partition.key_blocks(query.device),)
        if isinstance(partition, JointPartition) and self.references == "visible":
            blocks = partition.pools(query.device)
        pools = self.pools(site.grid, site.layer)
        bits, *others = (
            select_blocks(query, key, its_blocks, pool.rule, key_mask=key_mask)
            for its_blocks, pool in zip(blocks, pools, strict=True)
        )
        for its_blocks, selected in zip(blocks[1:], others, strict=True):
            bits[:, :, its_blocks.video] = selected[:, :, its_blocks.video]
        return query, key, value, key_mask, bits

    def _known_partition(self, kind: str, grid: TokenGrid) -> Partition:
        """The partition of a kind, kept for the next call."""
        known = grid, kind
        if known not in self._partitions_known:
            chunk = _chunk_on(grid, self._chunk(kind, grid))
            self._partitions_known[known] = Partition(grid, chunk)
        return self._partitions_known[known]

    def expected_density(self, grid: TokenGrid, layer: int) -> float:
        """The expected share of the token pairs of `grid` that attend in a layer, text included.

        The share is exact for "topk" with blocks of one length. For "threshold" it is an estimate
        from normally distributed scores; according to the paper, real scores are close to normal.
        """
        shares = [self._share(pool) for pool in self.pools(grid, layer)]
        tokens = [sum(pool.lengths) for pool in self.pools(grid, layer)]
        return 1 - sum(
            (1 - share) * (count / grid.tokens) ** 2
            for share, count in zip(shares, tokens, strict=True)
        )

    def _share(self, pool: Pool) -> float:
        """The expected share of a pool's blocks that a query of the pool selects."""
        blocks, rule = len(pool.lengths), pool.rule
        if rule.topk is not None:
            return min(rule.topk, blocks) / blocks
        assert rule.tau is not None
        return max(_share_by_threshold(rule.tau, pool.ranked), 1 / blocks)

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work:
        channels = heads * head_dim
        density = self.expected_density(grid, layer)
        pools = self.pools(grid, layer)
        selection = sum(
            2 * pool.queries * len(pool.lengths) * channels for pool in pools if not pool.is_dense
        )
        return Work(
            flops=4 * density * grid.tokens**2 * channels + selection,
            density=density,
            selection_flops=selection,
            is_exact=all(
                pool.is_dense or (pool.rule.topk is not None and len(set(pool.lengths)) == 1)
                for pool in pools
            ),
        )


@dataclass(frozen=True)
class Pool:
    """Blocks among which the tokens of these blocks select.

    Attributes:
        lengths: tokens of each block.
        rule: the rule that selects.
    """

    lengths: tuple[int, ...]
    rule: Rule

    @property
    def queries(self) -> int:
        """The queries, or tiles of queries, that select."""
        return -(-sum(self.lengths) // self.rule.tile)

    @property
    def is_dense(self) -> bool:
        """Whether all queries select all blocks."""
        topk = self.rule.topk
        return self.rule.tau == 1 or (topk is not None and topk >= len(self.lengths))

    @property
    def ranked(self) -> int:
        """The number of pairs of query and block, of one head, that are ranked together."""
        blocks = len(self.lengths)
        alone = {"query": blocks, "unpublished-block": self.queries}
        return alone.get(self.rule.scope, self.queries * blocks)


def _for_blocks(rule: Rule, times: float) -> Rule:
    """The rule with the same share of `times` as many blocks, at least the own and one more."""
    if rule.topk is None:
        return rule
    return replace(rule, topk=max(min(rule.topk, 2), round(rule.topk * times)))


def _chunk_on(grid: TokenGrid, chunk: Sides | float) -> Chunk:
    """The sides of a block on a grid for a tuple, the tokens of a run for a number of frames."""
    if not isinstance(chunk, tuple):
        return (min(max(1, int(chunk * grid.frame_tokens)), grid.video_tokens),)
    sizes = (grid.frames, grid.height, grid.width)
    sides = (grid.frames, *chunk) if len(chunk) == 2 else chunk
    return tuple(min(side, size) for side, size in zip(sides, sizes, strict=True))


def _share_by_threshold(tau: float, pool: int) -> float:
    """The share of the highest normally distributed scores whose sum is `tau` of the total.

    Scores count from the lowest score of the pool. The lowest score lies at the expected distance
    below the mean for a pool of `pool` scores.
    """
    normal = NormalDist()
    if tau == 1 or pool < 2:
        return 1.0
    spread = 1 / normal.inv_cdf((pool - 0.375) / (pool + 0.25))
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        sum_ = share + spread * normal.pdf(normal.inv_cdf(1 - share))
        low, high = (share, high) if sum_ < tau else (low, share)
    return high
