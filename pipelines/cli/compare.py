"""`diffattn compare`: its arguments; the package `compare` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .say import say, warn

EXAMPLES = options.examples(
    'compare "a red circle moving right on a blue background" --attn radial '
    '--attn "gna window=5,7,7" -o compared/',
    "compare --prompts-file prompts.txt --seed 0 --seed 1 --cases cases.json -o compared/ "
    "--model Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    'compare "..." --attn radial --attn gna --density 0.5 --density 0.25 -o compared/',
)

# Parameters that are no settings of a request.
_APART = (
    "prompt",
    "output",
    "attn",
    "attn_config",
    "cases",
    "density",
    "prompts_file",
    "seed",
    "measure",
    "flex",
    "only",
    "no_memory_check",
)

_COMPARED = "What is compared"


def compare(
    context: typer.Context,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the table, the videos and the page. The same command goes on with a"
            " run that was stopped.",
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file with one prompt a line.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            help="Each prompt is made with each seed; may be repeated (default: 0).",
            rich_help_panel=options.SAMPLING,
        ),
    ] = None,
    attn: Annotated[
        list[str] | None,
        typer.Option(
            "--attn",
            metavar='"NAME [PARAMETER=VALUE ..]"',
            help="A method with its parameters; may be repeated.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    attn_config: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON file with a method or a policy; may be repeated.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    cases: Annotated[
        Path | None,
        typer.Option(
            help="JSON file: an object with a method for each name.", rich_help_panel=_COMPARED
        ),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(
            help="Have each --attn compute this share of the token pairs in its sparse calls; may "
            "be repeated.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    flex: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CASE",
            help="Compute the mask of this case by torch's FlexAttention, too, and show how far "
            "the two kernels' results are apart; may be repeated.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="A measure to take; may be repeated (default: all that can be had).",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Make the samples of this case alone for now; may be repeated.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    model: options.Model = None,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="As in generate.", rich_help_panel=options.SOURCES),
    ] = None,
    last_image: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="As in generate.", rich_help_panel=options.SOURCES),
    ] = None,
    input: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="As in generate.", rich_help_panel=options.SOURCES),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="As in generate.", rich_help_panel=options.SOURCES)
    ] = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Frames = None,
    steps: options.Steps = None,
    guidance_scale: options.Guidance = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="As in generate.", rich_help_panel=options.SAMPLING)
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="As in generate.", rich_help_panel=options.SIZE)
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    offload: options.Offload = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[high=|low=]PATH[:SCALE]",
            help="LoRA file or folder for all cases, the dense model included; may be repeated.",
        ),
    ] = None,
    lora_everywhere: options.LoraEverywhere = None,
    no_memory_check: options.NoMemoryCheck = False,
) -> None:
    """Compare methods with the dense model: quality, time and memory, in a table and a page.

    Each table has two floors: the dense model in another precision, and by another kernel.
    """
    from ..compare.command import Asked, compare_methods

    asked = Asked(
        prompts=tuple(prompt or ()),
        prompts_file=prompts_file,
        seeds=tuple(seed or (0,)),
        methods=tuple(attn or ()),
        configs=tuple(attn_config or ()),
        cases=cases,
        densities=tuple(density or ()),
        measures=tuple(measure or ()),
        flex=tuple(flex or ()),
        only=tuple(only or ()),
    )
    compare_methods(
        asked,
        options.given_options(context, _APART),
        output,
        say,
        warn,
        memory_check=not no_memory_check,
    )
