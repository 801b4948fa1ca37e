"""A LoRA's file of any layout, read as pairs of factors by the names of diffusers, and written.

A pair changes a layer's weight by (alpha / rank) up @ down. Layouts differ in how they write it:

- diffusers: `transformer.LAYER.lora_A.weight` and `lora_B`; alpha is in the header, or 1 x rank;
- comfyui: `diffusion_model.ORIGINAL.lora_A.weight`, alpha is the rank; Flux has `lora_down`,
  `lora_up` and `alpha` instead, and U-Nets have kohya's layout;
- kohya and musubi: `lora_unet_ORIGINAL.lora_down.weight`, `lora_up` and `alpha`, with _ for dots;
- diffsynth: `ORIGINAL.lora_A.default.weight`, alpha is the rank.

ORIGINAL is the layer's name in the model's original code, see `layer_names`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from diffattn.lora.errors import LoraError
from diffattn.lora.layer_names import (
    COMFYUI,
    DIFFSYNTH,
    DIFFUSERS,
    FAMILY_NAMES,
    KOHYA,
    MUSUBI,
    FamilyNames,
    Rule,
    names_of,
)

# The entry of a file's header that holds the LoRA's config in peft (diffusers).
CONFIG_ENTRY = "lora_adapter_metadata"

_FLAT_PREFIX = "lora_unet_"
_PREFIXES = ("diffusion_model.", _FLAT_PREFIX, "transformer.", "unet.")
_TEXT_ENCODERS = ("text_encoder", "text_encoders.", "lora_te", "te1_", "te2_")
_SIDE = re.compile(
    r"(?P<layer>.+?)[._](?P<side>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)"
    r"(?P<infix>\.default)?\.weight"
)
_DOWN = ("lora_A", "lora_down", "lora.down")
_ALPHA = ".alpha"
_MAGNITUDES = (".dora_scale", ".lora_magnitude_vector")
# Tensors that are no factor of a LoRA, by a part of their names, and what they are.
_OTHERS = {
    "lokr_": "LoKr factors",
    "hada_": "LoHa factors",
    ".oft_": "OFT blocks",
    "lora_mid": "factors of a convolution in three parts",
    ".diff": "differences of weights",
    ".bias": "biases",
}
# Words of headers (modelspec.architecture, ss_base_model_version) and the families that they name.
_WORDS = (
    ("hunyuan", "hunyuanvideo"),
    ("qwen", "qwen-image"),
    ("ltx", "ltx"),
    ("flux", "flux"),
    ("wan", "wan"),
    ("stable-diffusion", "unet"),
    ("sdxl", "unet"),
    ("sd_v1", "unet"),
)
_BASE_ENTRIES = ("modelspec.architecture", "ss_base_model_version")
# Families whose names in diffusers no other family has (others are like Wan to the last layer).
_NAMED_ALONE = ("wan", "unet")
# Blocks of two streams and of one in Flux; HunyuanVideo has 20 and 40.
_FLUX_BLOCKS = {"double_blocks": 19, "single_blocks": 38}
# Names of the original U-Net of SDXL: place, number, and layer. Three layers make a block.
_SGM = re.compile(r"(?P<side>input_blocks|output_blocks|middle_block)_(?P<rest>.+)")


@dataclass(frozen=True)
class Pair:
    """The two factors of a layer.

    Attributes:
        down: (rank, inputs), or (rank, inputs, height, width).
        up: (outputs, rank), or (outputs, rank, 1, 1).
        alpha: the pair counts alpha / rank times.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def strength(self) -> float:
        """The factor of the product of both."""
        return self.alpha / self.rank

    def folded(self) -> Pair:
        """The same change with a strength of 1: the strength is multiplied into `up`."""
        if self.strength == 1:
            return self
        up = (self.up.double() * self.strength).to(self.up.dtype)
        return Pair(self.down, up, float(self.rank))


