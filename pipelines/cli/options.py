"""Options that commands share, and the options that the user gave to a command."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from ..run.request import BASE_DTYPES, BUNDLED_MODEL, DTYPES, OFFLOADS

_FROM_MODEL = "Default: the model's."

# Groups of options in the help.
ATTENTION = "Attention"
SOURCES = "Pictures and videos to start from"
SIZE = "Size and length"
SAMPLING = "Sampling"
MACHINE = "Machine"
TRAINING, ADAPTER, LOSSES = "Training", "LoRA", "Losses"

Model = Annotated[
    str | None,
    typer.Option(help=f"Pipeline folder or hub id (default: the bundled {BUNDLED_MODEL})."),
]
Pixels = Annotated[
    int | None, typer.Option(help="Pixels (default: the model's).", rich_help_panel=SIZE)
]
Frames = Annotated[int | None, typer.Option(help=_FROM_MODEL, rich_help_panel=SIZE)]
Steps = Annotated[int | None, typer.Option(help=_FROM_MODEL, rich_help_panel=SAMPLING)]
Guidance = Annotated[float | None, typer.Option(help=_FROM_MODEL, rich_help_panel=SAMPLING)]


def method_names() -> list[str]:
    from .listing import method_names as names  # for completion in a shell alone

    return names()


LoraEverywhere = Annotated[
    bool | None,
    typer.Option(
        "--lora-everywhere/--no-lora-everywhere",
        help="Keep a LoRA of `lora train` on in dense steps and under other methods, too.",
    ),
]

Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(DTYPES),
        help="Default: float32 on the CPU, else bfloat16.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, .. (default: the accelerator, if any).", rich_help_panel=MACHINE
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(OFFLOADS), help="What waits in main memory.", rich_help_panel=MACHINE
    ),
]
NoMemoryCheck = Annotated[
    bool,
    typer.Option(
        "--no-memory-check",
        help="Go on where the device seems to have too little memory.",
        rich_help_panel=MACHINE,
    ),
]
Attn = Annotated[
    str | None,
    typer.Option(
        "--attn",
        "--method",
        help="Attention method, see `diffattn methods` (default: radial; gna for pictures).",
        rich_help_panel=ATTENTION,
        autocompletion=method_names,
    ),
]
AttnArg = Annotated[
    list[str] | None,
    typer.Option(
        "--attn-arg",
        "--arg",
        metavar="NAME=VALUE",
        help="Parameter of the method; may be repeated. By step: keep=1x2,0.5,0.25 gives each step"
        " its value, tau=1.3..0.8 is a ramp, keep=early_ramp:0.15 is denser early, and"
        " window=5,9,9/3,5,5 gives each step a window.",
        rich_help_panel=ATTENTION,
    ),
]
AttnConfig = Annotated[
    Path | None,
    typer.Option(
        help="JSON file with the method and its parameters, instead of --attn.",
        rich_help_panel=ATTENTION,
    ),
]
Grid = Annotated[
    str | None,
    typer.Option(
        help="Latent frames x height x width in tokens; text tokens as 21x30x52+256 or 256+64x64.",
        rich_help_panel=SIZE,
    ),
]
References = Annotated[
    list[str] | None,
    typer.Option(
        "--reference",
        metavar="TxHxW[@START]",
        help="A further picture or video in the sequence, in tokens: after the video, or with START"
        " among the other tokens of --grid, from that position. May be repeated. How references"
        " attend: --attn-arg references=exact, visible or local.",
        rich_help_panel=SIZE,
    ),
]
Rank = Annotated[
    int | None, typer.Option(help="Default: the method's paper's.", rich_help_panel=ADAPTER)
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        help="Layer of the attention sites (default: to_q, to_k, to_v, to_out.0).",
        rich_help_panel=ADAPTER,
    ),
]
Denoiser = Annotated[
    str | None,
    typer.Option(help="transformer_2 for the second expert of Wan 2.2.", rich_help_panel=ADAPTER),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Samples in a forward of one process (default: 1).", rich_help_panel=TRAINING
    ),
]
Accumulation = Annotated[
    int | None, typer.Option(help="Forwards a step (default: 1).", rich_help_panel=TRAINING)
]
Ema = Annotated[
    float | None,
    typer.Option(
        help="Also write a moving average of the weights, of which each step keeps this part, "
        "such as 0.99.",
        rich_help_panel=TRAINING,
    ),
]
LossWeight = Annotated[
    float | None,
    typer.Option(help="Weight of this loss (default: the paper's).", rich_help_panel=LOSSES),
]
AttentionEvery = Annotated[
    int | None,
    typer.Option(help="Compare attention in every so many layers.", rich_help_panel=LOSSES),
]
Optimizer = Annotated[
    str | None,
    typer.Option(
        metavar="LIBRARY.CLASS",
        help="Of torch, bitsandbytes, torchao or schedulefree, such as bitsandbytes.AdamW8bit or "
        "schedulefree.AdamWScheduleFree (default: torch.AdamW).",
        rich_help_panel=TRAINING,
    ),
]
OptimizerArg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Further argument of the optimiser, such as betas=[0.9,0.99]; may be repeated.",
        rich_help_panel=TRAINING,
    ),
]
GradientCheckpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Compute activations twice, instead of keeping them.",
        rich_help_panel=MACHINE,
    ),
]
OffloadActivations = Annotated[
    bool | None,
    typer.Option(
        "--offload-activations/--no-offload-activations",
        help="What gradient checkpointing keeps waits in main memory.",
        rich_help_panel=MACHINE,
    ),
]
SwapBlocks = Annotated[
    int | None,
    typer.Option(
        help="Blocks whose frozen weights wait in main memory (default: none).",
        rich_help_panel=MACHINE,
    ),
]
BaseDtype = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(BASE_DTYPES),
        help="How frozen weights of blocks are stored; int8 needs torchao, nf4 bitsandbytes.",
        rich_help_panel=MACHINE,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]


def examples(*commands: str) -> str:
    """The end of a command's help: examples, each a paragraph of its own."""
    return "\n\n".join(["Examples:", *(f"$ diffattn {command}" for command in commands)])


