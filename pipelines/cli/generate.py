"""`diffattn generate`: its arguments; `run.generate` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..run.request import CONTEXT_PARALLEL
from . import options
from .say import say, warn

EXAMPLES = options.examples(
    'generate "a red circle moving right on a blue background" -o circle.mp4',
    'generate "..." -o out.mp4 --attn gna --attn-arg window=5,7,7',
    'generate "..." -o out.mp4 --compare',
    'generate "it starts to rain" --model MODEL --image first.jpg -o rain.mp4',
    "generate --from out.json -o again.mp4",
)

# Parameters that `generate` reads itself; all other options are settings of a request.
_NOT_OF_A_REQUEST = (
    "prompt",
    "output",
    "attn",
    "attn_arg",
    "attn_config",
    "prompts_file",
    "record",
    "no_memory_check",
)


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the video or picture shows.")] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="File (.mp4, .gif, .png for a folder of frames; of a model of pictures .png, "
            ".jpg, .webp) or folder (ends with /); it is overwritten. Without it, a new name made "
            "of the prompt.",
        ),
    ] = None,
    model: options.Model = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Picture: the first frame, the picture to change, or a reference picture of an "
            "editing model (repeat it for several).",
            rich_help_panel=options.SOURCES,
        ),
    ] = None,
    last_image: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Picture: the last frame.", rich_help_panel=options.SOURCES
        ),
    ] = None,
    input: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Video to change.", rich_help_panel=options.SOURCES),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of the picture or the video is changed, up to 1 (default: the "
            "pipeline's).",
            rich_help_panel=options.SOURCES,
        ),
    ] = None,
    attn: options.Attn = None,
    attn_arg: options.AttnArg = None,
    attn_config: options.AttnConfig = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Frames = None,
    steps: options.Steps = None,
    guidance_scale: options.Guidance = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="What it should not show.", rich_help_panel=options.SAMPLING),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="The same for every prompt (default: 0).", rich_help_panel=options.SAMPLING
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames a second of the file (default: the model's or 16).",
            rich_help_panel=options.SIZE,
        ),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    offload: options.Offload = None,
    context_parallel: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(CONTEXT_PARALLEL),
            help="How the processes that torchrun started share the work.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    no_memory_check: options.NoMemoryCheck = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[high=|low=]PATH[:SCALE]",
            help="LoRA file or folder, of any program; may be repeated. A LoRA of `lora train` "
            "brings its method. high and low are the experts of Wan 2.2.",
        ),
    ] = None,
    lora_everywhere: options.LoraEverywhere = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="UTF-8 file with one prompt a line; one video or picture each."),
    ] = None,
    compare: Annotated[
        bool | None,
        typer.Option("--compare/--no-compare", help="Also render dense, and show both."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--from", help="Repeat the run of a JSON sidecar; other options override it."),
    ] = None,
) -> None:
    """Render a video, or a picture, for a prompt and for pictures to start from."""
    from ..run.job import Source, plan_job
    from ..run.method_settings import MethodOptions

    job = plan_job(
        Source(prompt, prompts_file, record),
        MethodOptions(attn, tuple(attn_arg or ()), attn_config),
        options.given_options(context, _NOT_OF_A_REQUEST),
        output,
        say,
    )

    from ..run.generate import generate as make_videos

    make_videos(job, say, warn, memory_check=not no_memory_check)