@dataclass(frozen=True)
class Contents:
    """A LoRA's file, read.

    Attributes:
        path: the file.
        layout: one of `layer_names.LAYOUTS`.
        family: the family's name; None where neither header nor names tell.
        candidates: the families that have all names of the file.
        denoiser: "unet" or "transformer", as diffusers' file has it.
        pairs: the factors by layer, in diffusers' names.
        unknown: layers of another layout that have no rule; `pairs` has them by their own names.
        magnitudes: the magnitudes of a DoRA, by layer.
        others: number of other tensors by kind, such as biases.
        text_encoders: number of tensors for text encoders.
        metadata: the header's entries.
    """

    path: Path
    layout: str
    family: str | None
    candidates: tuple[str, ...]
    denoiser: str
    pairs: Mapping[str, Pair]
    unknown: tuple[str, ...]
    magnitudes: Mapping[str, torch.Tensor]
    others: Mapping[str, int]
    text_encoders: int
    metadata: Mapping[str, str]


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the header's entries of a .safetensors file.

    Raises:
        LoraError: if the file cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        return load_file(file), metadata
    except (OSError, SafetensorError) as error:
        raise LoraError(f"cannot read LoRA {file}: {error}") from None


def read_contents(file: Path, family: str | None = None) -> Contents:
    """Read a LoRA's file of any layout.

    Args:
        file: the file.
        family: the family of the LoRA's model, where the user names it or the record does.

    Raises:
        LoraError: if the file cannot be read, or holds no LoRA or half a LoRA.
    """
    tensors, metadata = read_tensors(file)
    return parse(file, tensors, metadata, family)


def parse(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    family: str | None = None,
) -> Contents:
    """The contents of a LoRA's file from its tensors and header, see `read_contents`."""
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TEXT_ENCODERS)}
    factors: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    magnitudes: dict[str, torch.Tensor] = {}
    others: Counter[str] = Counter()
    infix = False
    for name, tensor in own.items():
        kind = next((kind for part, kind in _OTHERS.items() if part in name), None)
        ending = next((ending for ending in _MAGNITUDES if ending in name), None)
        if kind is not None:
            others[kind] += 1
        elif ending is not None:
            magnitudes[name.split(ending)[0]] = tensor
        elif name.endswith(_ALPHA):
            alphas[name.removesuffix(_ALPHA)] = float(tensor)
        elif match := _SIDE.fullmatch(name):
            infix = infix or match["infix"] is not None
            layer = _modern(match["layer"])
            side = "down" if match["side"] in _DOWN else "up"
            factors.setdefault(layer, {})[side] = tensor
        else:
            others["tensors of another kind"] += 1
    if not factors:
        held = ", ".join(f"{count} {kind}" for kind, count in others.items()) or "nothing else"
        raise LoraError(f"{file} holds no pair of a LoRA's factors: {held}")
    halves = [layer for layer, sides in factors.items() if len(sides) < 2]
    if halves:
        raise LoraError(
            f"LoRA {file} is half a LoRA: {len(halves)} of its {len(factors)} layers lack a factor,"
            f" such as {halves[0]}; get the whole file"
        )
    prefix = _prefix(file, factors)
    strengths = _strengths(file, metadata, prefix, factors)
    pairs = {
        layer: Pair(
            sides["down"],
            sides["up"],
            alphas.get(layer, strengths.get(layer, 1.0) * sides["down"].shape[0]),
        )
        for layer, sides in factors.items()
    }
    for layer, pair in pairs.items():
        if pair.down.ndim < 2 or pair.up.ndim < 2 or pair.up.shape[1] != pair.rank:
            raise LoraError(
                f"LoRA {file} is damaged: the factors of {layer} are of shape"
                f" {tuple(pair.down.shape)} and {tuple(pair.up.shape)}, but must share a rank"
            )
    layers = {layer: _bare(layer, prefix) for layer in pairs}
    flat = prefix == _FLAT_PREFIX
    only_original = flat or infix or prefix == "diffusion_model."
    bare = list(layers.values())
    candidates = _candidates(bare, flat=flat, only_original=only_original)
    guess = names_of(family or next(iter(candidates), ""))
    original = flat or (guess is not None and any(_only_original(guess, layer) for layer in bare))
    certain = only_original or original
    found = family or _family(metadata, candidates, bare, certain=certain)
    layout = _layout(prefix, found, original=original, infix=infix)
    named: dict[str, Pair] = {}
    unknown: list[str] = []
    for layer, pair in pairs.items():
        whole = {layers[layer]: pair}
        is_original = flat or original
        parts = _in_parts(file, layers[layer], pair, found, flat=flat) if is_original else whole
        if parts is None:
            unknown.append(layers[layer])
        named |= parts or whole
    return Contents(
        path=file,
        layout=layout,
        family=found,
        candidates=candidates,
        denoiser="unet" if prefix == "unet." or found == "unet" else "transformer",
        pairs=named,
        unknown=tuple(unknown),
        magnitudes={_bare(_modern(layer), prefix): tensor for layer, tensor in magnitudes.items()},
        others=dict(others),
        text_encoders=len(tensors) - len(own),
        metadata=metadata,
    )


