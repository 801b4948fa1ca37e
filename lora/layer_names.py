"""The names of a LoRA's layers in diffusers, and in the original code of each family.

ComfyUI, musubi-tuner, sd-scripts and DiffSynth-Studio name layers as the original code of a model
does. Some of these layers are several of diffusers' in one: queries, keys and values of
HunyuanVideo and Flux. A rule names such a layer and its parts.

The rules are the public ones, of diffusers' converters and ComfyUI's table of names. Layers that
differ in more than the name, such as the output's modulation, have no rule: they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

DIFFUSERS, COMFYUI, KOHYA, MUSUBI, DIFFSYNTH = (
    "diffusers",
    "comfyui",
    "kohya",
    "musubi",
    "diffsynth",
)
LAYOUTS = (DIFFUSERS, COMFYUI, KOHYA, MUSUBI, DIFFSYNTH)

_NUMBER = re.escape("{}")


@dataclass(frozen=True)
class Rule:
    """A layer of the original code, and what it is in diffusers.

    Attributes:
        original: the layer's name, with {} for the number of each block.
        parts: the names of diffusers' layers whose outputs are those of the layer, in order.
        widths: output widths of the parts, as multiples of the first part's.
    """

    original: str
    parts: tuple[str, ...]
    widths: tuple[int, ...]

    def originals_name(self, layer: str) -> str | None:
        """The original's name of a layer of diffusers; None if no part of the rule is the layer."""
        for part in self.parts:
            if numbers := _numbers(part, layer):
                return self.original.format(*numbers.groups())
        return None

    def parts_names(self, layer: str, *, flat: bool) -> tuple[str, ...] | None:
        """The names in diffusers of a layer of the original; None if the rule is for another.

        Args:
            layer: the layer's name in the original.
            flat: whether the name has _ for each dot.
        """
        template = self.original.replace(".", "_") if flat else self.original
        numbers = _numbers(template, layer)
        return numbers and tuple(part.format(*numbers.groups()) for part in self.parts)


def _numbers(template: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(template).replace(_NUMBER, r"(\d+)"), name)


@dataclass(frozen=True)
class FamilyNames:
    """The names of a family's layers.

    Attributes:
        family: the family's name, as in `diffattn models`.
        title: the family's name for people.
        rules: all layers that have a name in other layouts.
        layouts: the layouts, beside diffusers', that programs read for the family.
        with_alpha: whether factors of the ComfyUI layout are called lora_down and lora_up, with an
            alpha for each layer; otherwise lora_A and lora_B, without any.
    """

    family: str
    title: str
    rules: tuple[Rule, ...]
    layouts: tuple[str, ...]
    with_alpha: bool = False

    @cached_property
    def fused(self) -> bool:
        """Whether layers of the original are several of diffusers'."""
        return any(len(rule.parts) > 1 for rule in self.rules)

    def rule_of(self, layer: str) -> Rule | None:
        """The rule of a layer of diffusers."""
        return next((rule for rule in self.rules if rule.originals_name(layer) is not None), None)

    def parts_of(self, layer: str, *, flat: bool) -> tuple[Rule, tuple[str, ...]] | None:
        """The rule of a layer of the original, and the layer's parts in diffusers."""
        for rule in self.rules:
            names = rule.parts_names(layer, flat=flat)
            if names is not None:
                return rule, names
        return None


def _same(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, (name,), (1,)) for name in names)


