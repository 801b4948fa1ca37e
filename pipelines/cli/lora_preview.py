"""`diffattn lora preview`: a contact sheet of what a training will learn."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .lora_plan import app
from .say import say, warn

EXAMPLES = options.examples(
    "lora preview --data clips/ --model Wan-AI/Wan2.1-T2V-1.3B --num-frames 81 --fps 16",
)
_CLIPS = 24


@app.command(epilog=EXAMPLES)
def preview(
    data: Annotated[
        str,
        typer.Option(help="Folder of clips and pictures, as of `lora train`."),
    ],
    captions: Annotated[
        str | None,
        typer.Option(help="A .csv or .jsonl table of file names and captions."),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="PNG file of the contact sheet.")
    ] = "preview.png",
    model: Annotated[
        str | None,
        typer.Option(
            help="Whose sizes are taken: a folder or the id of a well-known model "
            "(default: the bundled one)."
        ),
    ] = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Frames = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second to take of a clip (default: all).")
    ] = None,
    clips: Annotated[
        int, typer.Option(help="The most clips on the sheet, the first by name.")
    ] = _CLIPS,
) -> None:
    """Draw a contact sheet: the frames that a training will learn, as cut, with their captions."""
    from diffattn._checks import number, whole
    from diffattn.lora.errors import LoraError

    from ..errors import UserError
    from ..run.machine import quiet_libraries
    from ..run.request import TEXT, check_option
    from ..train.preview import draw_preview

    size = {"height": height, "width": width, "num_frames": num_frames}
    for name, value in {**size, "clips": clips}.items():
        if value is not None:
            check_option(name, value, whole(1))
    if fps is not None:
        check_option("fps", fps, number(at_least=0.01, at_most=1000))
    for name, text in {"data": data, "captions": captions, "model": model}.items():
        if text is not None:
            check_option(name, text, TEXT)
    quiet_libraries()
    try:
        say(draw_preview(data, captions, output, model, size, fps, clips, warn))
    except LoraError as error:
        raise UserError(error) from None