def _modern(layer: str) -> str:
    """A layer's name as diffusers has it today; older U-Net LoRAs name the processors."""
    if not layer.startswith("unet."):
        return layer
    return re.sub(r"\.to_out$", ".to_out.0", layer.replace(".processor.", "."))


def _prefix(file: Path, layers: Iterable[str]) -> str:
    found = {next((p for p in _PREFIXES if layer.startswith(p)), "") for layer in layers}
    if len(found) > 1:
        raise LoraError(
            f"LoRA {file} mixes layouts: its names begin with"
            f" {' and '.join(sorted(p or 'no prefix' for p in found))}"
        )
    return found.pop()


def _bare(layer: str, prefix: str) -> str:
    layer = layer.removeprefix(prefix)
    return _of_sgm(layer) if prefix == _FLAT_PREFIX else layer


def _of_sgm(layer: str) -> str:
    """The name in diffusers, with _ for dots, of an attention layer in SDXL's original U-Net."""
    match = _SGM.fullmatch(layer)
    if match is None:
        return layer
    if match["side"] == "middle_block":
        return re.sub(r"^1_", "mid_block_attentions_0_", match["rest"])
    number, place, *rest = match["rest"].split("_", 2)
    if place != "1" or not rest or not number.isdigit():
        return layer
    side, block = (
        ("down", int(number) - 1) if match["side"] == "input_blocks" else ("up", int(number))
    )
    return f"{side}_blocks_{block // 3}_attentions_{block % 3}_{rest[0]}"


