"""Agent Attention: a few mean queries gather from all tokens, and all tokens ask these agents.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874.
Its AgentSD, for U-Nets that nothing is trained for, merges tokens besides. The agents of video
transformers, means over boxes of tokens, are not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
from diffattn.methods.agent.agents import (
    Agents,
    Beside,
    ask_agents,
    cell_agents,
    cell_count,
    dense_attention,
    gather_values,
)
from diffattn.methods.base import Adaptation, Method, Site, SiteWeights, Work
from diffattn.models import family_of, makes_images

if TYPE_CHECKING:
    from collections.abc import Callable

_UNET = "unet"
# About as many tokens as AgentSD has for an agent in a picture; a few times as many in a video,
# which makes attention some 30 times cheaper at 480p.
_IMAGE_CELL = (1, 4, 4)
_VIDEO_CELL = (3, 5, 4)


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

    Agents are the means of queries of tokens that belong together. As queries they gather values
    from all tokens; as keys, with what they gathered for values, they answer all tokens. It is
    softmax twice, and its cost grows with the tokens times the agents. What agents cannot tell
    tokens apart is lost, which is why they are for the first, noisy steps.

    On transformers an agent is the mean over a box of video tokens. Text queries are dense, and
    text keys are asked beside the agents, in the same softmax.

    On U-Nets (AgentSD) tokens that are alike are merged before attention and get copies of its
    output after it, with the agents as well as in the steps without them: `dense_steps` and the
    like leave out the agents and attend densely over the merged tokens. `ratio=0` merges none.
    Where agents are left out and merging goes on, it is over the finer cells of `late_stride`.

    Where agents are half as many as tokens or more they save nothing, and attention is dense.

    Attributes:
        k_scale2: scores of agents have the scale `head_dim ** (-0.5 * k_scale2)`, in place of the
            usual one of 1: the smaller, the sharper. One number, or one for each of the model's
            blocks, see `diffattn.calibrate_agent`.
        k_shortcut: how much of its own value a token gets besides, whose details agents lose. One
            number, or one for each block.
        cell: latent frames, rows and columns of a box of tokens with one agent, on transformers.
            Boxes at the end of the grid may be smaller.
        ratio: on U-Nets, the share of the tokens that is merged into others; what fills up all but
            one token of each cell is the most.
        agent_ratio: the same for the clusters that agents are the means of.
        stride: rows and columns of the cells, each of which has a token that others are merged
            into, while there are agents.
        late_stride: the same without agents.
        max_downsample: how many times smaller than the latents the grid of a block of a U-Net may
            be to be touched at all; None is the finest grid that the U-Net attends on, which is 1
            for Stable Diffusion 1.5 and 2 for XL. Blocks beyond it are dense and not merged.
        merge_crossattn, merge_mlp: let cross-attention and feed-forward layers of these blocks have
            the merged tokens too.
        seed: which token of each cell others are merged into: at random, but the same for the same
            seed, step and block, in all samples; None is the first token.
        last_dense_steps: without agents; the paper has them in the first 40 % of the steps.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "agent"
    paper: ClassVar[str] = "arXiv 2312.08874"

    last_dense_steps: int | float = field(
        default=0.6, metadata={"help": "steps at the end of a run without agents"}
    )
    k_scale2: float | tuple[float, ...] = field(
        default=0.3, metadata={"help": "how sharply agents are asked: 1 as usual, less is sharper"}
    )
    k_shortcut: float | tuple[float, ...] = field(
        default=0.075, metadata={"help": "how much of its own value a token gets besides"}
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
        default=0, metadata={"help": "of the tokens to merge into; null for the first of a cell"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lists_to_tuples(self, "k_scale2", "k_shortcut", "cell", "stride", "late_stride")
        check_fields(self, _ALLOWED)
        if self.seed is not None:
            check("seed", self.seed, count(0))

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the boxes for videos or for images; no block is dense.

        It does not depend on the grid.
        """
        return replace(
            self,
            cell=self.cell or (_IMAGE_CELL if makes_images(family) else _VIDEO_CELL),
            dense_layers=self.dense_layers or 0,
            dense_steps=self.dense_steps or 0,
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
        # It imports diffusers.
        from diffattn.methods.agent.merged_blocks import MergedBlocks

        return MergedBlocks(model, type(self))

    def layer_weights(self, layer: int) -> SiteWeights | None:
        if not isinstance(self.k_scale2, tuple) and not isinstance(self.k_shortcut, tuple):
            return None
        return _Factors(_at(self.k_scale2, layer), _at(self.k_shortcut, layer))

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work:
        """What a call on a transformer costs; the means themselves are not counted."""
        channels = heads * head_dim
        agents = self._cell_count(grid)
        if agents is None:
            return Work(flops=4 * grid.tokens**2 * channels, density=1)
        text = grid.tokens - grid.video_tokens
        pairs = agents * grid.tokens + grid.video_tokens * (agents + text) + text * grid.tokens
        return Work(flops=4 * pairs * channels)

    def agents(
        self, query: torch.Tensor, site: Site, key_mask: torch.Tensor | None = None
    ) -> Agents | None:
        """The agents of a call; None where they would save nothing."""
        if site.family == _UNET:
            merging = site.merging
            if merging is None or merging.agent_of is None:
                return None
            return Agents(merging.agent_means(query))
        if self._cell_count(site.grid) is None:
            return None
        video = site.grid.video
        mask = None if key_mask is None else key_mask[:, video]
        return cell_agents(query[:, video], site.grid, self.cell or _VIDEO_CELL, mask)

    def _cell_count(self, grid: TokenGrid) -> int | None:
        """How many agents a call on a transformer has; None where they would save nothing."""
        count = cell_count(grid, self.cell or _VIDEO_CELL)
        return count if 2 * count < grid.video_tokens else None

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
        agents = self.agents(query, site, key_mask)
        if agents is None:
            return dense_attention(query, key, value, scale, key_mask)
        ask = asking(agents, query, key, value, site.grid, scale, key_mask)
        k_scale2, k_shortcut = self._factors(site, query.device)
        video = site.grid.video
        out = ask(sharpness(query.shape[-1], k_scale2)) + k_shortcut * value[:, video]
        return with_dense_text(out.to(query.dtype), query, key, value, site.grid, scale, key_mask)

    def _factors(
        self, site: Site, device: torch.device
    ) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """`k_scale2` and `k_shortcut` of a site."""
        factors: Any = site.weights
        if factors is None:
            assert not isinstance(self.k_scale2, tuple)
            assert not isinstance(self.k_shortcut, tuple)
            return self.k_scale2, self.k_shortcut
        return factors.k_scale2.to(device), factors.k_shortcut.to(device)


class _Factors(SiteWeights):
    """What differs from block to block, as tensors: numbers would be compiled in for each."""

    k_scale2: torch.Tensor
    k_shortcut: torch.Tensor

    def __init__(self, k_scale2: float, k_shortcut: float) -> None:
        super().__init__()
        self.register_buffer("k_scale2", torch.tensor(k_scale2), persistent=False)
        self.register_buffer("k_shortcut", torch.tensor(k_shortcut), persistent=False)

    def place_beside(self, module: torch.nn.Module) -> None:
        # Numbers for a whole block are worth their precision.
        for other in module.parameters():
            self.to("cpu" if other.is_meta else other.device)
            break


def sharpness(head_dim: int, k_scale2: float | torch.Tensor) -> Any:
    """What scores of agents are multiplied by, besides the usual `head_dim ** -0.5`."""
    return head_dim ** (0.5 * (1 - k_scale2))


def asking(
    agents: Agents,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    scale: float,
    key_mask: torch.Tensor | None,
) -> Callable[[Any], torch.Tensor]:
    """Let the agents of a call gather; returns what its video queries find, by the sharpness."""
    gathered = gather_values(agents, key, value, scale, key_mask)
    video = grid.video
    beside = None
    if grid.text_before or grid.text_after:
        mask = None if key_mask is None else grid.text_of(key_mask)
        beside = Beside(grid.text_of(key), grid.text_of(value), mask)

    def ask(sharpness: float | torch.Tensor) -> torch.Tensor:
        return ask_agents(query[:, video], agents, gathered, scale, sharpness, beside)

    return ask


def with_dense_text(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    scale: float,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Put the dense attention of the text's queries around the video's output."""
    if not grid.text_before and not grid.text_after:
        return out
    text = dense_attention(grid.text_of(query), key, value, scale, key_mask)
    return torch.cat([text[:, : grid.text_before], out, text[:, grid.text_before :]], dim=1)


def _at(value: float | tuple[float, ...], layer: int) -> float:
    return value[layer] if isinstance(value, tuple) else value
