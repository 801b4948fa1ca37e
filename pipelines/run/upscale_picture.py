"""`diffattn upscale` with a model that makes pictures, from start to file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffattn._checks import whole

from ..errors import RunInterruptedError, UserError, one_line
from ..flux_ladder import STEPS as FLUX_STEPS
from ..flux_ladder import STRENGTH as FLUX_STRENGTH
from ..flux_ladder import upscale_flux
from ..image_ladder import (
    STEPS,
    STRENGTHS,
    LadderPipeline,
    Rung,
    Size,
    first_size,
    ladder_sizes,
    native_pixels,
    noise_generator,
    rungs,
)
from .loading import LoadedModel, find_model, load_model
from .machine import describe_device, quiet_libraries
from .method_settings import MethodOptions, attention_settings, make_method
from .outputs import (
    Outputs,
    check_picture_format,
    check_replaceable,
    check_writable,
    given_path,
    name_in_folder,
    new_outputs,
    slug,
    staged,
)
from .progress import clock, watched
from .request import Request, check_option
from .sidecar import versions
from .upscale_video import SHARED_OPTIONS
from .video import write_picture

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMAT = 1
_CLASSES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline")


@dataclass(frozen=True)
class PictureSettings:
    """Settings of the larger sizes; `None` leaves a setting to the model.

    Attributes:
        input: a picture to start from, instead of a first picture from the prompt.
        height, width: of the large picture in pixels.
        steps: denoising steps at a larger size, before the strength.
        strengths: share of the steps that is done at each larger size.
        negative_prompt: for all sizes.
        attention: a method as its `to_dict()` gives it.
        attn_config: the file that `attention` was read from, if any.
    """

    input: Path | None
    height: int | None
    width: int | None
    steps: int | None
    strengths: tuple[float, ...] | None
    negative_prompt: str | None
    attention: Mapping[str, Any] | None
    attn_config: Path | None


# The options of the command that have an effect on pictures alone or on both kinds. All others are
# refused with pictures.
PICTURE_OPTIONS = frozenset(
    {item.name for item in dataclasses.fields(PictureSettings)} - {"attention"}
    | {"attn", "attn_arg"}
    | SHARED_OPTIONS
)


def makes_pictures(model: str) -> bool:
    """Whether a model, given by folder or hub id, makes pictures that can be made larger."""
    source = find_model(model)
    if isinstance(source, str):
        from huggingface_hub import hf_hub_download

        # `find_model` has read the index, which is in the cache now.
        index = Path(hf_hub_download(source, "model_index.json"))
    else:
        index = source / "model_index.json"
    return json.loads(index.read_text("utf-8")).get("_class_name") in _CLASSES


def picture_attention(options: MethodOptions) -> Mapping[str, Any] | None:
    """The settings of the method that the options describe; None for the untouched model."""
    if options.name is None and options.config is None:
        if options.arguments:
            raise UserError("--attn-arg needs a method: give --attn too")
        return None
    return attention_settings(options, None)


def read_strengths(text: str | None) -> tuple[float, ...] | None:
    """Read --strengths: numbers with commas between.

    Raises:
        UserError: for anything else.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--strengths must be numbers with commas between, such as 0.4,0.3, not {text!r}"
        ) from None


def upscale_picture(
    request: Request, settings: PictureSettings, output: str | None, say: Callable[[str], None]
) -> Path:
    """Make one large picture.

    Args:
        request: the prompt, the model, where it runs, and the first picture.
        settings: the larger sizes.
        output: the file or folder that the user named.
        say: takes lines for the user.

    Returns:
        The file written.

    Raises:
        UserError: if a setting, a size, the model or the output is refused.
        RunInterruptedError: on Ctrl-C; nothing is written then.
    """
    _check_settings(request, settings)
    read = [file for file in (settings.input, settings.attn_config) if file is not None]
    outputs = _plan_output(output, request.prompt, request.seed, read)
    image = None if settings.input is None else read_picture(settings.input, say)
    try:
        quiet_libraries()
        loaded = load_model(request)
        _make(request, settings, image, loaded, outputs, say)
    except KeyboardInterrupt:
        raise RunInterruptedError([]) from None
    return outputs.video