def _strengths(
    file: Path,
    metadata: Mapping[str, str],
    prefix: str,
    layers: Mapping[str, Mapping[str, torch.Tensor]],
) -> dict[str, float]:
    """The strength of each layer by the config in the header; empty without one."""
    try:
        config = json.loads(metadata.get(CONFIG_ENTRY, "{}"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise LoraError(
            f"LoRA {file} has a damaged header: its entry {CONFIG_ENTRY!r} is no JSON object; write"
            f" the LoRA again"
        )
    part = {key.removeprefix(prefix): value for key, value in config.items() if prefix}
    if "lora_alpha" not in part:
        return {}
    found = {}
    for layer, sides in layers.items():
        name, rank = layer.removeprefix(prefix), sides["down"].shape[0]
        alpha = _by_pattern(part.get("alpha_pattern") or {}, name, part["lora_alpha"])
        found[layer] = alpha / (rank**0.5 if part.get("use_rslora") else rank)
    return found


def _by_pattern(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """The entry of the first pattern that a layer has, as peft reads patterns."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _candidates(layers: Iterable[str], *, flat: bool, only_original: bool) -> tuple[str, ...]:
    """The families that have these layers, in the original's names or in diffusers'."""
    known = list(layers)
    with_all = tuple(
        names.family
        for names in FAMILY_NAMES
        if all(names.parts_of(layer, flat=flat) for layer in known)
        or (not only_original and all(names.rule_of(layer) for layer in known))
    )
    # Layers that have no rule are no reason not to know the family of the others.
    return with_all or tuple(
        names.family
        for names in FAMILY_NAMES
        if any(
            names.parts_of(layer, flat=flat) if flat else _only_original(names, layer)
            for layer in known
        )
    )


def _only_original(names: FamilyNames, layer: str) -> bool:
    """Whether the name of a layer is the original's, and not diffusers'."""
    return names.parts_of(layer, flat=False) is not None and names.rule_of(layer) is None


def _family(
    metadata: Mapping[str, str],
    candidates: tuple[str, ...],
    layers: Iterable[str],
    *,
    certain: bool,
) -> str | None:
    """The family that the header names, or the only one that has the names.

    Many families share diffusers' names, also such as have no rules; `certain` is whether the names
    are of another layout.
    """
    for entry in _BASE_ENTRIES:
        text = metadata.get(entry, "").lower()
        family = next((family for word, family in _WORDS if word in text), None)
        if family in candidates:
            return family
    if len(candidates) == 1 and (certain or candidates[0] in _NAMED_ALONE):
        return candidates[0]
    if set(candidates) == {"flux", "hunyuanvideo"}:
        for layer in layers:
            match = re.match(r"(double_blocks|single_blocks)[._](\d+)", layer)
            if match and int(match[2]) >= _FLUX_BLOCKS[match[1]]:
                return "hunyuanvideo"
    return None


def _layout(prefix: str, family: str | None, *, original: bool, infix: bool) -> str:
    if prefix == _FLAT_PREFIX:
        return KOHYA if family in (None, "unet", "flux") else MUSUBI
    if prefix == "diffusion_model.":
        return COMFYUI
    if prefix:
        return COMFYUI if original else DIFFUSERS
    return DIFFSYNTH if infix or original else DIFFUSERS


def _in_parts(
    file: Path, layer: str, pair: Pair, family: str | None, *, flat: bool
) -> dict[str, Pair] | None:
    """A pair by the names of diffusers, a fused one in parts; None for a layer without a rule."""
    names = names_of(family) if family else None
    # Names of layers that families share mean the same in all of them.
    for one in (names,) if names else FAMILY_NAMES:
        found = one.parts_of(layer, flat=flat)
        if found is not None:
            return split(file, layer, pair, *found)
        if not flat and one.rule_of(layer) is not None:
            return {layer: pair}
    return None


def split(
    file: Path, layer: str, pair: Pair, rule: Rule, parts: tuple[str, ...]
) -> dict[str, Pair]:
    """The pairs of the parts of a fused layer; a part that the pair does not change has none.

    Where each part has columns of `up` of its own, as `fuse` writes them, the part gets these
    columns and their rows of `down`. Otherwise all parts share `down`.
    """
    if len(parts) == 1:
        return {parts[0]: pair}
    width, rest = divmod(pair.up.shape[0], sum(rule.widths))
    if rest:
        raise LoraError(
            f"LoRA {file} is damaged: {layer} has {pair.up.shape[0]} outputs, which are not those"
            f" of {len(parts)} layers"
        )
    ups = dict(zip(parts, pair.up.split([width * times for times in rule.widths]), strict=True))
    live = [part for part in parts if ups[part].any()] or list(parts)
    rank, uneven = divmod(pair.rank, len(live))
    if not uneven and rank:
        own = {part: slice(i * rank, (i + 1) * rank) for i, part in enumerate(live)}
        if all(_is_alone(ups[part], own[part]) for part in live):
            return {
                part: Pair(
                    pair.down[rows].contiguous(),
                    ups[part][:, rows].contiguous(),
                    pair.alpha * rank / pair.rank,
                )
                for part, rows in own.items()
            }
    return {part: replace(pair, up=ups[part].contiguous()) for part in live}


def _is_alone(up: torch.Tensor, columns: slice) -> bool:
    return not (up[:, : columns.start].any() or up[:, columns.stop :].any())


def fuse(rule: Rule, pairs: Mapping[str, Pair], parts: tuple[str, ...]) -> Pair:
    """One pair for a fused layer.

    Parts that share `down`, as those of a fused layer do, keep it. Otherwise the ranks of the parts
    follow each other, and `up` is zero outside of a part's own columns. Parts without a pair have
    zeros.

    Args:
        rule: the rule of the layer.
        pairs: the pairs of the parts that have one, by name; at least one.
        parts: the names of all parts, in order.
    """
    if len(parts) == 1:
        return pairs[parts[0]]
    given = [pairs[part] for part in parts if part in pairs]
    if len({pair.strength for pair in given}) > 1:
        given = [pair.folded() for pair in given]
    first = given[0]
    times = dict(zip(parts, rule.widths, strict=True))
    some = next(part for part in parts if part in pairs)
    width = pairs[some].up.shape[0] // times[some]
    shared = all(torch.equal(pair.down, first.down) for pair in given)
    offsets = [0]
    for pair in given:
        offsets.append(offsets[-1] + (0 if shared else pair.rank))
    rank = first.rank if shared else offsets[-1]
    up = first.up.new_zeros(sum(rule.widths) * width, rank)
    row, place = 0, iter(zip(given, offsets, strict=False))
    for part in parts:
        if part in pairs:
            pair, column = next(place)
            up[row : row + len(pair.up), column : column + pair.rank] = pair.up
        row += times[part] * width
    down = first.down if shared else torch.cat([pair.down for pair in given])
    return Pair(down, up, first.strength * rank)


def written(
    pairs: Mapping[str, Pair], layout: str, names: FamilyNames | None, denoiser: str
) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA's file in a layout.

    Args:
        pairs: the factors by layer, in diffusers' names.
        layout: the layout.
        names: the names of the family's layers; None for diffusers' layout.
        denoiser: "unet" or "transformer".

    Raises:
        LoraError: if a layer has no name in the layout.
    """
    if layout == DIFFUSERS:
        return _in_ab(f"{denoiser}.", pairs, "")
    assert names is not None
    groups: dict[str, tuple[Rule, tuple[str, ...], dict[str, Pair]]] = {}
    for layer, pair in pairs.items():
        rule = names.rule_of(layer)
        if rule is None:
            raise LoraError(
                f"layer {layer} of {names.title} has no name in the {layout} layout that diffattn"
                f" knows for certain: train without it, or use the LoRA in diffusers' layout"
            )
        original = rule.originals_name(layer)
        assert original is not None
        parts = rule.parts_names(original, flat=False)
        assert parts is not None
        groups.setdefault(original, (rule, parts, {}))[2][layer] = pair
    merged = {name: fuse(rule, own, parts) for name, (rule, parts, own) in groups.items()}
    if layout == DIFFSYNTH:
        return _in_ab("", merged, ".default")
    if layout == COMFYUI and names.family != "unet":
        prefix = "diffusion_model."
        return _in_halves(prefix, merged) if names.with_alpha else _in_ab(prefix, merged, "")
    flat = {name.replace(".", "_"): pair for name, pair in merged.items()}
    return _in_halves(_FLAT_PREFIX, flat)


def _in_ab(prefix: str, pairs: Mapping[str, Pair], infix: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer, pair in pairs.items():
        folded = pair.folded()
        tensors[f"{prefix}{layer}.lora_A{infix}.weight"] = folded.down.contiguous()
        tensors[f"{prefix}{layer}.lora_B{infix}.weight"] = folded.up.contiguous()
    return tensors


def _in_halves(prefix: str, pairs: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer, pair in pairs.items():
        tensors[f"{prefix}{layer}.lora_down.weight"] = pair.down.contiguous()
        tensors[f"{prefix}{layer}.lora_up.weight"] = pair.up.contiguous()
        tensors[f"{prefix}{layer}.alpha"] = torch.tensor(pair.alpha)
    return tensors


def config_entry(pairs: Mapping[str, Pair], denoiser: str) -> dict[str, str]:
    """The header's entry for a LoRA whose layers have several ranks; {} for a single rank.

    Older releases of diffusers give all layers of such a LoRA the alpha of the first.
    """
    ranks = {layer: pair.rank for layer, pair in pairs.items()}
    if len(set(ranks.values())) < 2:
        return {}
    config = {
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "target_modules": list(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    named = {f"{denoiser}.{key}": value for key, value in config.items()}
    return {CONFIG_ENTRY: json.dumps(named, sort_keys=True)}
