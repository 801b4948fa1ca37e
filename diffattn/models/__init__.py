"""The model families that diffattn knows, one module each."""

from __future__ import annotations

from typing import Any

import torch

from diffattn.grid import TokenGrid
from diffattn.models.allegro import ALLEGRO
from diffattn.models.auraflow import AURAFLOW
from diffattn.models.base import Family, SizeRules
from diffattn.models.bria import BRIA, BRIA_FIBO, BRIA_FIBO2
from diffattn.models.chroma import CHROMA
from diffattn.models.cogvideox import COGVIDEOX
from diffattn.models.cosmos import COSMOS
from diffattn.models.cosmos3 import COSMOS3
from diffattn.models.easyanimate import EASYANIMATE
from diffattn.models.ernie import ERNIE_IMAGE
from diffattn.models.flux import FLUX, FLUX2, FLUX3
from diffattn.models.framepack import FRAMEPACK
from diffattn.models.glm import COGVIEW3PLUS, COGVIEW4, GLM_IMAGE
from diffattn.models.helios import HELIOS
from diffattn.models.hidream import HIDREAM
from diffattn.models.hunyuan_image import HUNYUAN_IMAGE
from diffattn.models.hunyuandit import HUNYUANDIT
from diffattn.models.hunyuanvideo import HUNYUANVIDEO, HUNYUANVIDEO15
from diffattn.models.ideogram import IDEOGRAM4
from diffattn.models.joyimage import JOYIMAGE_EDIT, JOYIMAGE_EDIT_PLUS
from diffattn.models.kandinsky import KANDINSKY5, KANDINSKY6
from diffattn.models.krea import KREA2
from diffattn.models.longcat import LONGCAT_IMAGE
from diffattn.models.ltx import LTX, LTX2
from diffattn.models.lumina2 import LUMINA2, LUMINA_NEXT
from diffattn.models.minimax import MINIMAX_H3
from diffattn.models.mochi import MOCHI
from diffattn.models.motif import MOTIF_VIDEO
from diffattn.models.nucleus import NUCLEUS_IMAGE
from diffattn.models.ovis import OVIS_IMAGE
from diffattn.models.pixart import DIT, LATTE, PIXART
from diffattn.models.prx import PRX
from diffattn.models.qwen import QWEN_IMAGE, QWEN_IMAGE21
from diffattn.models.sd3 import SD3
from diffattn.models.unet import KANDINSKY3, UNET, UNET_VIDEO
from diffattn.models.wan import ANYFLOW, CHRONOEDIT, SKYREELS_V2, WAN, WAN_ANIMATE, WAN_ANIMATE2
from diffattn.models.z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    WAN,
    WAN_ANIMATE,
    SKYREELS_V2,
    CHRONOEDIT,
    ANYFLOW,
    HUNYUANVIDEO,
    HUNYUANVIDEO15,
    COGVIDEOX,
    LTX,
    LTX2,
    FLUX,
    FLUX2,
    FLUX3,
    MOCHI,
    SD3,
    UNET,
    QWEN_IMAGE,
    QWEN_IMAGE21,
    CHROMA,
    LONGCAT_IMAGE,
    OVIS_IMAGE,
    BRIA,
    BRIA_FIBO,
    BRIA_FIBO2,
    KREA2,
    ALLEGRO,
    KANDINSKY5,
    EASYANIMATE,
    Z_IMAGE,
    HUNYUAN_IMAGE,
    ERNIE_IMAGE,
    GLM_IMAGE,
    PIXART,
    LATTE,
    JOYIMAGE_EDIT,
    JOYIMAGE_EDIT_PLUS,
    PRX,
    NUCLEUS_IMAGE,
    HUNYUANDIT,
    HIDREAM,
    LUMINA2,
    COGVIEW4,
    COGVIEW3PLUS,
    AURAFLOW,
    IDEOGRAM4,
    UNET_VIDEO,
    KANDINSKY3,
    DIT,
    LUMINA_NEXT,
    FRAMEPACK,
    HELIOS,
    KANDINSKY6,
    COSMOS,
    COSMOS3,
    MOTIF_VIDEO,
    MINIMAX_H3,
    WAN_ANIMATE2,
)

# Models of diffusers without a rectangular grid or without token pairs, and the reason.
_LINEAR = "its self-attention is linear: it has no token pairs"
_OWN_BLOCK_MASK = "keys of earlier chunks come from a cache, under a block mask of the model's own"
_OVER_TIME = "its attention is over time alone, for each place of the picture by itself"
_WITHOUT_GRID = {
    "AnyFlowFARTransformer3DModel": _OWN_BLOCK_MASK,
    "DreamLiteTransformer2DModel": "a part of DreamLiteUNetModel, which is to be attached to",
    "Kandinsky6SRTransformer3DModel": "its own sparse attention puts tokens in another order",
    "MotionAdapter": _OVER_TIME,
    "OmniGenTransformer2DModel": "text attends causally and images as wholes, by a mask of its own"
    " over all pairs of tokens",
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": _OWN_BLOCK_MASK,
    "SanaWMTransformer3DModel": "three of four layers are recurrences, which have no token pairs,"
    " and the attention of the fourth has no processor",
    "StableCascadeUNet": "it attends on its smallest grids alone, of at most 32 x 32 tokens for"
    " pictures of 1024 pixels",
    "Transformer2DModel": "a part of U-Nets, which are to be attached to",
    "TransformerTemporalModel": _OVER_TIME,
    "UNet2DModel": "it attends on its smallest grids alone, of at most 32 x 32 tokens in published"
    " models",
    "UVit2DModel": "it chooses codes of at most 32 x 32 tokens",
}

