"""The contact sheet of `lora preview`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffattn.lora.captions import captioned_clips
from diffattn.lora.clips import find_clips
from diffattn.lora.errors import LoraError
from diffattn.lora.preview import draw_sheet, rows_of

from ..errors import UserError
from ..run.job import check_output_name
from ..run.model_shape import shape_of
from ..run.outputs import Outputs, check_writable, staged
from ..run.request import BUNDLED_MODEL
from ..run.video import check_picture


def draw_preview(
    data: str,
    captions: str | None,
    output: str,
    model: str | None,
    given: Mapping[str, int | None],
    fps: float | None,
    most: int,
    warn: Callable[[str], None],
) -> str:
    """Draw the frames that a training would learn, as cut, with their captions.

    Args:
        data, captions: folder of clips, and a table of captions or None.
        output: the PNG file.
        model: whose sizes are taken where none are given; None for the bundled model.
        given: "height", "width" and "num_frames", None where the model decides.
        fps: frames a second to take of a clip; None for all.
        most: the most clips on the sheet.
        warn: takes a line about clips that are left out.

    Returns:
        A line about the sheet.

    Raises:
        LoraError: if no clip can be used.
        UserError: if the file cannot be written, or the size does not fit the model.
    """
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
    return f"{file}: {len(rows)}{more} clips, {frames} {size[1]}x{size[0]}"


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
