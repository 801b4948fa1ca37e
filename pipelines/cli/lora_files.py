"""`diffattn lora info`, `convert`, `merge` and `join`: arguments; `diffattn.lora` does the work."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from . import options
from .lora import app

if TYPE_CHECKING:
    from diffattn.lora.describe import LoraFacts
    from diffattn.lora.merging import Scaled

# Beyond it a scale is a slip of the finger.
_LARGEST_SCALE = 100
_LAYOUTS = "diffusers|comfyui|kohya|musubi|diffsynth"
_Family = Annotated[
    str | None,
    typer.Option(help="The model's family, where header and names do not tell.", metavar="NAME"),
]


def _warn(line: str) -> None:
    typer.echo(f"warning: {line}", err=True)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    from diffattn.lora.errors import LoraError

    try:
        yield
    except LoraError as error:
        raise UserError(error) from None


@app.command(
    epilog=options.examples("lora info my-lora", "lora info downloaded.safetensors --json")
)
def info(
    path: Annotated[str, typer.Argument(metavar="FILE|FOLDER", help="A LoRA of any program.")],
    as_json: options.AsJson = False,
) -> None:
    """Say what a LoRA is: layout, model, ranks, layers, method, size."""
    from diffattn.lora.describe import describe

    with _refusals():
        found = describe(path)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(facts) for facts in found], indent=1))
        return
    typer.echo("\n\n".join("\n".join(_lines(facts)) for facts in found))


def _lines(facts: LoraFacts) -> Iterator[str]:
    rows = {
        "file": f"{facts.file} ({facts.bytes / 2**20:.1f} MiB)",
        "layout": facts.layout,
        "family": facts.family or "unknown" + _could_be(facts),
        "model": facts.model,
        "for": facts.component,
        "layers": f"{facts.layers}: " + _counted(facts.targets),
        "rank": _counted(facts.ranks, alone=True),
        "alpha / rank": _counted(facts.strengths, alone=True),
        "tensors": f"{_counted(facts.dtypes, alone=True)}, {facts.parameters:,} parameters",
        "also": "; ".join(facts.extras),
    }
    if facts.method is not None:
        kept = {k: v for k, v in facts.method.items() if k != "type" and v is not None}
        rows |= {
            "method": " ".join([facts.method["type"], *(f"{k}={v}" for k, v in kept.items())]),
            "density": f"{facts.density:.1%}" if facts.density is not None else None,
            "weights": f"{facts.method_weights} of the method, beside the file"
            if facts.method_weights
            else None,
            "trained": f"{facts.steps} steps"
            + (f" on {facts.clips} clips" if facts.clips is not None else ""),
        }
        for name, (before, after) in facts.figures.items():
            rows[name] = f"{before:.4g} -> {after:.4g}"
    width = max(len(name) for name, value in rows.items() if value)
    for name, value in rows.items():
        if value:
            yield f"{name:<{width}}  {value}"


def _could_be(facts: LoraFacts) -> str:
    return f" ({' or '.join(facts.could_be)}, by its names)" if facts.could_be else ""


def _counted(counts: object, *, alone: bool = False) -> str:
    assert isinstance(counts, dict)
    if alone and len(counts) == 1:
        return f"{next(iter(counts))}"
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


@app.command(
    epilog=options.examples(
        "lora convert my-lora my-lora-comfyui.safetensors --to comfyui",
        "lora convert downloaded.safetensors downloaded --to diffusers",
    )
)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="LoRA file or folder.")],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="File to write; a folder for diffusers.")
    ],
    to: Annotated[str, typer.Option("--to", metavar=_LAYOUTS, help="The layout to write.")],
    family: _Family = None,
    denoiser_only: Annotated[
        bool, typer.Option("--denoiser-only", help="Leave out what is for text encoders.")
    ] = False,
    without_method_weights: Annotated[
        bool,
        typer.Option(
            "--without-method-weights",
            help="Leave out weights of a method (SLA, CLEAR, ..), for which other layouts have no "
            "place.",
        ),
    ] = False,
) -> None:
    """Write a LoRA in the layout of another program, to the same numbers."""
    from diffattn.lora.convert import convert as write

    with _refusals():
        file = write(
            source,
            target,
            to,
            family=family,
            denoiser_only=denoiser_only,
            without_method_weights=without_method_weights,
            warn=_warn,
        )
    typer.echo(f"{file}: written in the {to} layout")


_Loras = Annotated[
    list[str], typer.Argument(metavar="LORA...", help="LoRA files or folders, of any program.")
]
_Scales = Annotated[
    list[float] | None,
    typer.Option("--scale", help="Of all LoRAs, or once for each of them (default: 1)."),
]
_WithoutMethodWeights = Annotated[
    bool, typer.Option("--without-method-weights", help="Leave out weights of a method.")
]


def _scaled(loras: list[str], scales: list[float] | None) -> list[Scaled]:
    from diffattn.lora.merging import Scaled

    given = scales or [1.0]
    if len(given) not in (1, len(loras)):
        raise UserError(
            f"--scale is given {len(given)} times for {len(loras)} LoRAs: give one for all, or one"
            f" for each"
        )
    for scale in given:
        if not math.isfinite(scale) or abs(scale) > _LARGEST_SCALE:
            raise UserError(
                f"--scale is {scale}, but must be a number from -{_LARGEST_SCALE} to"
                f" {_LARGEST_SCALE}"
            )
    each = given * len(loras) if len(given) == 1 else given
    return [Scaled(Path(path).expanduser(), scale) for path, scale in zip(loras, each, strict=True)]


@app.command(
    epilog=options.examples(
        "lora merge Wan-AI/Wan2.1-T2V-1.3B-Diffusers style.safetensors -o merged --scale 0.8"
    )
)
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Pipeline folder or hub id.")],
    loras: _Loras,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the denoiser, as diffusers saves it.")
    ],
    scale: _Scales = None,
    without_method_weights: _WithoutMethodWeights = False,
) -> None:
    """Write the denoiser's weights with LoRAs merged into them."""
    from diffattn.lora.merging import merge as write

    from ..run.loading import find_model

    given = _scaled(loras, scale)
    found = find_model(base)
    if not isinstance(found, Path):
        from huggingface_hub import snapshot_download

        found = Path(snapshot_download(found, allow_patterns=["transformer*/*", "unet/*"]))
    with _refusals():
        changed = write(
            found,
            given,
            Path(output).expanduser(),
            without_method_weights=without_method_weights,
            warn=_warn,
        )
    typer.echo(f"{output}: {changed} weights merged; load it by from_pretrained of the model")


@app.command(
    epilog=options.examples("lora join mask-lora more-of-it -o both --scale 1 --scale 0.5")
)
def join(
    loras: _Loras,
    output: Annotated[str, typer.Option("--output", "-o", help="File to write, or a folder.")],
    scale: _Scales = None,
    without_method_weights: _WithoutMethodWeights = False,
) -> None:
    """Write one LoRA that does what several do together, exactly: their ranks add up."""
    from diffattn.lora.merging import join as write

    given = _scaled(loras, scale)
    with _refusals():
        write(given, Path(output).expanduser(), without_method_weights=without_method_weights)
    typer.echo(f"{output}: {len(given)} LoRAs joined")
