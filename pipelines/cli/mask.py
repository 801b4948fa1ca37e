"""`diffattn mask`: its arguments; `mask_picture` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..run.request import BUNDLED_MODEL
from . import options
from .say import say

EXAMPLES = options.examples(
    "mask --grid 21x30x52 --attn gna --attn-arg window=7,15,15 -o mask.png",
    "mask --model Wan-AI/Wan2.1-T2V-14B --attn radial -o radial.png",
    "mask --grid 64+16x16 --reference 16x16 --attn clear --attn-arg references=local",
    "mask --grid 13x30x52 --attn sol --attn-arg tau=1.3 -o sol.png",
    'mask --attn vmoba --prompt "a red circle moving right on a blue background"',
)

# Parameters that `mask` reads itself; all other options describe a run, or a call in the run.
_NOT_OF_A_RUN = (
    "grid",
    "reference",
    "attn",
    "attn_arg",
    "attn_config",
    "output",
    "query",
    "prompt",
)
_OF_A_CALL = ("step", "layer", "head")


def mask(
    context: typer.Context,
    grid: options.Grid = None,
    reference: options.References = None,
    attn: options.Attn = None,
    attn_arg: options.AttnArg = None,
    attn_config: options.AttnConfig = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="PNG file; it is overwritten."),
    ] = Path("mask.png"),
    query: Annotated[
        str | None,
        typer.Option(
            metavar="T,Y,X", help="Token whose neighbourhood is shown (default: the middle)."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="For a method that selects by content, instead of --grid: prompt of a run to look "
            "into. On a --grid its queries and keys are random."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Draw what this model runs: hub id of a well-known model or a pipeline's folder "
            f"(with --prompt the default is the bundled {BUNDLED_MODEL})."
        ),
    ] = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Frames = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the run, or of random queries and keys (default: 0).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the run (default: the model's).")] = None,
    step: Annotated[
        int | None,
        typer.Option(
            help="Denoising step to draw, from 1 (default: the middle; for a mask that differs from"
            " step to step, with --steps, the last)."
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="From 0 (default: 0).")] = None,
    head: Annotated[int | None, typer.Option(help="From 0 (default: 0).")] = None,
) -> None:
    """Draw which tokens attend to which under a method: on a grid, in a model, or in a run.

    A method that selects by content is drawn on a grid with smooth random queries and keys.
    """
    from ..run.method_settings import MethodOptions
    from .mask_picture import RunOptions, draw_mask

    settings = options.given_options(context, _NOT_OF_A_RUN)
    call = {name: settings.pop(name) for name in _OF_A_CALL if name in settings}
    run = RunOptions(prompt, settings, call)
    method = MethodOptions(attn, tuple(attn_arg or ()), attn_config)
    for line in draw_mask(method, grid, tuple(reference or ()), query, output, run):
        say(line)
