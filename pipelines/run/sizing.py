"""A run with nothing left open: the request with the model's defaults, the tokens, the method.

Sizes that the model would silently round are refused.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffattn.models.wan import frames_to_ask_for

from ..errors import UserError
from .loading import DEFAULTS_FILE, LoadedModel
from .method_settings import make_method
from .request import Request, option

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

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

# Wan's frame rate, and the most common of other models. Most pipelines do not state theirs.
_USUAL_FPS = 16.0


@dataclass(frozen=True)
class Run:
    """One video to make with a loaded model, with nothing left open.

    Attributes:
        request: complete: the model's defaults are filled in, every size is checked.
        grid: the tokens of the video, without text.
        method: the attention method.
        record: how the LoRA was trained; None without a LoRA, and for a LoRA that was not trained
            by `diffattn lora train`.
    """

    request: Request
    grid: TokenGrid
    method: Method
    record: LoraRecord | None


def complete(request: Request, loaded: LoadedModel) -> Run:
    """Settle a run: fill the request's gaps from the model, check its sizes, make its method.

    Raises:
        UserError: if the pipeline does not make videos, does not take a setting, or cannot make the
            size.
    """
    parameters = inspect.signature(type(loaded.pipe).__call__).parameters
    _check_pipeline(loaded.pipe, parameters)
    for name in loaded.defaults:
        if name != "fps" and name not in parameters:
            raise UserError(f"{DEFAULTS_FILE}: {type(loaded.pipe).__name__} does not take {name!r}")
    filled: dict[str, Any] = {"dtype": loaded.dtype, "device": loaded.device}
    for name, argument in _ARGUMENTS.items():
        asked = getattr(request, name)
        if argument not in parameters:
            if asked is not None:
                raise UserError(f"{type(loaded.pipe).__name__} does not take {option(name)}")
        elif asked is None:
            filled[name] = loaded.defaults.get(argument, parameters[argument].default)
    for name in _REQUIRED:
        if filled.get(name, getattr(request, name)) is None:
            raise UserError(
                f"{type(loaded.pipe).__name__} leaves it to its caller: give {option(name)}"
            )
    if request.fps is None:
        frame_rate = parameters.get("frame_rate")
        usual = _USUAL_FPS if frame_rate is None else frame_rate.default
        filled["fps"] = loaded.defaults.get("fps", usual)
    full = dataclasses.replace(request, **filled)
    grid = _token_grid(full, loaded.pipe)
    return Run(full, grid, make_method(full.attention), loaded.record)


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
    if type(loaded.pipe).__module__.startswith("diffusers.pipelines.wan."):
        arguments["num_frames"] = frames_to_ask_for(loaded.pipe, arguments["num_frames"])
    if "frame_rate" in parameters:
        arguments["frame_rate"] = request.fps
    extra = loaded.defaults.keys() - arguments.keys() - {"fps"}
    return {**arguments, **{name: loaded.defaults[name] for name in extra}}


def _check_pipeline(pipe: DiffusionPipeline, parameters: Mapping[str, inspect.Parameter]) -> None:
    name = type(pipe).__name__
    if "num_frames" not in parameters:
        raise UserError(f"{name} does not make videos: its call takes no num_frames")
    for parameter in list(parameters.values())[1:]:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and parameter.name != "prompt":
            raise UserError(
                f"{name} needs {parameter.name!r}, which this command cannot give: call it from "
                "Python with pipe.set_attn_processor(...)"
            )