def read_picture(path: Path, say: Callable[[str], None]) -> Image:
    """Read a picture file as viewers show it: turned as its camera says, and on white.

    Args:
        path: the file.
        say: takes a line if parts of the picture are transparent.

    Raises:
        UserError: if there is no such picture.
    """
    from PIL import Image

    from diffattn.lora.frames import VIDEOS, read_frames

    if not path.is_file():
        raise UserError(f"there is no picture file {path}")
    if path.suffix.lower() in VIDEOS:
        raise UserError(f"cannot read {path} as a picture: it is a video")
    try:
        first = next(read_frames(path, lambda line: say(f"note: {path}: {line}")))
    except Exception as error:  # decoders raise errors of many kinds for bad files
        raise UserError(f"cannot read {path} as a picture: {one_line(error)}") from None
    return Image.fromarray(first.pixels)


def _check_settings(request: Request, settings: PictureSettings) -> None:
    """Refuse settings that are wrong for every model, before a model is loaded."""
    if settings.steps is not None:
        check_option("steps", settings.steps, whole(1))
    if settings.input is not None:
        for name in ("height", "width", "steps"):
            if getattr(request, name) is not None:
                raise UserError(
                    f"--base-{name} is of a first picture, but --input is there instead: leave it"
                    f" out"
                )


def _plan_output(output: str | None, prompt: str, seed: int, inputs: Collection[Path]) -> Outputs:
    """The files of the picture; files that cannot be written are refused before the run."""
    if output is None:
        outputs = new_outputs(f"{slug(prompt)}.png", picture=True)
    else:
        path = given_path(output)
        if path.is_dir() or output.endswith("/"):
            path = path / name_in_folder(slug(prompt), seed, ".png")
        outputs = Outputs(path, picture=True)
    path = outputs.video
    check_picture_format(path)
    protected = {file.expanduser().resolve() for file in inputs}
    for file in (path, outputs.sidecar):
        if file.resolve() in protected:
            raise UserError(f"-o {path} would overwrite {file}, which is read here")
        if file.is_dir():
            raise UserError(f"cannot write {file}: it is a folder")
    check_replaceable(outputs.sidecar, path)
    check_writable(path.parent)
    return outputs


def _make(
    request: Request,
    settings: PictureSettings,
    image: Image | None,
    loaded: LoadedModel,
    outputs: Outputs,
    say: Callable[[str], None],
) -> None:
    import torch

    import diffattn

    pipe: Any = loaded.pipe
    is_flux = type(pipe).__name__ == "FluxPipeline"
    denoiser = pipe.transformer if is_flux else pipe.unet
    # The pipelines do not convert latents and pictures for a VAE of a more precise type.
    pipe.vae.to(dtype=next(denoiser.parameters()).dtype)
    request, settings = _complete(request, settings, loaded)
    start, sizes = _plan_sizes(request, settings, image, pipe)
    steps = settings.steps or (FLUX_STEPS if is_flux else STEPS)
    ladder = _ladder(sizes, settings.strengths, steps, is_flux)
    way = " to ".join(f"{width}x{height}" for height, width in [start, *sizes])
    say(f"{request.model}: {type(pipe).__name__}, {loaded.dtype} on {loaded.device}; {way}")
    method = None if settings.attention is None else make_method(settings.attention)
    begin = clock()
    try:
        if method is not None:
            diffattn.set_attn_processor(pipe, method)
        try:
            stages = ("upscale",) if image is not None else ("first picture", "upscale")
            with watched(pipe, *stages):
                if is_flux:
                    image = _make_flux(request, pipe, image, start, ladder, steps, say)
                else:
                    image = LadderPipeline(pipe)(
                        height=sizes[-1][0],
                        width=sizes[-1][1],
                        image=image,
                        start=start,
                        start_steps=request.steps or STEPS,
                        strengths=[rung.strength for rung in ladder],
                        steps=steps,
                        seed=request.seed,
                        say=say,
                        **_arguments(request, settings.negative_prompt),
                    )
        finally:
            if method is not None:
                diffattn.set_attn_processor(pipe, None)
    except ValueError as error:
        raise UserError(error) from None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(
                "out of memory: try a smaller size, --dtype bfloat16 or --offload"
            ) from None
        raise
    seconds = clock() - begin
    path = outputs.video
    record = _record(request, settings, start, ladder, steps, loaded, path, seconds)
    with staged(outputs, []) as folder:
        write_picture(folder / path.name, image)
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / outputs.sidecar.name).write_text(text + "\n", "utf-8")
    say(f"{path}: {image.width}x{image.height}, {seconds:.1f} s")


