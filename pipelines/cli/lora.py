"""`diffattn lora`: its arguments; `train.run` does the work."""

from __future__ import annotations

from typing import Annotated

import typer

from ..run.request import DTYPES
from . import options

app = typer.Typer(no_args_is_help=True, help="Adapt a model to sparse attention by LoRA.")

# Parameters that are not settings of the training.
_APART = (
    "output", "config", "resume", "attn", "attn_arg", "attn_config", "no_memory_check",
    "optimizer_arg",
)  # fmt: skip
# Options that may be repeated, and the setting that takes all values of each.
PLURALS = {
    "target": "targets",
    "tracker": "trackers",
    "validation_prompt": "validation_prompts",
}

_DATA, _SCHEDULE, _ADAPTER = "Data", options.TRAINING, options.ADAPTER
_LOSS, _WATCH = options.LOSSES, "Checkpoints and validation"
EXAMPLES = options.examples(
    "lora train --data clips/ --attn gna --output my-lora",
    "lora plan --model Wan-AI/Wan2.1-T2V-14B --vram 24",
    "lora train --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --attn radial --data clips/ "
    "--num-frames 161 --steps 2500 --gradient-checkpointing --output wan-radial",
    "lora train --data clips/ --attn gna --output my-lora --resume",
)

_Number = Annotated[int | None, typer.Option(rich_help_panel=_SCHEDULE)]


