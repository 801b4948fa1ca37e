"""The class of diffusers that a run needs: which pictures and videos a pipeline takes and makes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UserError
from .loading import model_index
from .request import Request

# Classes over the same models that take pictures or videos, in the order in which they are tried.
_RELATIVES: Mapping[str, tuple[str, ...]] = {
    "AnimateDiffPipeline": ("AnimateDiffVideoToVideoPipeline",),
    "CogVideoXPipeline": ("CogVideoXVideoToVideoPipeline",),
    "LTX2ImageToVideoPipeline": ("LTX2ConditionPipeline",),
    "LTX2Pipeline": ("LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"),
    "LTXImageToVideoPipeline": ("LTXConditionPipeline",),
    "LTXPipeline": ("LTXImageToVideoPipeline", "LTXConditionPipeline"),
    "SkyReelsV2DiffusionForcingPipeline": (
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    "WanPipeline": ("WanVideoToVideoPipeline",),
}
# Wan 2.2's small model makes videos with and without a picture; it says so in its configuration.
_WAN_WITH_AND_WITHOUT = ("WanImageToVideoPipeline", "WanVideoToVideoPipeline")
# Models that take several reference pictures for one result. Others take a list as a batch.
_SEVERAL = re.compile(r"Flux2|EditPlus|VACE")
# What a class does not take, in the order in which it is looked at.
_REFUSALS = ("no --image", "no second --image", "no --last-image", "no --input", "no --strength")
# `video` is other things in other classes, such as a condition whose frames stay as they are.
_CHANGES_VIDEO = re.compile(r"VideoToVideo|VACE")


def pipeline_class(index: Mapping[str, Any], request: Request) -> type:
    """The class to load a model with, for the pictures and the video that a request has.

    Args:
        index: the model's `model_index.json`.
        request: the request.

    Raises:
        UserError: if diffusers has no such class, or no class over the model takes what is given.
    """
    import diffusers

    name = str(index.get("_class_name"))
    named = getattr(diffusers, name, None)
    if not isinstance(named, type):
        raise UserError(f"diffusers {diffusers.__version__} has no pipeline {name}")
    refused = {cls: _refused(cls, request) for cls in (named, *_relatives(named, index))}
    for cls, reason in refused.items():
        if reason is None:
            return cls
    # The class that takes the most of what is given says what is left.
    nearest = max(refused, key=lambda cls: _REFUSALS.index(str(refused[cls])))
    also = "" if nearest is named else f" (as {nearest.__name__})"
    raise UserError(
        f"{name} takes {refused[nearest]}{also}, and diffusers has no pipeline over its model that"
        f" does"
    )


def model_makes_pictures(model: str) -> bool:
    """Whether the pipeline that a model names makes pictures; False if diffusers has no such class.

    Raises:
        UserError: if there is no such model, or the model is of no known family.
    """
    import diffusers

    cls = getattr(diffusers, str(model_index(model).get("_class_name")), None)
    return isinstance(cls, type) and makes_pictures(cls)


def makes_pictures(cls: type) -> bool:
    """Whether a pipeline makes pictures, not videos."""
    names = inspect.signature(cls.__call__).parameters
    return not any(word in name for name in names for word in ("video", "num_frames"))


def edits(cls: type) -> bool:
    """Whether a pipeline looks at pictures of any size, and does not start from their pixels."""
    names = inspect.signature(cls.__call__).parameters
    return "reference_images" in names or (makes_pictures(cls) and "strength" not in names)


def _refused(cls: type, request: Request) -> str | None:
    """The first of `_REFUSALS` that a class has for a request; None if it takes all of it."""
    names = inspect.signature(cls.__call__).parameters
    if request.image and not {"image", "reference_images", "conditions"} & names.keys():
        return _REFUSALS[0]
    if len(request.image) > 1 and not _SEVERAL.search(cls.__name__):
        return _REFUSALS[1]
    if request.last_image is not None and not {"last_image", "conditions"} & names.keys():
        return _REFUSALS[2]
    if request.input is not None and not _CHANGES_VIDEO.search(cls.__name__):
        return _REFUSALS[3]
    # Of a condition, the strength is how much of the condition is kept.
    if request.strength is not None and ("strength" not in names or "conditions" in names):
        return _REFUSALS[4]
    return None


def _relatives(named: type, index: Mapping[str, Any]) -> Iterator[type]:
    import diffusers
    from diffusers.pipelines.auto_pipeline import (
        AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    )

    names = _RELATIVES.get(named.__name__, ())
    if named.__name__ == "WanPipeline" and index.get("expand_timesteps"):
        names = _WAN_WITH_AND_WITHOUT
    yield from (getattr(diffusers, name) for name in names if hasattr(diffusers, name))
    for kind, cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items():
        if cls is named and kind in AUTO_IMAGE2IMAGE_PIPELINES_MAPPING:
            yield AUTO_IMAGE2IMAGE_PIPELINES_MAPPING[kind]