def _record(
    request: Request,
    settings: PictureSettings,
    start: Size,
    ladder: list[Rung],
    steps: int,
    loaded: LoadedModel,
    path: Path,
    seconds: float,
) -> dict[str, Any]:
    """The record of the run, for the JSON file beside the picture."""
    return {
        "diffattn_picture_record": _FORMAT,
        "base": request.to_dict() | {"height": start[0], "width": start[1]},
        "settings": dataclasses.asdict(settings)
        | {"steps": steps}
        | {
            name: None if file is None else str(file)
            for name, file in (("input", settings.input), ("attn_config", settings.attn_config))
        },
        "sizes": [dataclasses.asdict(rung) for rung in ladder],
        "versions": versions(),
        "device": describe_device(loaded.device),
        "files": {"picture": path.name},
        "timings": {"total_seconds": round(seconds, 4)},
    }


def _complete(
    request: Request, settings: PictureSettings, loaded: LoadedModel
) -> tuple[Request, PictureSettings]:
    """Fill the settings that the user left out with the recommendations of the model."""
    defaults = loaded.defaults
    if settings.negative_prompt is not None and type(loaded.pipe).__name__ == "FluxPipeline":
        raise UserError("--negative-prompt has no effect on Flux, whose guidance is distilled")
    if request.guidance_scale is None:
        request = dataclasses.replace(request, guidance_scale=defaults.get("guidance_scale"))
    if request.steps is None:
        request = dataclasses.replace(request, steps=defaults.get("num_inference_steps"))
    if settings.negative_prompt is None:
        negative = defaults.get("negative_prompt")
        settings = dataclasses.replace(settings, negative_prompt=negative)
    return request, settings


def _plan_sizes(
    request: Request, settings: PictureSettings, image: Image | None, pipe: Any
) -> tuple[Size, list[Size]]:
    """The size of the first picture, and the larger sizes in turn."""
    from diffattn.models import size_rules

    rules = size_rules(pipe)
    multiple = rules.spatial_multiple
    if type(pipe).__name__ == "FluxPipeline":
        native = pipe.default_sample_size * pipe.vae_scale_factor
    else:
        native = native_pixels(pipe)
    if image is not None:
        base: Size | None = (image.height, image.width)
    elif request.height is not None or request.width is not None:
        base = (request.height or native, request.width or native)
    else:
        base = None
    shape = base or (native, native)
    goal = _goal(settings.height, settings.width, shape)
    start = base or first_size(goal, native, multiple)
    sizes = ladder_sizes(start, goal, multiple)
    try:
        for size in [*([] if image is not None else [start]), *sizes]:
            rules.check(*size, 1)
    except ValueError as error:
        raise UserError(error) from None
    return start, sizes


def _goal(height: int | None, width: int | None, shape: Size) -> Size:
    """The size to make: a single side gives the other by the shape; no side, twice the size."""
    for name, value in (("height", height), ("width", width)):
        if value is not None:
            check_option(name, value, whole(1))
    if height is None and width is None:
        return 2 * shape[0], 2 * shape[1]
    if height is None:
        assert width is not None
        return round(width * shape[0] / shape[1]), width
    return height, width or round(height * shape[1] / shape[0])


def _ladder(
    sizes: list[Size], strengths: tuple[float, ...] | None, steps: int, is_flux: bool
) -> list[Rung]:
    if is_flux:
        strengths = strengths or (FLUX_STRENGTH,)
        if len(strengths) > 1:
            raise UserError("--strengths must be one number for Flux, which has it at all sizes")
    return rungs(sizes, strengths or STRENGTHS, steps)


def _make_flux(
    request: Request,
    pipe: Any,
    image: Image | None,
    start: Size,
    ladder: list[Rung],
    steps: int,
    say: Callable[[str], None],
) -> Image:
    arguments = _arguments(request, None)
    if image is None:
        say(f"{start[1]}x{start[0]}: made from the prompt")
        own = {} if request.steps is None else {"num_inference_steps": request.steps}
        image = pipe(
            height=start[0],
            width=start[1],
            generator=noise_generator(request.seed),
            **own,
            **arguments,
        ).images[0]
    for rung in ladder:
        say(f"{rung.width}x{rung.height}: strength {rung.strength:g}")
        image = upscale_flux(
            pipe,
            image,
            [(rung.height, rung.width)],
            strength=rung.strength,
            steps=steps,
            generator=noise_generator(request.seed),
            **arguments,
        )
    return image


def _arguments(request: Request, negative_prompt: str | None) -> dict[str, Any]:
    """The arguments for every call of a pipeline: those that the user gave."""
    given = {
        "prompt": request.prompt,
        "guidance_scale": request.guidance_scale,
        "negative_prompt": negative_prompt,
    }
    return {name: value for name, value in given.items() if value is not None}
