"""A run with nothing left open: the request with the model's defaults, the tokens, the method.

Sizes that the model would silently round are refused.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffattn.models import size_rules
from diffattn.models.wan import frames_to_ask_for

from ..errors import UserError
from .loading import DEFAULTS_FILE, LoadedModel
from .method_settings import make_method
from .pipeline_class import makes_pictures
from .refusals import refusals
from .request import Request, option
from .sources import Sources, fitting_size, read_clip, source_arguments

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from diffattn import TokenGrid
    from diffattn.lora.adapter import LoraRecord
    from diffattn.methods import Method

# Names of settings in a request, and in the calls of pipelines.
_ARGUMENTS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
}
_REQUIRED = ("height", "width", "num_frames", "steps")

# Pipelines that start from a picture or edit one, whatever their signature says.
_NEEDS_PICTURE = re.compile(r"ImageToVideo|I2V|I2I|Img2Img|ImageEdit|ImageLayered|ChronoEdit")

# Frames of a video to change, where neither the user nor the pipeline says how many: Wan's number.
_USUAL_FRAMES = 81

# Wan's frame rate, and the most common of other models. Most pipelines do not state theirs.
_USUAL_FPS = 16.0


@dataclass(frozen=True)
class Run:
    """One video or picture to make with a loaded model, with nothing left open.

    Attributes:
        request: complete: the model's defaults are filled in, every size is checked.
        grid: the tokens of the video, without text.
        method: the attention method.
        record: how the LoRA was trained; None without a LoRA, and for a LoRA that was not trained
            by `diffattn lora train`.
        sources: arguments of the pipeline's call: the pictures and the video to start from.
    """

    request: Request
    grid: TokenGrid
    method: Method
    record: LoraRecord | None
    sources: Mapping[str, Any] = field(default_factory=dict)


def complete(
    request: Request,
    loaded: LoadedModel,
    sources: Sources | None = None,
    pictures: bool = False,
) -> Run:
    """Settle a run: fill the request's gaps from the model, check its sizes, make its method.

    Args:
        request: the run.
        loaded: its model.
        sources: the pictures and the video of the request, where it has any.
        pictures: whether the model may make pictures.

    Raises:
        UserError: if the pipeline does not make videos, does not take a setting, or cannot make the
            size.
    """
    sources = Sources() if sources is None else sources
    parameters = inspect.signature(type(loaded.pipe).__call__).parameters
    is_picture = makes_pictures(type(loaded.pipe))
    _check_pipeline(loaded.pipe, parameters, request, pictures)
    for name in loaded.defaults:
        if name != "fps" and name not in parameters:
            raise UserError(f"{DEFAULTS_FILE}: {type(loaded.pipe).__name__} does not take {name!r}")
    filled: dict[str, Any] = {"dtype": loaded.dtype, "device": loaded.device}
    for name, argument in _ARGUMENTS.items():
        asked = getattr(request, name)
        if argument not in parameters:
            if asked is not None and not _follows(name, asked, is_picture, sources):
                raise UserError(f"{type(loaded.pipe).__name__} does not take {option(name)}")
        elif asked is None:
            filled[name] = loaded.defaults.get(argument, parameters[argument].default)
    filled |= _size(request, filled, loaded.pipe, is_picture, sources)
    if is_picture:
        filled["num_frames"] = 1
        if request.fps is not None:
            raise UserError(f"{type(loaded.pipe).__name__} makes pictures: leave --fps out")
    elif request.fps is None:
        frame_rate = parameters.get("frame_rate")
        usual = _USUAL_FPS if frame_rate is None else frame_rate.default
        filled["fps"] = loaded.defaults.get("fps", usual)
    clip: list[Image] = []
    if sources.video is not None:
        usual_frames = filled.get("num_frames", request.num_frames)
        fps: Any = filled.get("fps", request.fps)
        clip = _clip(sources.video, fps, usual_frames, request.num_frames, loaded.pipe)
        filled["num_frames"] = len(clip)
    for name in _REQUIRED:
        if filled.get(name, getattr(request, name)) is None:
            raise UserError(
                f"{type(loaded.pipe).__name__} leaves it to its caller: give {option(name)}"
            )
    full = dataclasses.replace(request, **filled)
    grid = _token_grid(full, loaded.pipe)
    arguments = {}
    if sources.shape is not None:
        arguments = source_arguments(type(loaded.pipe), sources, clip, full)
    return Run(full, grid, make_method(full.attention), loaded.record, arguments)


def _follows(name: str, asked: Any, is_picture: bool, sources: Sources) -> bool:
    """Whether a setting that the call does not take is that of what the run starts from."""
    if name == "num_frames":
        return sources.video is not None or (is_picture and asked == 1)
    return name in ("height", "width") and sources.shape is not None


def _size(
    request: Request, filled: Mapping[str, Any], pipe: Any, is_picture: bool, sources: Sources
) -> dict[str, int]:
    """Height and width where the user left one open: the model's own, in the shape of a picture."""
    asked = (request.height, request.width)
    if None not in asked:
        return {}
    usual = (filled.get("height"), filled.get("width"))
    if usual == (None, None):
        usual = _usual_picture(pipe) if is_picture else _usual_frame(pipe)
    if sources.shape is not None:
        with refusals():
            multiple = size_rules(pipe).spatial_multiple
        height, width = fitting_size(sources.shape, multiple, usual, asked)
        return {"height": height, "width": width}
    sides = zip(("height", "width"), asked, usual, strict=True)
    return {name: own for name, given, own in sides if given is None and own is not None}


