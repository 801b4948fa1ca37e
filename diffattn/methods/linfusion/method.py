"""LinFusion: linear attention over features of queries and keys that a small network adapts.

Liu et al., "LinFusion: 1 GPU, 1 Minute, 16K Image", arXiv 2409.02097. The paper is about the U-Nets
of Stable Diffusion. The form for transformers, with their rotary position embedding and with text
in the sequence, is this project's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F

from diffattn._checks import FLAG, Allowed, check_fields, count, is_whole, number
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.interception import through_modes
from diffattn.kernels.linear import CHUNK, linear_attention
from diffattn.masks.base import BLOCK
from diffattn.methods.base import Compiled, Method, Site, SiteState, SiteWeights, Work
from diffattn.methods.checkpoint import parameters_by_own_name
from diffattn.methods.linfusion.projections import with_input_maps
from diffattn.models import FAMILIES, family_of
from diffattn.operator import (
    DEFAULT_BACKENDS,
    add_keys,
    asked_backend,
    attention,
    choose_backend,
    every_pair,
)
from diffattn.spans import Division, Span, division_of, spans_of

# U-Nets, and transformers whose rotary position embedding can be read at a site, see `Family`.
FAMILIES_WITH_IT = ("unet", *(family.name for family in FAMILIES if family.rotary is not None))

_IDENTITY = -1
_WIDEST = 1 << 16  # channels of an inner layer: more than any model has

# The backend of linear attention for each backend of `attention`: "triton" is a kernel, "torch" is
# matrix products, for every device.
_BACKENDS: dict[str, Literal["torch", "triton"]] = {
    "triton": "triton",
    "cpu": "torch",
    "flex": "torch",
    "reference": "torch",
}


def _is_width(mid_dim: Any) -> bool:
    if isinstance(mid_dim, float):
        return 0 < mid_dim < 1
    return is_whole(mid_dim) and (1 <= mid_dim <= _WIDEST or mid_dim == _IDENTITY)


_ALLOWED = {
    "mid_dim": Allowed(
        f"an integer from 1 to {_WIDEST}, a fraction of the layer's width between 0 and 1,"
        f" {_IDENTITY} for no network, or None",
        _is_width,
    ),
    "eps": number(above=0),
    "chunk": count(1),
    "reference_arithmetic": FLAG,
}


@dataclass(frozen=True, kw_only=True)
class LinFusionAttn(Method):
    """LinFusion (arXiv 2409.02097).

    The cost is linear in the number of tokens. Every token sees all other tokens through a state
    of a fixed size, head_dim x head_dim for each head. The weights of a model are not made for
    linear attention: without training, pictures lose their composition. Weights that were distilled
    for Stable Diffusion 1.5, 2.1 and XL are published, see `load_linfusion_checkpoint`. No weights
    are published for other models.

    Each site has a trained network that adapts its queries and keys. Before training the network
    adds 0: the site computes linear attention over the model's own projections. In transformers the
    rotary embedding applies to the numerator alone. Text sees everything by softmax, as in the
    model. Video tokens see text by softmax, and a trained gate weighs text against the video.

    Attributes:
        mid_dim: inner width of the network that adapts queries and keys, in channels or as a
            fraction of the layer's width, such as the 1/16 of the public script for XL. None is as
            wide as the layer. -1 is no network, which doubles the projected inputs, as in the
            public code.
        eps: addend of the denominator. Published weights were trained with the default.
        chunk: tokens whose features are in memory at a time, if no GPU kernel is used.
        reference_arithmetic: compute as the public code does, in the dtype of the model, where
            float16 may overflow; for U-Nets only. Otherwise features and state are float32.
        references: with "exact" and "visible" references are treated as text is: attention to and
            from them is softmax, and its cost grows with the tokens of references times all tokens.
            With "local" the tokens of references join those of the video in linear attention.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "linfusion"
    paper: ClassVar[str] = "arXiv 2409.02097"
    same_in_every_step: ClassVar[frozenset[str]] = frozenset(("mid_dim",))

    mid_dim: int | float | None = field(
        default=None,
        metadata={"help": "width of what adapts queries and keys, or fraction of it; -1 for none"},
    )
    eps: float = field(default=1e-4, metadata={"help": "added to the denominator"})
    chunk: int = field(default=CHUNK, metadata={"help": "tokens per matrix product on the CPU"})
    reference_arithmetic: bool = field(
        default=False, metadata={"help": "the public code's arithmetic, which may overflow"}
    )
    _every_pair: dict[tuple[int, int, torch.device], BlockLayout] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _ALLOWED)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with every None but `mid_dim` replaced, by the same values for all models.

        All layers and steps are linear, as in the distillation of the paper's weights.
        """
        return replace(self, dense_layers=self.dense_layers or 0, dense_steps=self.dense_steps or 0)

    def adaptation(self, model: torch.nn.Module) -> None:
        """None for a model that the method works in.

        Raises:
            ValueError: if the model's position embedding is not known, or a transformer is to have
                `reference_arithmetic`.
        """
        self._check_family(family_of(model).name, type(model).__name__)

    def check_family(self, family: str) -> None:
        if family:
            self._check_family(family, f"models of the family {family}")

    def _check_family(self, family: str, shown: str) -> None:
        if family not in FAMILIES_WITH_IT:
            raise ValueError(
                f"linfusion cannot be attached to {shown}: it needs to know the"
                f" position embedding, which it does of {', '.join(FAMILIES_WITH_IT)}"
            )
        if self.reference_arithmetic and family != "unet":
            raise ValueError(
                f"reference_arithmetic is True, but the public code has none for"
                f" {shown}; leave it out"
            )

    def compiled_as(self, family: str) -> Compiled:
        texts = {known.name: known.text for known in FAMILIES}
        # Among video tokens alone the arrangement of the tokens does not matter.
        return "row" if texts.get(family) is None else "outside"

    def caution(self, grid: TokenGrid) -> str:
        return "without trained weights pictures lose their composition"

    def site_weights(self, module: torch.nn.Module, joint: bool) -> LinFusionWeights:
        return LinFusionWeights(module, self.mid_dim, joint)

    def site_processor(self, processor: Any, state: SiteState) -> Any:
        return with_input_maps(processor, self.type, state)

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        return spans_of(grid, BLOCK) if self.references == "local" else super().spans(grid)

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work:
        """The cost of a call, with the adapting networks and without computing the features."""
        channels = heads * head_dim
        division = self._division(grid)
        video, text = division.tokens, division.others
        width = 0 if self.mid_dim == _IDENTITY else _middle(channels, self.mid_dim)
        linear = 4 * video * channels * head_dim + 8 * video * channels * width
        return Work(flops=linear + 4 * (text * grid.tokens + video * text) * channels)

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
        if self.reference_arithmetic:
            attend = partial(_in_reference_arithmetic, eps=self.eps, key_mask=key_mask)
            return through_modes(attend, query, key, value)
        division = self._division(site.grid)
        rotation = _rotation(site, query, division)
        if division.others:
            from diffattn.kernels.outside_graphs import call_outside  # which imports Dynamo

            # The content of a layout depends on the mask and cannot be traced.
            attend = partial(
                partial(call_outside, self._attend_jointly),
                site=site,
                division=division,
                rotation=rotation,
                scale=scale,
                key_mask=key_mask,
            )
        else:
            attend = partial(self._attend_linearly, rotation=rotation, key_mask=key_mask)
        return through_modes(attend, query, key, value)

    def _division(self, grid: TokenGrid) -> Division:
        """The tokens of linear attention, apart from those of softmax attention."""
        return division_of(grid, self.spans(grid))

    def _attend_linearly(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotation: torch.Tensor | None,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        device = query.device
        has_kernel = device.type in DEFAULT_BACKENDS
        chosen = choose_backend(device) if has_kernel else asked_backend() or "cpu"
        if chosen not in _BACKENDS:
            raise NotImplementedError(
                f"backend {chosen!r} has no linear attention; choose from {', '.join(_BACKENDS)}"
            )
        return linear_attention(
            query,
            key,
            value,
            eps=self.eps,
            key_mask=key_mask,
            rotation=rotation,
            chunk=self.chunk,
            backend=_BACKENDS[chosen],
        )

    def _attend_jointly(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        division: Division,
        rotation: torch.Tensor | None,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Linear attention among the tokens inside of a division, softmax for all others."""
        of_text = attention(division.outside(query), key, value, scale=scale, key_mask=key_mask)
        video_mask = text_mask = None
        if key_mask is not None:
            video_mask, text_mask = division.inside(key_mask), division.outside(key_mask)
        video_query = division.inside(query)
        out = self._attend_linearly(
            video_query, division.inside(key), division.inside(value), rotation, video_mask
        )
        sizes = out.shape[1], of_text.shape[1], query.device
        if sizes not in self._every_pair:
            self._every_pair[sizes] = every_pair(*sizes)
        weights: Any = site.weights
        gate = weights.text_gate
        if gate is None:
            # A model without text in its sequence has references there: the gate's first value.
            gate = out.new_zeros(out.shape[2])
        seen = add_keys(
            out,
            _stand_in_lse(out, video_mask, gate),
            video_query,
            division.outside(key),
            division.outside(value),
            self._every_pair[sizes],
            scale,
            text_mask,
        )
        return division.joined(seen, of_text)