def given_options(context: typer.Context, apart: Collection[str]) -> dict[str, Any]:
    """The options that have a value, by the names and in the order of the command's parameters.

    The command passes these options on as settings. The names of settings are checked there: an
    option that is no setting is an error.

    Args:
        context: of the command.
        apart: parameters to leave out, which the command reads itself.
    """
    values = {str(parameter.name): context.params[parameter.name] for parameter in _all(context)}
    return {
        name: value
        for name, value in values.items()
        # An option that may be repeated is empty where the user did not give it.
        if name not in apart and value is not None and value != ()
    }


def optimizer_arguments(given: list[str] | None) -> dict[str, Any]:
    """The setting that --optimizer-arg gives; nothing without one.

    Raises:
        UserError: if an argument is not "name=value", or comes twice.
    """
    arguments: dict[str, Any] = {}
    for argument in given or ():
        name, equals, value = (part.strip() for part in argument.partition("="))
        if not name or not equals:
            raise UserError(f"--optimizer-arg takes name=value, not {argument!r}")
        if name in arguments:
            raise UserError(f"--optimizer-arg gives {name} twice, the second time as {argument!r}")
        try:
            arguments[name] = json.loads(value)
        except (ValueError, RecursionError):
            arguments[name] = value
    return {"optimizer_args": arguments} if arguments else {}


def written_options(context: typer.Context) -> list[str]:
    """The names of the parameters that the user wrote on the command line."""
    names = [str(parameter.name) for parameter in _all(context)]
    return [
        name
        for name in names
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]


def _all(context: typer.Context) -> list[Any]:
    """The parameters of the command, without --help."""
    return [p for p in context.command.params if p.name in context.params]
