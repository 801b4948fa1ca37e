"""Options that commands share, and the options that the user gave to a command."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from ..run.request import BUNDLED_MODEL, DTYPES, OFFLOADS

_FROM_MODEL = "Default: the model's."

# Groups of options in the help.
ATTENTION = "Attention"
SOURCES = "Pictures and videos to start from"
SIZE = "Size and length"
SAMPLING = "Sampling"
MACHINE = "Machine"

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
