"""`diffattn upscale`: its arguments; `run` does the work."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..run.request import BUNDLED_MODEL, DTYPES, OFFLOADS, option
from . import options
from .say import say, warn

EXAMPLES = options.examples(
    'upscale "a red circle moving right on a blue background" -o large.mp4',
    'upscale "..." --input small.mp4 --height 1088 --width 1920 -o large.mp4 --model WAN-FOLDER',
    'upscale "..." --model SD-XL-FOLDER -o large.png',
)

_Large = Annotated[
    int | None,
    typer.Option(help="Pixels (default: twice as many).", rich_help_panel=options.SIZE),
]
_Own = Annotated[
    int | None, typer.Option(help="The model's own size.", rich_help_panel=options.SIZE)
]


def upscale(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the video or the picture shows.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="As in generate; it is overwritten."),
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(help="Video or picture to start from (default: one of the model's own size)."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub id of a pipeline of Wan or LTX-Video, or for pictures of Stable "
            "Diffusion 1.5, 2.1, XL or Flux."
        ),
    ] = BUNDLED_MODEL,
    preset: Annotated[
        str | None, typer.Option(metavar="1080p|1440p|2160p", rich_help_panel=options.SIZE)
    ] = None,
    height: _Large = None,
    width: _Large = None,
    num_frames: options.Frames = None,
    base_height: _Own = None,
    base_width: _Own = None,
    base_steps: options.Steps = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="At the large size, before strength (default: the model's).",
            rich_help_panel=options.SAMPLING,
        ),
    ] = None,
    strength: Annotated[
        float,
        typer.Option(help="How much is made anew, up to 1.", rich_help_panel=options.SAMPLING),
    ] = 0.7,
    strengths: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y..",
            help="Pictures: how much is made anew at each size (default: 0.4,0.3,0.2,0.1, or 0.7).",
            rich_help_panel=options.SAMPLING,
        ),
    ] = None,
    attn: Annotated[
        str | None,
        typer.Option(
            "--attn",
            "--method",
            help="Pictures: attention method (default: the untouched model).",
            rich_help_panel=options.ATTENTION,
        ),
    ] = None,
    attn_arg: options.AttnArg = None,
    attn_config: options.AttnConfig = None,
    cache_steps: Annotated[
        str,
        typer.Option(
            metavar="N|none",
            help="All tokens guide every N steps, and the other steps reuse that guidance; 1: they "
            "guide in each step; none: in each step, and without the prompt too, as in the public "
            "code's slower mode.",
            rich_help_panel=options.ATTENTION,
        ),
    ] = "2",
    store: Annotated[
        str,
        typer.Option(
            metavar="device|cpu|pinned",
            help="Where guidance waits to be reused.",
            rich_help_panel=options.MACHINE,
        ),
    ] = "device",
    interpolation: Annotated[
        str, typer.Option(metavar="nearest|bilinear|bicubic|lanczos", rich_help_panel=options.SIZE)
    ] = "bilinear",
    flow_shift: Annotated[
        float,
        typer.Option(help="Noise schedule at the large size.", rich_help_panel=options.SAMPLING),
    ] = 9.0,
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help="At the large size (default: the model's, or the paper's).",
            rich_help_panel=options.SAMPLING,
        ),
    ] = None,
    guidance_scale: options.Guidance = None,
    seed: Annotated[int, typer.Option(rich_help_panel=options.SAMPLING)] = 0,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Of the file (default: the input's or the model's).",
            rich_help_panel=options.SIZE,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="|".join(DTYPES), rich_help_panel=options.MACHINE),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="As in generate.", rich_help_panel=options.MACHINE)
    ] = None,
    offload: Annotated[
        str, typer.Option(metavar="|".join(OFFLOADS), rich_help_panel=options.MACHINE)
    ] = "none",
    no_memory_check: options.NoMemoryCheck = False,
) -> None:
    """Make a video or a picture beyond the model's own size, from a prompt or from a smaller one.

    Videos are made by FreeSwim, pictures by doubling them and making their details anew.
    """
    from ..run.method_settings import MethodOptions
    from ..run.request import Request
    from ..run.upscale_picture import (
        PICTURE_OPTIONS,
        PictureSettings,
        makes_pictures,
        picture_attention,
        read_strengths,
        upscale_picture,
    )
    from ..run.upscale_video import VIDEO_OPTIONS, UpscaleSettings, check_counts, read_cache_steps
    from ..run.upscale_video import upscale as make_large

    check_counts(base_height=base_height, base_width=base_width, base_steps=base_steps, steps=steps)
    request = Request(
        prompt,
        model=model,
        height=base_height,
        width=base_width,
        num_frames=num_frames,
        steps=base_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        fps=fps,
        dtype=dtype,
        device=device,
        offload=offload,
    )
    if makes_pictures(model):
        _refuse_others(context, PICTURE_OPTIONS, "pictures")
        method = MethodOptions(attn, tuple(attn_arg or ()), attn_config)
        picture = PictureSettings(
            input=input,
            height=height,
            width=width,
            steps=steps,
            strengths=read_strengths(strengths),
            negative_prompt=negative_prompt,
            attention=picture_attention(method),
            attn_config=attn_config,
        )
        upscale_picture(request, picture, output, say)
        return
    _refuse_others(context, VIDEO_OPTIONS, "videos")
    settings = UpscaleSettings(
        input=input,
        preset=preset,
        height=height,
        width=width,
        steps=steps,
        strength=strength,
        cache_steps=read_cache_steps(cache_steps),
        store=store,
        interpolation=interpolation,
        flow_shift=flow_shift,
        negative_prompt=negative_prompt,
    )
    make_large(request, settings, output, say, warn, memory_check=not no_memory_check)


def _refuse_others(context: typer.Context, known: Collection[str], kind: str) -> None:
    """Refuse options that the user wrote, but that have no effect on what the model makes."""
    others = [name for name in options.written_options(context) if name not in known]
    if not others:
        return
    hint = ""
    if kind == "videos":
        hint = ", whose two paths are FreeSwim's"
    elif "strength" in others:
        hint = "; for pictures it is --strengths"
    raise UserError(
        f"{', '.join(map(option, others))} cannot be given with a model of {kind}{hint}"
    )
