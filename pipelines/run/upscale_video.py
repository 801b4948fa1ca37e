"""`diffattn upscale`: a video by FreeSwim beyond the model's own size, from start to file."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffattn._checks import whole
from diffattn.lora.frames import ANIMATIONS, VIDEOS, Frame, at_rate, read_frames

from ..errors import RunInterruptedError, UserError, one_line
from .job import check_output_name
from .loading import LoadedModel, load_model
from .machine import describe_device, quiet_libraries
from .memory import check_memory
from .outputs import Outputs, check_outputs, on_disk, plan_outputs, staged
from .progress import clock, watched
from .refusals import gave_nan, refusals
from .request import Request, check_option
from .sidecar import versions
from .sizing import complete
from .video import write_video
from .vocabulary import warn_of_words

_FORMAT = 1
_DEFAULT_STEPS = 50


@dataclass(frozen=True)
class UpscaleSettings:
    """Settings of the large video, see `FreeSwimPipeline`; `None` leaves a setting to the model.

    Attributes:
        input: a video to start from, instead of a base video from the prompt.
    """

    input: Path | None
    preset: str | None
    height: int | None
    width: int | None
    steps: int | None
    strength: float
    cache_steps: int | None
    store: str
    interpolation: str
    flow_shift: float
    negative_prompt: str | None


# The options of the command that are settings of the first video or picture, or of the machine.
SHARED_OPTIONS = frozenset(
    {
        "prompt",
        "output",
        "model",
        "base_height",
        "base_width",
        "base_steps",
        "guidance_scale",
        "seed",
        "dtype",
        "device",
        "offload",
    }
)

# The options that have an effect on videos. All others are refused with videos.
VIDEO_OPTIONS = frozenset(
    {item.name for item in dataclasses.fields(UpscaleSettings)}
    | {"num_frames", "fps", "no_memory_check"}
    | SHARED_OPTIONS
)


def upscale(
    request: Request,
    settings: UpscaleSettings,
    output: str | None,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    *,
    memory_check: bool = True,
) -> Path:
    """Make one large video.

    Args:
        request: the prompt, the model, where it runs, and the base video.
        settings: of the large video.
        output: the file or folder that the user named.
        say: takes lines for the user.
        warn: takes one-line warnings.
        memory_check: whether to refuse what the device has too little memory for.

    Returns:
        The video written.

    Raises:
        UserError: if a setting, a size, the model or the output is refused.
        RunInterruptedError: on Ctrl-C; nothing is written then.
    """
    if settings.input is not None:
        _refuse_base(request)
    check_output_name(output)
    (outputs,) = plan_outputs(output, (request.prompt,), False, request.seed)
    inputs = [] if settings.input is None else [settings.input]
    check_outputs([outputs], False, request.fps, inputs)
    video, fps = (None, None) if settings.input is None else read_video(settings.input, say)
    kept: list[Path] = []
    try:
        quiet_libraries()
        _check_settings(settings)
        if memory_check:
            _check_memory(request, settings, video)
        loaded = load_model(request)
        full = complete(request, loaded).request
        _check_steps(settings, loaded)
        warn_of_words(loaded.pipe, request.prompt, warn)
        _warn_of_small_size(full, settings, video, warn)
        if request.fps is None and fps is not None:
            full = dataclasses.replace(full, fps=fps)
        _make(full, settings, video, loaded, outputs, kept, say)
    except KeyboardInterrupt:
        raise RunInterruptedError(kept) from None
    return kept[0]


def check_counts(**counts: int | None) -> None:
    """Raise UserError for a count below 1; the names are those of the options, None is allowed."""
    for name, count in counts.items():
        if count is not None:
            check_option(name, count, whole(1))


def read_cache_steps(text: str) -> int | None:
    """Read `--cache-steps`, a number of steps or `none`.

    Raises:
        UserError: for anything else.
    """
    if text.strip().lower() == "none":
        return None
    if re.fullmatch(r"\s*\d{1,9}\s*", text) is None or int(text) < 1:
        raise UserError(
            f"--cache-steps must be a whole number of at least 1, or none to guide in every step,"
            f" not {text!r}"
        )
    return int(text)


def read_video(path: Path, say: Callable[[str], None]) -> tuple[np.ndarray, float | None]:
    """Read a video file, an animation, or a folder of frames as `diffattn generate` writes them.

    Args:
        path: the file or the folder.
        say: takes lines about what the reader has changed, such as transparent areas.

    Returns:
        Frames (count, height, width, 3), uint8, at a constant rate, and frames a second, None if
        unknown.

    Raises:
        UserError: if there is no such video.
    """
    if not path.exists():
        raise UserError(f"there is no video file {path}")
    files = sorted(path.glob("frame_*.png")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"there are no frames frame_0000.png and so on in the folder {path}")
    if path.is_file() and path.suffix.lower() not in (*VIDEOS, *ANIMATIONS):
        raise UserError(
            f"cannot read {path} as a video: the extension must be one of"
            f" {', '.join((*VIDEOS, *ANIMATIONS))}"
        )
    try:
        frames, fps = _read_rate(_frames_of(files, lambda line: say(f"note: {path}: {line}")))
    except Exception as error:  # decoders raise errors of many kinds for bad files
        raise UserError(f"cannot read {path} as a video: {one_line(error)}") from None
    if any(frame.shape != frames[0].shape for frame in frames):
        raise UserError(f"cannot read {path} as a video: its frames have several sizes")
    return np.stack(frames), fps


def _frames_of(files: Sequence[Path], note: Callable[[str], None]) -> Iterator[Frame]:
    said = False

    def once(line: str) -> None:
        nonlocal said
        if not said:
            note(line)
        said = True

    for file in files:
        yield from read_frames(file, once)


def _read_rate(frames: Iterator[Frame]) -> tuple[list[np.ndarray], float | None]:
    """All frames at the rate of the first; as they come if the file has no rate."""
    first = next(frames)
    together = itertools.chain([first], frames)
    if first.interval is None:
        return [frame.pixels for frame in together], None
    fps = 1 / first.interval
    return [frame.pixels for frame in at_rate(together, fps)], fps


def _refuse_base(request: Request) -> None:
    """Refuse settings of a base video where --input takes its place."""
    for name, flag in (("num_frames", "--num-frames"), ("steps", "--base-steps")):
        if getattr(request, name) is not None:
            raise UserError(
                f"{flag} is of a base video, but --input is there instead: leave it out"
            )


def _check_settings(settings: UpscaleSettings) -> None:
    """Refuse settings that are wrong for every model, before a model is loaded."""
    from ..freeswim.pipeline import check_refinement, check_target

    try:
        check_target(settings.preset, settings.height, settings.width)
        check_refinement(
            settings.strength,
            settings.cache_steps,
            settings.interpolation,
            settings.flow_shift,
            settings.store,
        )
    except ValueError as error:
        raise UserError(error) from None


def _check_memory(request: Request, settings: UpscaleSettings, video: np.ndarray | None) -> None:
    """Refuse a large video that the memory of the device cannot hold."""
    from ..freeswim.pipeline import target_size

    def enlarge(size: tuple[int, int]) -> tuple[int, int]:
        return target_size(size, settings.preset, settings.height, settings.width)

    if video is not None:
        frames, height, width, _ = video.shape
        request = dataclasses.replace(request, num_frames=frames, height=height, width=width)
    check_memory(request, enlarge)


def _check_steps(settings: UpscaleSettings, loaded: LoadedModel) -> None:
    """Refuse a number of steps of which `strength` leaves none: the video would only be stretched.

    Raises:
        UserError: if no step is left; names the least number of steps.
    """
    steps = _steps_of(settings, loaded)
    if int(steps * settings.strength + 1e-9) < 1:
        least = math.ceil(1 / settings.strength)
        raise UserError(
            f"--strength {settings.strength:g} of {steps} steps leaves no step, and the video would"
            f" only be stretched: give --steps {least} or more, or a larger --strength"
        )


def _steps_of(settings: UpscaleSettings, loaded: LoadedModel) -> int:
    if settings.steps is not None:
        return settings.steps
    return int(loaded.defaults.get("num_inference_steps", _DEFAULT_STEPS))


def _warn_of_small_size(
    request: Request,
    settings: UpscaleSettings,
    video: np.ndarray | None,
    warn: Callable[[str], None],
) -> None:
    """Warn of a large video that is no larger than the base video."""
    from ..freeswim.pipeline import target_size

    assert request.height is not None
    assert request.width is not None
    base = (request.height, request.width) if video is None else (video.shape[1], video.shape[2])
    height, width = target_size(base, settings.preset, settings.height, settings.width)
    if height <= base[0] and width <= base[1]:
        warn(
            f"the large video is {width}x{height}, no larger than the {base[1]}x{base[0]} that it"
            f" is made of: its details are made anew, and nothing is enlarged"
        )


def _make(
    request: Request,
    settings: UpscaleSettings,
    video: np.ndarray | None,
    loaded: LoadedModel,
    outputs: Outputs,
    kept: list[Path],
    say: Callable[[str], None],
) -> None:
    import torch

    from ..freeswim.pipeline import NEGATIVE_PROMPT, FreeSwimPipeline

    assert request.fps is not None
    # A complete request has all these settings.
    assert request.num_frames is not None
    assert request.height is not None
    assert request.width is not None
    assert request.steps is not None
    assert request.guidance_scale is not None
    length = "max_sequence_length"
    extra: dict[str, Any] = {length: loaded.defaults[length]} if length in loaded.defaults else {}
    if "frame_rate" in inspect.signature(type(loaded.pipe).__call__).parameters:
        extra["frame_rate"] = request.fps
    # A generator on the CPU gives the same noise for every device.
    generator = torch.Generator("cpu").manual_seed(request.seed)
    choices: dict[str, Any] = dataclasses.asdict(settings)
    del choices["input"]
    del choices["steps"]
    steps = _steps_of(settings, loaded)
    if choices["negative_prompt"] is None:
        choices["negative_prompt"] = loaded.defaults.get("negative_prompt", NEGATIVE_PROMPT)
    start = clock()
    stages = ("upscale",) if video is not None else ("base video", "upscale")
    with refusals(), watched(loaded.pipe, *stages) as times:
        out = FreeSwimPipeline(loaded.pipe)(
            request.prompt,
            video=video,
            num_frames=None if video is not None else request.num_frames,
            base_height=request.height,
            base_width=request.width,
            base_steps=request.steps,
            num_inference_steps=steps,
            guidance_scale=request.guidance_scale,
            generator=generator,
            say=say,
            **choices,
            **extra,
        )
    seconds = clock() - start
    frames = out.frames[0]
    if not np.isfinite(frames).all():
        raise UserError(gave_nan(loaded.dtype))
    pixels = (frames * 255).round().clip(0, 255).astype(np.uint8)
    shown = dataclasses.asdict(settings) | {
        "steps": steps,
        "negative_prompt": choices["negative_prompt"],
    }
    shown["input"] = None if settings.input is None else str(settings.input)
    record = {
        "diffattn_upscale_record": _FORMAT,
        "base": request.to_dict() | {"attention": {"type": "dense"}},
        "settings": shown,
        "versions": versions(),
        "files": {"video": outputs.video.name},
        "device": describe_device(loaded.device),
        "frames": list(pixels.shape[:3]),
        "steps": out.steps,
        "guide_steps": out.guide_steps,
        "store_bytes": out.store_bytes,
        "timings": {
            "total_seconds": round(seconds, 4),
            # The steps of the base video come first, and are left out.
            "step_seconds": [
                round(s, 4) for s in times.step_seconds[len(times.step_seconds) - out.steps :]
            ],
        },
    }
    with staged(outputs, kept) as folder:
        write_video(folder / outputs.video.name, pixels, request.fps)
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / outputs.sidecar.name).write_text(text + "\n", "utf-8")
    count, height, width = pixels.shape[:3]
    say(f"{on_disk(outputs.video)}: {count} frames {width}x{height}, {seconds:.1f} s")
