"""Agent Attention: a few mean queries gather from all tokens, and all tokens ask these agents.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874.
The paper's AgentSD, for U-Nets without any training, also merges tokens. The agents of video
transformers, means over cells of tokens, are not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from diffattn._checks import (
    FLAG,
    Allowed,
    check,
    check_fields,
    count,
    is_number,
    lists_to_tuples,
    number,
    sides,
)
from diffattn.grid import TokenGrid
from diffattn.interception import through_modes
from diffattn.masks.base import BLOCK
from diffattn.methods.agent.agents import (
    Agents,
    Beside,
    ask_agents,
    cell_agents,
    cell_count,
    dense_attention,
    gather_values,
    joined_agents,
)
from diffattn.methods.base import Adaptation, Compiled, Method, Site, SiteWeights, Work
from diffattn.models import family_of, makes_images
from diffattn.spans import Division, Span, division_of, spans_of

if TYPE_CHECKING:
    from collections.abc import Callable

_UNET = "unet"
# In a picture an agent stands for about as many tokens as in AgentSD. In a video it stands for a
# few times as many, and attention at 480p is some 30 times cheaper.
_IMAGE_CELL = (1, 4, 4)
_VIDEO_CELL = (3, 5, 4)
# AgentSD has this many at 512 x 512 pixels.
_FEW_AGENTS = 256


def _are_factors(value: Any) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return len(numbers) > 0 and all(is_number(one) for one in numbers)


_FACTORS = Allowed("a finite number, or one for each block of the model", _are_factors)
_SHARE = replace(number(at_least=0, at_most=1), words="a share of the tokens, 0 to 1")
_ALLOWED = {
    "k_scale2": _FACTORS,
    "k_shortcut": _FACTORS,
    "cell": sides(3),
    "stride": sides(2),
    "late_stride": sides(2),
    "ratio": _SHARE,
    "agent_ratio": _SHARE,
    "max_downsample": count(1),
    "merge_crossattn": FLAG,
    "merge_mlp": FLAG,
}


@dataclass(frozen=True, kw_only=True)
class AgentAttn(Method):
    """Agent Attention (arXiv 2312.08874), for models that were not trained for it.

    An agent is the mean query of tokens that belong together. As queries, the agents gather values
    from all tokens. As keys, with the gathered values, the agents answer the queries of all tokens.
    Both steps are softmax attention, and their cost grows with tokens times agents. Details smaller
    than an agent's tokens are lost: the method is for the first, noisy steps.

    On transformers an agent is the mean over a cell of video tokens. Text queries are dense. Video
    queries see text keys beside the agents, in the same softmax.

    On U-Nets (AgentSD) similar tokens are merged before attention, and each token gets a copy of
    its merged token's output. Merging happens in all steps. Steps and layers that `dense_steps`,
    `last_dense_steps` or `dense_layers` make dense have no agents: attention there is dense over
    the merged tokens, and merging uses the finer cells of `late_stride`. `ratio=0` merges nothing.

    Agents that are half as many as the tokens or more save nothing: attention is dense then.

    Attributes:
        k_scale2: the scale of the agents' scores is `head_dim ** (-0.5 * k_scale2)`: 1 is the usual
            scale, and smaller numbers are sharper. One number, or one for each of the model's
            blocks, see `diffattn.calibrate_agent`.
        k_shortcut: share of a token's own value to add to its output, for the details that agents
            lose. One number, or one for each block.
        cell: on transformers, latent frames, rows and columns of the tokens of an agent. Cells at
            the end of the grid may be smaller.
        ratio: on U-Nets, the share of the tokens to merge into others, limited to all but one token
            of each cell.
        agent_ratio: on U-Nets, the share of the tokens to merge when forming the clusters whose
            means are the agents.
        stride: on U-Nets, rows and columns of a cell in steps with agents. Each cell has one token
            that others are merged into.
        late_stride: rows and columns of a cell in steps without agents.
        max_downsample: the coarsest grid that is changed, as the number of times that it is smaller
            than the latents. None is the finest grid that the U-Net attends on: 1 for Stable
            Diffusion 1.5 and 2 for XL. Blocks on coarser grids are dense and merge nothing.
        merge_crossattn, merge_mlp: merge tokens before the cross-attention or the feed-forward
            layers of these blocks, too.
        seed: chooses the token of each cell that others are merged into, at random: the same for
            the same seed, step and block, and for all samples. None is the first token of a cell.
        last_dense_steps: steps at the end of the run without agents; the paper uses agents in the
            first 40 % of the steps.
        references: with "exact" and "visible" references are treated as text is: their queries are
            dense, and video queries see their keys beside the agents. With "local" each reference
            has agents of its own, means over cells of the same size, and the queries of the video
            and of all references ask the agents of all.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "agent"
    paper: ClassVar[str] = "arXiv 2312.08874"
    same_in_every_step: ClassVar[frozenset[str]] = frozenset(
        (
            "k_scale2", "k_shortcut", "ratio", "agent_ratio", "stride", "late_stride",
            "max_downsample", "merge_crossattn", "merge_mlp", "seed",
        )
    )  # fmt: skip

    last_dense_steps: int | float = field(
        default=0.6, metadata={"help": "steps at the end of a run without agents"}
    )
    k_scale2: float | tuple[float, ...] = field(
        default=0.3, metadata={"help": "how sharply agents are asked: 1 as usual, less is sharper"}
    )
    k_shortcut: float | tuple[float, ...] = field(
        default=0.075, metadata={"help": "share of its own value that a token adds to its output"}
    )
    cell: tuple[int, int, int] | None = field(
        default=None, metadata={"help": "frames,rows,columns of tokens that share an agent"}
    )
    ratio: float = field(default=0.4, metadata={"help": "share of a U-Net's tokens to merge"})
    agent_ratio: float = field(
        default=0.95, metadata={"help": "share of a U-Net's tokens to merge into agents"}
    )
    stride: tuple[int, int] = field(
        default=(4, 4), metadata={"help": "rows,columns of a U-Net's cells with agents"}
    )
    late_stride: tuple[int, int] = field(
        default=(2, 2), metadata={"help": "rows,columns of a U-Net's cells without agents"}
    )
    max_downsample: int | None = field(
        default=None, metadata={"help": "coarsest grid of a U-Net (1, 2, 4 ..); finest if left out"}
    )
    merge_crossattn: bool = field(
        default=False, metadata={"help": "merge for cross-attention too (U-Nets)"}
    )
    merge_mlp: bool = field(
        default=False, metadata={"help": "merge for feed-forward layers too (U-Nets)"}
    )
    seed: int | None = field(
        default=0, metadata={"help": "seeds the choice of tokens to merge into; null: the first"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lists_to_tuples(self, "k_scale2", "k_shortcut", "cell", "stride", "late_stride")
        check_fields(self, _ALLOWED)
        if self.seed is not None:
            check("seed", self.seed, count(0))

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the cells for videos or for images; no block is dense.

        The grid has no influence.
        """
        return replace(
            self,
            cell=self.cell or (_IMAGE_CELL if makes_images(family) else _VIDEO_CELL),
            dense_layers=self.dense_layers or 0,
            dense_steps=self.dense_steps or 0,
        )

    def caution(self, grid: TokenGrid) -> str | None:
        agents = cell_count(grid, self.cell or _VIDEO_CELL)
        if agents >= _FEW_AGENTS or self._cell_count(grid) is None:
            return None
        return (
            f"{agents} agents for {grid.video_tokens} tokens are few, and details are lost; the"
            f" paper has {_FEW_AGENTS} or more"
        )

    def adaptation(self, model: torch.nn.Module) -> Adaptation | None:
        family = family_of(model)
        blocks = max(family.layers(model).values()) + 1
        for name in ("k_scale2", "k_shortcut"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != blocks:
                raise ValueError(
                    f"{name} has {len(value)} numbers, but {type(model).__name__} has {blocks}"
                    f" blocks with attention: give one for each, or one for all"
                )
        if family.name != _UNET:
            return None
        # This module imports diffusers.
        from diffattn.methods.agent.merged_blocks import MergedBlocks

        return MergedBlocks(model, type(self))

    def compiled_as(self, family: str) -> Compiled:
        # Merging in a U-Net depends on the values of the tokens, and so breaks the graph anyway.
        if family == _UNET:
            return "outside"
        # An operator of a whole group of blocks does not know the numbers of one block.
        return "traced" if self._differs_by_block else "operator"

    @property
    def _differs_by_block(self) -> bool:
        return isinstance(self.k_scale2, tuple) or isinstance(self.k_shortcut, tuple)

    def layer_weights(self, layer: int) -> SiteWeights | None:
        if not self._differs_by_block:
            return None
        return _Factors(_at(self.k_scale2, layer), _at(self.k_shortcut, layer))

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        return spans_of(grid, BLOCK) if self.references == "local" else super().spans(grid)

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work:
        """The cost of a call on a transformer, without the cost of computing the means."""
        channels = heads * head_dim
        agents = self._cell_count(grid)
        if agents is None:
            return Work(flops=4 * grid.tokens**2 * channels, density=1)
        division = self.division(grid)
        text = division.others
        pairs = agents * grid.tokens + division.tokens * (agents + text) + text * grid.tokens
        return Work(flops=4 * pairs * channels)

    def agents(
        self, query: torch.Tensor, site: Site, key_mask: torch.Tensor | None = None
    ) -> Agents | None:
        """The agents of a call; None if agents would save nothing.

        Args:
            query: (batch, tokens, heads, head_dim), text included.
            site: the origin of the call.
            key_mask: bool (batch, tokens): False for padded keys.
        """
        if site.family == _UNET:
            merging = site.merging
            if merging is None or merging.agent_of is None:
                return None
            return Agents(merging.agent_means(query))
        if self._cell_count(site.grid) is None:
            return None
        of_spans = []
        for span in self.division(site.grid).spans:
            mask = None if key_mask is None else key_mask[:, span.grid.video]
            own = query[:, span.grid.video]
            of_spans.append(cell_agents(own, span.grid, self.cell or _VIDEO_CELL, mask))
        return joined_agents(of_spans)

    def division(self, grid: TokenGrid) -> Division:
        """The tokens whose queries ask agents, apart from all others."""
        return division_of(grid, self.spans(grid))

    def _cell_count(self, grid: TokenGrid) -> int | None:
        """The number of agents of a call on a transformer; None if agents would save nothing."""
        division = self.division(grid)
        cell = self.cell or _VIDEO_CELL
        count = sum(cell_count(span.grid, cell) for span in division.spans)
        return count if 2 * count < division.tokens else None

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
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        attend = partial(self._attend, site=site, scale=scale, key_mask=key_mask)
        return through_modes(attend, query, key, value)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        scale: float,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        agents = self.agents(query, site, key_mask)
        if agents is None:
            return dense_attention(query, key, value, scale, key_mask)
        division = self.division(site.grid)
        ask = asking(agents, query, key, value, division, scale, key_mask)
        k_scale2, k_shortcut = self._factors(site, query.device)
        out = ask(sharpness(query.shape[-1], k_scale2)) + k_shortcut * division.inside(value)
        return with_dense_text(out.to(query.dtype), query, key, value, division, scale, key_mask)

    def _factors(
        self, site: Site, device: torch.device
    ) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """`k_scale2` and `k_shortcut` at a site: numbers, or tensors on `device`."""
        factors: Any = site.weights
        if factors is None:
            assert not isinstance(self.k_scale2, tuple)
            assert not isinstance(self.k_shortcut, tuple)
            return self.k_scale2, self.k_shortcut
        return factors.k_scale2.to(device), factors.k_shortcut.to(device)


class _Factors(SiteWeights):
    """`k_scale2` and `k_shortcut` of a block, as tensors: compiled code would inline numbers."""

    k_scale2: torch.Tensor
    k_shortcut: torch.Tensor

    def __init__(self, k_scale2: float, k_shortcut: float) -> None:
        super().__init__()
        self.register_buffer("k_scale2", torch.tensor(k_scale2), persistent=False)
        self.register_buffer("k_shortcut", torch.tensor(k_shortcut), persistent=False)

    def place_beside(self, module: torch.nn.Module) -> None:
        # The numbers stay in float32: rounding them would change a whole block.
        for other in module.parameters():
            self.to("cpu" if other.is_meta else other.device)
            break


def sharpness(head_dim: int, k_scale2: float | torch.Tensor) -> Any:
    """The factor of the agents' scores, in addition to the usual `head_dim ** -0.5`."""
    return head_dim ** (0.5 * (1 - k_scale2))


def asking(
    agents: Agents,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    division: Division,
    scale: float,
    key_mask: torch.Tensor | None,
) -> Callable[[Any], torch.Tensor]:
    """Let the agents of a call gather values.

    Returns:
        A function that gives, for a sharpness, the attention output of the queries inside of the
        division, (batch, tokens, heads, head_dim).
    """
    gathered = gather_values(agents, key, value, scale, key_mask)
    beside = None
    if division.others:
        mask = None if key_mask is None else division.outside(key_mask)
        beside = Beside(division.outside(key), division.outside(value), mask)

    def ask(sharpness: float | torch.Tensor) -> torch.Tensor:
        own = division.inside(query)
        return ask_agents(own, agents, gathered, scale, sharpness, beside)

    return ask


def with_dense_text(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    division: Division,
    scale: float,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """The output of all tokens: `out` inside of the division, dense attention outside."""
    if not division.others:
        return out
    text = dense_attention(division.outside(query), key, value, scale, key_mask)
    return division.joined(out, text)


def _at(value: float | tuple[float, ...], layer: int) -> float:
    return value[layer] if isinstance(value, tuple) else value
