"""`diffattn lora plan`: its arguments; `train.estimate` does the work."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..run.request import DTYPES
from . import options
from .lora import PLURALS
from .lora_files import app
from .say import say

EXAMPLES = options.examples(
    "lora plan --model Wan-AI/Wan2.1-T2V-14B --attn radial --height 480 --width 832 "
    "--num-frames 81 --vram 24",
    "lora plan --attn gna --rank 16 --batch-size 4 --optimizer torchao.AdamW8bit",
)

# Options that are no settings of the training.
_APART = (
    "model", "attn", "attn_arg", "attn_config", "height", "width", "num_frames", "dtype",
    "base_dtype", "optimizer_arg", "vram", "tflops", "as_json",
)  # fmt: skip


@app.command(epilog=EXAMPLES)
def plan(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id of a well-known model, or a folder (default: the bundled model)."
        ),
    ] = None,
    attn: options.Attn = None,
    attn_arg: options.AttnArg = None,
    attn_config: options.AttnConfig = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Frames = None,
    rank: options.Rank = None,
    target: options.Targets = None,
    denoiser: options.Denoiser = None,
    batch_size: options.BatchSize = None,
    accumulation: options.Accumulation = None,
    ema: options.Ema = None,
    objective: options.LossWeight = None,
    prediction: options.LossWeight = None,
    attention_output: options.LossWeight = None,
    attention_every: options.AttentionEvery = None,
    optimizer: options.Optimizer = None,
    optimizer_arg: options.OptimizerArg = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    offload_activations: options.OffloadActivations = None,
    swap_blocks: options.SwapBlocks = None,
    base_dtype: options.BaseDtype = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DTYPES),
            help="That layers compute in (default: bfloat16).",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    vram: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="Memory of the device: say which options fit.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="TFLOP/s of the device in large matrix products (default: 790, an H200's).",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what memory and work a training needs, without loading or downloading anything."""
    import torch

    from diffattn._checks import choice, number, whole
    from diffattn.lora.errors import LoraError
    from diffattn.lora.settings import TrainSettings

    from ..errors import UserError
    from ..run.machine import quiet_libraries
    from ..run.method_settings import MethodOptions, attention_settings
    from ..run.request import BASE_DTYPES, BUNDLED_MODEL, TEXT, check_option
    from ..train import estimate

    size = {"height": height, "width": width, "num_frames": num_frames}
    for name, value in size.items():
        if value is not None:
            check_option(name, value, whole(1))
    if model is not None:
        check_option("model", model, TEXT)
    if dtype is not None:
        check_option("dtype", dtype, choice(DTYPES))
    if base_dtype is not None:
        check_option("base_dtype", base_dtype, choice(BASE_DTYPES))
    if tflops is not None:
        check_option("tflops", tflops, number(above=0))
    budget = None if vram is None else estimate.bytes_of("vram", vram)
    method = attention_settings(MethodOptions(attn, tuple(attn_arg or ()), attn_config), None)
    given = {
        PLURALS.get(name, name): value
        for name, value in options.given_options(context, _APART).items()
    }
    try:
        settings = TrainSettings.from_dict(
            given | options.optimizer_arguments(optimizer_arg) | {"attention": method}
        )
    except LoraError as error:
        raise UserError(error) from None
    quiet_libraries()
    made = estimate.estimate(
        BUNDLED_MODEL if model is None else model,
        size,
        settings,
        base_dtype,
        getattr(torch, dtype or "bfloat16"),
        torch.device("cuda"),
        tflops,
    )
    if as_json:
        say(json.dumps(estimate.as_json(made, budget), indent=2))
        return
    for line in estimate.lines(made, budget, tflops):
        say(line)