class LinFusionWeights(SiteWeights):
    """The weights with which a site adapts queries and keys.

    Attributes:
        to_q_, to_k_: networks of the inputs of `to_q` and `to_k`, whose outputs are added to these
            inputs: a linear layer, a normalisation, a leaky ReLU, and a linear layer that begins
            as 0.
        text_gate: `(heads,)`: video tokens weigh text as if all video tokens had this score. None
            if no text stands in the sequence.
    """

    text_gate: torch.nn.Parameter | None

    def __init__(self, module: Any, mid_dim: int | float | None, joint: bool) -> None:
        """Make the weights for an attention module, on the module's device and in its dtype.

        Args:
            module: the attention module.
            mid_dim: as `LinFusionAttn.mid_dim`.
            joint: whether text stands in the module's sequence.
        """
        super().__init__()
        # Attaching a method must not change the random numbers that the user draws afterwards.
        with torch.random.fork_rng(devices=[]):
            self.to_q_ = _network(module.to_q, mid_dim)
            self.to_k_ = _network(module.to_k, mid_dim)
        gate = torch.nn.Parameter(torch.zeros(module.heads)) if joint else None
        self.register_parameter("text_gate", gate)
        # Copies of the attention module's parameters from before a checkpoint replaced them.
        self._teacher: dict[str, torch.Tensor] = {}
        self.place_beside(module)

    def map_q(self, x: torch.Tensor) -> torch.Tensor:
        return x + _on(self.to_q_, x)(x)

    def map_k(self, x: torch.Tensor) -> torch.Tensor:
        return x + _on(self.to_k_, x)(x)

    def keep_teacher(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Copy the module's own projections to main memory, unless copies exist already."""
        self._teacher = self._teacher or {
            name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()
        }

    def leave(self, module: torch.nn.Module) -> None:
        """Give the module its own projections back, if a checkpoint has replaced them."""
        if not self._teacher:
            return
        parameters = parameters_by_own_name(module)
        if any(parameters[name].is_meta for name in self._teacher):
            warnings.warn(
                "the projections of a LinFusion checkpoint stay in the model: offloading has moved"
                " them away. Take the method off before enabling it, or load the model again",
                stacklevel=5,
            )
            return
        with torch.no_grad():
            for name, kept in self._teacher.items():
                parameters[name].copy_(kept)


def _middle(width: int, mid_dim: int | float | None) -> int:
    """The inner width, in channels, of the adapting network of a layer."""
    if isinstance(mid_dim, float):
        return max(1, int(width * mid_dim))
    return width if mid_dim is None else mid_dim


def _network(projection: Any, mid_dim: int | float | None) -> torch.nn.Module:
    if mid_dim == _IDENTITY:
        return torch.nn.Identity()
    width = projection.in_features
    middle = _middle(width, mid_dim)
    last = torch.nn.Linear(middle, width)
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return torch.nn.Sequential(
        torch.nn.Linear(width, middle), torch.nn.LayerNorm(middle), torch.nn.LeakyReLU(), last
    )


def _on(network: torch.nn.Module, x: torch.Tensor) -> torch.nn.Module:
    """The network on the device of `x`; offloading does not move networks made after its start."""
    for weight in network.parameters():
        if weight.device != x.device and not weight.is_meta:
            network.to(x.device)
        break
    return network


def _rotation(site: Site, query: torch.Tensor, division: Division) -> torch.Tensor | None:
    """The rotation of the tokens of linear attention, in the format of `linear_attention`.

    The model rotates queries and keys before the call. With the same tables the kernel undoes the
    rotation, up to rounding. So the model's own processors stay unchanged, and dense calls need no
    extra step. (A processor without the rotation would save this rounding, but would have to know
    in advance whether the next call is dense.)

    Returns:
        float32 (2, tokens, head_dim / 2), cosines and sines; None if nothing was rotated.
    """
    if site.rotary is None:
        return None
    grid = site.grid
    # A rotation turns two neighbouring channels: the tables have every number twice.
    cos, sin = (table.reshape(-1, table.shape[-1])[:, ::2] for table in site.rotary)
    rotation = torch.stack([cos, sin]).to(query.device, torch.float32)
    rows, pictures = rotation.shape[1], grid.pictures
    if rows == division.tokens:
        return rotation
    if rows == pictures.stop - pictures.start:
        ends = (pictures.start, grid.tokens - pictures.stop)
        rotation = F.pad(rotation, (0, 0, *ends))
    if rotation.shape[1] != grid.tokens:
        raise NotImplementedError(
            f"the position embedding of this call is of {rows} tokens, but it is over"
            f" {division.tokens}, of which linfusion needs each one's; use another method here"
            + ("" if len(division.spans) == 1 else ", or references='visible'")
        )
    return division.inside(rotation)


def _stand_in_lse(
    out: torch.Tensor, video_mask: torch.Tensor | None, gate: torch.Tensor
) -> torch.Tensor:
    """The log-sum-exp of a video query's scores if every video key had the score `gate`.

    Args:
        out: (batch, tokens, heads, head_dim), the output of the video tokens.
        video_mask: bool (batch, tokens): False for padding.
        gate: (heads,).

    Returns:
        float32 (batch, heads, tokens).
    """
    batch, tokens, heads, _ = out.shape
    if len(gate) != heads:
        raise NotImplementedError(
            f"this call has {heads} of {len(gate)} heads: linfusion cannot share them among"
            f" processes where text is in the sequence; disable context parallelism, or use another"
            f" method"
        )
    count = torch.full((batch,), tokens, device=out.device)
    if video_mask is not None:
        count = video_mask.sum(1)
    lse = count.log()[:, None] + gate.to(out.device, torch.float32)
    return lse[..., None].expand(batch, heads, tokens)


def _in_reference_arithmetic(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    eps: float,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    if key_mask is not None:
        raise ValueError(
            "the model passes a mask over keys, which the public code ignores; leave"
            " reference_arithmetic out"
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    query, key = F.elu(query) + 1, F.elu(key) + 1
    root = key.shape[2] ** 0.5
    state = (key / root).transpose(2, 3) @ (value / root)
    denominator = query @ key.mean(2, keepdim=True).transpose(2, 3) + eps
    return (query @ state / denominator).transpose(1, 2)