# Parts of denoisers, which are components of their own in some pipelines.
_PARTS = ("MotionAdapter", "TransformerTemporalModel", "Transformer2DModel")

# The usual names of denoisers, in the order in which they take part in a run.
_DENOISERS = ("transformer", "transformer_2", "unet")


def family_of(model: torch.nn.Module) -> Family:
    """The family of a denoiser.

    Raises:
        ValueError: if the denoiser's class is in no family; names the classes that are, or says why
            the class cannot be in one.
    """
    family = _known_family(model)
    if family is not None:
        return family
    reason = refusal(model)
    if reason is not None:
        raise ValueError(reason)
    known = ", ".join(name for family in FAMILIES for name in family.model_classes)
    raise ValueError(
        f"diffattn does not know the attention sites of {type(model).__name__}; it knows {known}."
        f" docs/adding-a-family.md shows how to add one"
    )


def _known_family(model: torch.nn.Module) -> Family | None:
    # A subclass of a known model belongs to the family of the known model.
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((family for family in FAMILIES if names & set(family.model_classes)), None)


def refusal(model: torch.nn.Module) -> str | None:
    """Why the class of a model can be in no family; None if no reason is known."""
    for cls in type(model).__mro__:
        reason = _WITHOUT_GRID.get(cls.__name__)
        if reason is not None:
            return (
                f"{cls.__name__} has no rectangular token grid that diffattn could cut into blocks:"
                f" {reason}"
            )
    return None


def makes_images(name: str) -> bool:
    """Whether the family called `name` makes images; False if there is no such family."""
    return any(family.images for family in FAMILIES if family.name == name)


def denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The denoisers of a pipeline, modular or not, by the names of their components.

    A denoiser is a component of a known family, whatever the component's name. A model that is two
    components is given once.

    Raises:
        ValueError: if no component is of a known family: says why a component that looks like a
            denoiser cannot be one, or that the components of a modular pipeline are not loaded.
    """
    models = _models(pipe)
    found: dict[str, torch.nn.Module] = {}
    for name, model in models.items():
        if _known_family(model) is not None and all(model is not seen for seen in found.values()):
            found[name] = model
    if found:
        return found
    for name, model in models.items():
        if name in _DENOISERS or refusal(model) is not None:
            family_of(model)  # raises, with the reason
    host = type(pipe).__name__
    absent = getattr(pipe, "null_component_names", None)  # of modular pipelines, which load later
    if absent:
        raise ValueError(
            f"{host} has no denoiser yet: its components {', '.join(absent)} are not loaded. Load"
            f" its components first, with load_components() or update_components()"
        )
    raise ValueError(
        f"{host} has no denoiser: none of its components is a model that diffattn knows"
        f" ({', '.join(models) or 'it has no models'})"
    )


def without_grid(pipe: Any) -> dict[str, str]:
    """The denoisers of a pipeline that diffattn refuses, by name, and the reason of each."""
    models = _models(pipe).items()
    reasons = {name: refusal(part) for name, part in models if type(part).__name__ not in _PARTS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _models(pipe: Any) -> dict[str, torch.nn.Module]:
    """The components of a pipeline that are models; those with the names of denoisers first."""
    parts = getattr(pipe, "__dict__", {})
    names = dict.fromkeys((*(name for name in _DENOISERS if name in parts), *parts))
    return {name: parts[name] for name in names if isinstance(parts[name], torch.nn.Module)}


def size_rules(pipe: Any) -> SizeRules:
    """The heights, widths and numbers of frames that a pipeline can make."""
    return family_of(next(iter(denoisers(pipe).values()))).sizes(pipe)


def pipeline_grid(pipe: Any, height: int, width: int, num_frames: int) -> TokenGrid:
    """The token grid of a pipeline's call.

    Args:
        pipe: the pipeline.
        height, width: pixels.
        num_frames: frames of the finished video.

    Returns:
        The video tokens, without text.

    Raises:
        ValueError: if the model cannot make the size; names the nearest sizes that it can make.
    """
    return size_rules(pipe).grid(height, width, num_frames)


__all__ = [
    "FAMILIES",
    "Family",
    "SizeRules",
    "denoisers",
    "family_of",
    "makes_images",
    "pipeline_grid",
    "refusal",
    "size_rules",
    "without_grid",
]