def _usual_picture(pipe: Any) -> tuple[int, int] | tuple[None, None]:
    """Height and width in pixels of the pictures that a pipeline makes where no size is given."""
    side = getattr(pipe, "default_sample_size", None)
    if side is None:
        side = getattr(getattr(getattr(pipe, "unet", None), "config", None), "sample_size", None)
    if not isinstance(side, int):
        return None, None
    return side * pipe.vae_scale_factor, side * pipe.vae_scale_factor


def _usual_frame(pipe: Any) -> tuple[int, int] | tuple[None, None]:
    """Height and width in pixels of videos where no size is given: CogVideoX' model says them."""
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    if "sample_height" not in config:
        return None, None
    factor = pipe.vae_scale_factor_spatial
    return config["sample_height"] * factor, config["sample_width"] * factor


def _clip(path: Path, fps: float, usual: int | None, asked: int | None, pipe: Any) -> list[Image]:
    """The frames of a video to change, as many as asked for, or else as the model can make of it.

    Args:
        path: the video.
        fps: frames a second.
        usual: how many frames the model makes; None if it does not say.
        asked: how many frames the user wants.
        pipe: the pipeline.
    """
    clip = read_clip(path, fps, asked or usual or _USUAL_FRAMES)
    if asked is not None:
        if len(clip) < asked:
            raise UserError(
                f"--input {path} has {len(clip)} frames at {fps:g} frames a second, fewer than"
                f" --num-frames {asked}"
            )
        return clip
    with refusals():
        rules = size_rules(pipe)
    if not rules.frame_stride:
        return clip
    spare = (len(clip) - rules.frame_offset) % rules.frame_stride
    return clip[: max(1, len(clip) - spare)]


def _token_grid(request: Request, pipe: DiffusionPipeline) -> TokenGrid:
    """The grid of a complete request; the error for a size that does not fit names the nearest."""
    from diffattn.models import pipeline_grid
    from diffattn.planning.plans import check_tokens

    height, width, num_frames = request.height, request.width, request.num_frames
    assert height is not None
    assert width is not None
    assert num_frames is not None
    try:
        grid = pipeline_grid(pipe, height, width, num_frames)
        check_tokens(grid)
    except ValueError as error:
        raise UserError(error) from None
    return grid


def call_arguments(request: Request, loaded: LoadedModel) -> dict[str, Any]:
    """The arguments of the pipeline's call for the request of a `Run`."""
    parameters = inspect.signature(type(loaded.pipe).__call__).parameters
    arguments = {
        argument: getattr(request, name)
        for name, argument in _ARGUMENTS.items()
        if argument in parameters
    }
    is_wan = type(loaded.pipe).__module__.startswith("diffusers.pipelines.wan.")
    if is_wan and "num_frames" in arguments:
        arguments["num_frames"] = frames_to_ask_for(loaded.pipe, arguments["num_frames"])
    if "frame_rate" in parameters:
        arguments["frame_rate"] = request.fps
    extra = loaded.defaults.keys() - arguments.keys() - {"fps"}
    return {**arguments, **{name: loaded.defaults[name] for name in extra}}


def _check_pipeline(
    pipe: DiffusionPipeline,
    parameters: Mapping[str, inspect.Parameter],
    request: Request,
    pictures: bool,
) -> None:
    name = type(pipe).__name__
    given = {"prompt"}
    given |= {"image"} if request.image else set()
    given |= {"video"} if request.input is not None else set()
    if not pictures and makes_pictures(type(pipe)):
        raise UserError(f"{name} does not make videos: its call takes no num_frames")
    if "image" not in given and "image" in parameters and _NEEDS_PICTURE.search(name):
        raise UserError(f"{name} needs a picture to start from: give --image")
    if "video" not in given and "video" in parameters and "VideoToVideo" in name:
        raise UserError(f"{name} needs a video to change: give --input")
    for parameter in list(parameters.values())[1:]:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and parameter.name not in given:
            raise UserError(
                f"{name} needs {parameter.name!r}, which this command cannot give: call it from "
                "Python with pipe.set_attn_processor(...)"
            )