def _renamed(inside: str, of: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules for layers of a block: the block in the original and in diffusers, then the layers."""
    return tuple(Rule(f"{inside}.{a}", (f"{of}.{b}",), (1,)) for a, b in names.items())


def _qkv(original: str, inside: str, parts: Iterable[str]) -> Rule:
    return Rule(original, tuple(f"{inside}.{part}" for part in parts), (1, 1, 1))


_TO_QKV = ("to_q", "to_k", "to_v")
_ADD_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
_PROJECTIONS = (*_TO_QKV, "to_out.0")

_WAN = (
    *(
        rule
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for rule in _renamed(
            f"blocks.{{}}.{theirs}",
            f"blocks.{{}}.{ours}",
            dict(zip(("q", "k", "v", "o"), _PROJECTIONS, strict=True)),
        )
    ),
    *_renamed(
        "blocks.{}.cross_attn",
        "blocks.{}.attn2",
        {"k_img": "add_k_proj", "v_img": "add_v_proj"},
    ),
    *_renamed("blocks.{}.ffn", "blocks.{}.ffn", {"0": "net.0.proj", "2": "net.2"}),
)

# A block of one stream computes queries, keys, values and the MLP's input by one layer; the MLP is
# four times as wide as the model.
_ONE_STREAM = Rule(
    "single_blocks.{}.linear1",
    tuple(
        f"single_transformer_blocks.{{}}.{p}" for p in (*(f"attn.{q}" for q in _TO_QKV), "proj_mlp")
    ),
    (1, 1, 1, 4),
)
_DOUBLE, _TRANSFORMER = "double_blocks.{}", "transformer_blocks.{}"
_SINGLE, _SINGLE_TRANSFORMER = "single_blocks.{}", "single_transformer_blocks.{}"

_HUNYUANVIDEO = (
    _qkv(f"{_DOUBLE}.img_attn_qkv", f"{_TRANSFORMER}.attn", _TO_QKV),
    _qkv(f"{_DOUBLE}.txt_attn_qkv", f"{_TRANSFORMER}.attn", _ADD_QKV),
    _ONE_STREAM,
    *_renamed(
        _DOUBLE,
        _TRANSFORMER,
        {
            "img_attn_proj": "attn.to_out.0",
            "txt_attn_proj": "attn.to_add_out",
            "img_mod.linear": "norm1.linear",
            "txt_mod.linear": "norm1_context.linear",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
        },
    ),
    *_renamed(
        _SINGLE, _SINGLE_TRANSFORMER, {"linear2": "proj_out", "modulation.linear": "norm.linear"}
    ),
)

_FLUX = (
    _qkv(f"{_DOUBLE}.img_attn.qkv", f"{_TRANSFORMER}.attn", _TO_QKV),
    _qkv(f"{_DOUBLE}.txt_attn.qkv", f"{_TRANSFORMER}.attn", _ADD_QKV),
    _ONE_STREAM,
    *_renamed(
        _DOUBLE,
        _TRANSFORMER,
        {
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        },
    ),
    *_renamed(
        _SINGLE, _SINGLE_TRANSFORMER, {"linear2": "proj_out", "modulation.lin": "norm.linear"}
    ),
)

_LTX = _same(
    *(f"{_TRANSFORMER}.{attn}.{p}" for attn in ("attn1", "attn2") for p in _PROJECTIONS),
    f"{_TRANSFORMER}.ff.net.0.proj",
    f"{_TRANSFORMER}.ff.net.2",
)

_QWEN_IMAGE = _same(
    *(f"{_TRANSFORMER}.attn.{p}" for p in (*_PROJECTIONS, *_ADD_QKV, "to_add_out")),
    *(
        f"{_TRANSFORMER}.{side}_mlp.net.{part}"
        for side in ("img", "txt")
        for part in ("0.proj", "2")
    ),
    *(f"{_TRANSFORMER}.{side}_mod.1" for side in ("img", "txt")),
)

_UNET_BLOCKS = (
    "down_blocks.{}.attentions.{}",
    "mid_block.attentions.{}",
    "up_blocks.{}.attentions.{}",
)
_UNET = _same(
    *(
        f"{block}.transformer_blocks.{{}}.{layer}"
        for block in _UNET_BLOCKS
        for layer in (
            *(f"{attn}.{p}" for attn in ("attn1", "attn2") for p in _PROJECTIONS),
            "ff.net.0.proj",
            "ff.net.2",
        )
    ),
    *(f"{block}.{layer}" for block in _UNET_BLOCKS for layer in ("proj_in", "proj_out")),
)

FAMILY_NAMES: tuple[FamilyNames, ...] = (
    FamilyNames("wan", "Wan", _WAN, (COMFYUI, MUSUBI, DIFFSYNTH)),
    FamilyNames("hunyuanvideo", "HunyuanVideo", _HUNYUANVIDEO, (COMFYUI, MUSUBI)),
    # diffusers reads Flux's original names only beside lora_down and lora_up.
    FamilyNames("flux", "Flux", _FLUX, (COMFYUI, KOHYA, MUSUBI), with_alpha=True),
    FamilyNames("ltx", "LTX-Video", _LTX, (COMFYUI,)),
    FamilyNames("qwen-image", "Qwen-Image", _QWEN_IMAGE, (COMFYUI, MUSUBI, DIFFSYNTH)),
    # ComfyUI reads LoRAs of U-Nets in kohya's layout.
    FamilyNames("unet", "Stable Diffusion", _UNET, (COMFYUI, KOHYA), with_alpha=True),
)


def names_of(family: str) -> FamilyNames | None:
    """The names of a family's layers; None for a family without a known layout."""
    return next((names for names in FAMILY_NAMES if names.family == family), None)
