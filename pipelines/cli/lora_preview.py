"""`diffattn lora preview`: a contact sheet of what a training will learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from diffattn._checks import number, whole

from ..errors import UserError
from ..run.job import check_output_name
from ..run.machine import quiet_libraries
from ..run.model_shape import shape_of
from ..run.outputs import Outputs, check_writable, staged
from ..run.request import BUNDLED_MODEL, TEXT, check_option
from ..run.video import check_picture
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
    from diffattn.lora.errors import LoraError

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
        for line in _draw(data, captions, output, model, size, fps, clips):
            say(line)
    except LoraError as error:
        raise UserError(error) from None


def _draw(
    data: str,
    captions: str | None,
    output: str,
    model: str | None,
    given: Mapping[str, int | None],
    fps: float | None,
    most: int,
) -> Iterator[str]:
    from diffattn.lora.captions import captioned_clips
    from diffattn.lora.clips import find_clips
    from diffattn.lora.errors import LoraError
    from diffattn.lora.preview import draw_sheet, rows_of

    file = _picture(output)
    size = _size(model, given)
    folder = Path(data).expanduser()
    paths = find_clips(folder)
    table = None if captions is None else Path(captions).expanduser()
    found, left_out = captioned_clips(folder, paths, table)
    if left_out:
        warn(f"{len(left_out)} clips are not in {table}, such as {left_out[0].name}")
    rows = rows_of(found[:most], *size, fps, warn)
    if not rows:
        raise LoraError(
            f"none of the {len(found[:most])} clips can be used for {size[2]} frames {size[1]}x"
            f"{size[0]}"
        )
    sheet = draw_sheet(rows)
    with staged(Outputs(file), []) as staging:
        sheet.save(staging / file.name)
        check_picture(staging / file.name, sheet.size)
    more = f" of {len(found)}" if len(found) > len(rows) else ""
    frames = "a frame" if size[2] == 1 else f"{size[2]} frames"
    yield f"{file}: {len(rows)}{more} clips, {frames} {size[1]}x{size[0]}"


def _picture(output: str) -> Path:
    check_output_name(output)
    file = Path(output)
    if file.suffix.lower() != ".png":
        raise UserError(f"--output {output} must end in .png")
    if file.is_dir():
        raise UserError(f"cannot write {output}: it is a folder")
    check_writable(file.parent)
    return file


def _size(model: str | None, given: Mapping[str, int | None]) -> tuple[int, int, int]:
    """Height, width and frames of a sample: as given, else those of the model."""
    shape = shape_of(BUNDLED_MODEL if model is None else model)
    try:
        shape.grid(**given, text=_text(shape))
    except ValueError as error:
        raise UserError(error) from None
    height, width, frames = (value or getattr(shape, name) or 1 for name, value in given.items())
    return height, width, frames


def _text(shape: Any) -> int | None:
    """Text tokens of a sequence whose text has any length, where none are of interest."""
    return 1 if None in (shape.text_before, shape.text_after) else None