@app.command(epilog=EXAMPLES)
def train(
    context: typer.Context,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the LoRA, checkpoints and the log.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of clips and pictures, with captions in .txt files beside them.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option(
            help="A .csv or .jsonl table of file names and captions instead.", rich_help_panel=_DATA
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Instead of --data: prompts, one a line, of which the dense model makes "
            "its own training set.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="TOML or JSON file of these options by their names; options override."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")
    ] = False,
    model: options.Model = None,
    attn: options.Attn = None,
    attn_arg: options.AttnArg = None,
    attn_config: options.AttnConfig = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: Annotated[
        int | None,
        typer.Option(
            help="More frames than the model's own adapt the model to longer videos.",
            rich_help_panel=options.SIZE,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames a second to take of a clip (default: all).", rich_help_panel=_DATA
        ),
    ] = None,
    vae_tiling: Annotated[
        bool | None,
        typer.Option(
            "--vae-tiling/--no-vae-tiling",
            help="Encode clips, and decode validation videos, in overlapping tiles if they are "
            "large (default), which saves memory.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Videos of each of --prompts.", rich_help_panel=_DATA)
    ] = None,
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps of each such video (default: the model's).", rich_help_panel=_DATA
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Folder of encoded clips (default: clips in --output).", rich_help_panel=_DATA
        ),
    ] = None,
    init_lora: Annotated[
        str | None,
        typer.Option(
            help="LoRA file or folder, of any program, to start from (its rank is the default).",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    ema: options.Ema = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            help="Clips to keep out; the loss on them is logged at each checkpoint.",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps (default: 1000).", rich_help_panel=_SCHEDULE)
    ] = None,
    batch_size: options.BatchSize = None,
    accumulation: options.Accumulation = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: 1e-4.", rich_help_panel=_SCHEDULE)
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="constant|linear|cosine", rich_help_panel=_SCHEDULE)
    ] = None,
    warmup_steps: _Number = None,
    rank: options.Rank = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="The LoRA's factor is alpha / rank.", rich_help_panel=_ADAPTER),
    ] = None,
    target: options.Targets = None,
    dropout: Annotated[
        float | None, typer.Option(help="Of the LoRA's inputs.", rich_help_panel=_ADAPTER)
    ] = None,
    dora: Annotated[bool | None, typer.Option("--dora/--no-dora", rich_help_panel=_ADAPTER)] = None,
    rslora: Annotated[
        bool | None, typer.Option("--rslora/--no-rslora", rich_help_panel=_ADAPTER)
    ] = None,
    method_only: Annotated[
        bool | None,
        typer.Option(
            "--method-only/--no-method-only",
            help="Train the method's own weights and no LoRA, as for SLA2's router.",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    method_weights: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Start from the method's own weights of another training.",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    denoiser: options.Denoiser = None,
    objective: options.LossWeight = None,
    prediction: options.LossWeight = None,
    attention_output: options.LossWeight = None,
    attention_every: options.AttentionEvery = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale that Flux-dev and HunyuanVideo are told where they learn from "
            "clips (default: 1, or that of the videos of --prompts).",
            rich_help_panel=_LOSS,
        ),
    ] = None,
    teacher_guidance: Annotated[
        float | None,
        typer.Option(
            help="The same where they are compared with the dense model (default: the model's).",
            rich_help_panel=_LOSS,
        ),
    ] = None,
    optimizer: options.Optimizer = None,
    optimizer_arg: options.OptimizerArg = None,
    weight_decay: Annotated[float | None, typer.Option(rich_help_panel=_SCHEDULE)] = None,
    max_grad_norm: Annotated[float | None, typer.Option(rich_help_panel=_SCHEDULE)] = None,
    shift: Annotated[
        float | None,
        typer.Option(
            help="Of the noise levels (default: the steps of sampling).", rich_help_panel=_SCHEDULE
        ),
    ] = None,
    noise_levels: Annotated[
        str | None,
        typer.Option(
            metavar="logit-normal|uniform",
            help="Train most at the middle of sampling runs (default), or all parts alike.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = None,
    caption_dropout: Annotated[
        float | None, typer.Option(help="Default: 0.1.", rich_help_panel=_SCHEDULE)
    ] = None,
    seed: _Number = None,
    mixed_precision: Annotated[
        str | None, typer.Option(metavar="no|bf16|fp16", rich_help_panel=_SCHEDULE)
    ] = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    offload_activations: options.OffloadActivations = None,
    swap_blocks: options.SwapBlocks = None,
    base_dtype: options.BaseDtype = None,
    context_parallel: Annotated[
        str | None,
        typer.Option(
            metavar="ulysses|ring",
            help="Have all processes share each sample, for videos too long for one.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps (default: 500).", rich_help_panel=_WATCH)
    ] = None,
    keep_checkpoints: Annotated[
        int | None, typer.Option(help="Default: the last 3.", rich_help_panel=_WATCH)
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard or wandb, if installed.", rich_help_panel=_WATCH),
    ] = None,
    validate_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between validation videos (default: none).", rich_help_panel=_WATCH
        ),
    ] = None,
    validation_prompt: Annotated[list[str] | None, typer.Option(rich_help_panel=_WATCH)] = None,
    validation_prompts_file: Annotated[
        str | None,
        typer.Option(
            help="UTF-8 file with one prompt a line, beside or instead of --validation-prompt.",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    validation_steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps of validation videos (default: the model's).",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    lora_everywhere: options.LoraEverywhere = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DTYPES),
            help="Of the frozen model; the LoRA is float32.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, or the accelerator (default).", rich_help_panel=options.MACHINE),
    ] = None,
    no_memory_check: options.NoMemoryCheck = False,
) -> None:
    """Train a LoRA under a method; several processes by `accelerate launch -m diffattn.pipelines`.

    The LoRA loads in stock diffusers by `pipe.load_lora_weights`, and `diffattn generate --lora`
    attaches the same method by itself.
    """
    from ..run.method_settings import MethodOptions
    from ..train.run import train_lora

    given = {
        PLURALS.get(name, name): value
        for name, value in options.given_options(context, _APART).items()
    }
    train_lora(
        given | options.optimizer_arguments(optimizer_arg),
        MethodOptions(attn, tuple(attn_arg or ()), attn_config),
        output,
        config,
        resume=resume,
        memory_check=not no_memory_check,
        say=typer.echo,
        warn=lambda line: typer.echo(f"warning: {line}", err=True),
    )
