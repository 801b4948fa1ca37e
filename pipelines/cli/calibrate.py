"""`diffattn calibrate`: its arguments; `calibrate.run` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from . import options
from .say import say, warn

EXAMPLES = options.examples(
    "calibrate --work 0.3 -o found",
    "calibrate --work 0.3 --model MODEL --prompts prompts.txt --minutes 60 -o found",
    'generate "..." -o out.mp4 --attn-config found/policy.json',
)

# Parameters that `calibrate` reads itself; all other options are settings of a request.
_NOT_OF_A_REQUEST = (
    "output",
    "work",
    "prompts",
    "attn",
    "attn_arg",
    "attn_config",
    "renders",
    "minutes",
    "no_memory_check",
)
_RENDERS = 300


def calibrate(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for policy.json and for what an interrupted search goes on from.",
        ),
    ] = None,
    work: Annotated[
        float,
        typer.Option(help="Wanted share of the attention FLOPs of a dense run, warm-up included."),
    ] = 0.3,
    model: options.Model = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 file with one prompt a line, of which the first 16 are used (default: "
            "captions of the bundled model).",
        ),
    ] = None,
    renders: Annotated[
        int | None,
        typer.Option(help=f"Calls of the pipeline in all (default: {_RENDERS})."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of this run, instead of --renders.")
    ] = None,
    attn: Annotated[
        list[str] | None,
        typer.Option(
            "--attn",
            "--method",
            help="Method to try; may be repeated (default: block-topk in three forms, vmoba, gna).",
            rich_help_panel=options.ATTENTION,
            autocompletion=options.method_names,
        ),
    ] = None,
    attn_arg: options.AttnArg = None,
    attn_config: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with a method, or a list of methods, to try instead of --attn.",
            rich_help_panel=options.ATTENTION,
        ),
    ] = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Frames = None,
    steps: options.Steps = None,
    guidance_scale: options.Guidance = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="What videos should not show.", rich_help_panel=options.SAMPLING),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the first prompt; the next has the next number (default: 0).",
            rich_help_panel=options.SAMPLING,
        ),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    offload: options.Offload = None,
    no_memory_check: options.NoMemoryCheck = False,
) -> None:
    """Find the policy that is nearest to dense at a wanted work, by rendering with it.

    A policy has a method and its parameters for each layer and range of steps. Interrupted, the
    same command goes on.
    """
    from ..calibrate.command import Asked, plan_calibration
    from ..run.prompts import read_prompts

    if output is None:
        raise UserError("give --output FOLDER, where the policy is written")
    if renders is not None and minutes is not None:
        raise UserError("give --renders or --minutes, not both")
    if minutes is None and renders is None:
        renders = _RENDERS
    asked = Asked(
        prompts=None if prompts is None else read_prompts(prompts).prompts,
        names=tuple(attn or ()),
        arguments=tuple(attn_arg or ()),
        config=attn_config,
        work=work,
        renders=renders,
        minutes=minutes,
    )
    begin = plan_calibration(asked, options.given_options(context, _NOT_OF_A_REQUEST), output)
    begin(say, warn, memory_check=not no_memory_check)
