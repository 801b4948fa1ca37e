"""`diffattn plan`: its arguments; `plan_table` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..run.request import BUNDLED_MODEL
from . import options
from .say import say

EXAMPLES = options.examples(
    "plan --model Wan-AI/Wan2.1-T2V-14B --attn gna --height 720 --width 1280 --num-frames 81",
    "plan --from circle.mp4.json",
    "plan --grid 21x30x52 --attn gna --attn-arg window=7,15,15",
    "plan --grid 512+64x64 --reference 64x64 --attn clear --attn-arg references=local",
)

# Parameters that `plan` reads itself; all other options are arguments of `diffattn.plan`.
_NOT_OF_A_PLAN = (
    "attn", "attn_arg", "attn_config", "model", "grid", "reference", "lora", "record", "as_json",
)  # fmt: skip


def plan(
    context: typer.Context,
    attn: options.Attn = None,
    attn_arg: options.AttnArg = None,
    attn_config: options.AttnConfig = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id of a well-known model, a pipeline's folder, or the bundled "
            f"{BUNDLED_MODEL}."
        ),
    ] = None,
    grid: options.Grid = None,
    reference: options.References = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Frames = None,
    text: Annotated[
        int | None, typer.Option(help="Text tokens in the model's sequence (default: the model's).")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="With --grid (default: 1).")] = None,
    head_dim: Annotated[int | None, typer.Option(help="With --grid (default: 128).")] = None,
    layers: Annotated[int | None, typer.Option(help="With --grid (default: 1).")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a run.")] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            help="LoRA of `lora train`: plan its method, and the size that it was trained at unless"
            " a size is given."
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Plan the run of a JSON sidecar; other options override the sidecar."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what a method costs on a model or grid, without running or downloading anything."""
    from ..run.method_settings import MethodOptions
    from ..run.origin import Origin
    from .plan_table import PlanOptions, plan_lines

    method = MethodOptions(attn, tuple(attn_arg or ()), attn_config)
    numbers = options.given_options(context, _NOT_OF_A_PLAN)
    for line in plan_lines(
        PlanOptions(method, model, grid, tuple(reference or ()), numbers, Origin(lora, record)),
        as_json,
    ):
        say(line)
