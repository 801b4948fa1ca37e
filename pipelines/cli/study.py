"""`diffattn study`: its arguments; `compare.study` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .say import say, warn

EXAMPLES = options.examples(
    "study -o study/",
    "study -o study/ --only methods --only lora",
    "study -o study/ --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts 15 --lora my-lora",
)

# Parameters that are no settings of a request.
_APART = ("output", "prompts", "prompts_file", "seeds", "only", "lora", "no_memory_check")


def study(
    context: typer.Context,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the table, the videos and the page. The same command goes on with a"
            " study that was stopped.",
        ),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Make this part alone for now: methods, warm-up, ramps, lora, cache, or the name"
            " of a case; may be repeated."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts.")] = 15,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="UTF-8 file with one prompt a line, in place of the study's own."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="How many seeds, from 0.", rich_help_panel=options.SAMPLING)
    ] = 2,
    lora: Annotated[
        str | None,
        typer.Option(help="With --model: a LoRA of `lora train`, to show before and after."),
    ] = None,
    model: options.Model = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Frames = None,
    steps: options.Steps = None,
    guidance_scale: options.Guidance = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    offload: options.Offload = None,
    no_memory_check: options.NoMemoryCheck = False,
) -> None:
    """Study all methods on one model: at equal shares of the pairs, with schedules, LoRA, caches.

    It is a comparison (`diffattn compare`) with cases of its own; the figures of papers stand
    beside the measured ones.
    """
    from ..compare.study import AskedStudy
    from ..compare.study import study as run_study

    run_study(
        AskedStudy(prompts, prompts_file, seeds, tuple(only or ()), lora),
        options.given_options(context, _APART),
        output,
        say,
        warn,
        memory_check=not no_memory_check,
    )
