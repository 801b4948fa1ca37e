"""A contact sheet of what a training will learn: frames as they are cut, with captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffattn.lora.captions import CaptionedClip
from diffattn.lora.clips import ClipError, read_shot

# Frames of each clip, evenly from the first to the last one.
FRAMES = 4
# Pixels: the longer side of a frame, the space between frames, and a line of text.
_SIDE, _GAP, _LINE = 240, 4, 18
_LETTER = 13
# The most lines of a caption.
_LINES = 4
_PAPER, _INK, _FAINT = "white", "#222222", "#777777"


@dataclass(frozen=True)
class Row:
    """A clip on a contact sheet.

    Attributes:
        frames: the shown frames, uint8 (height, width, 3).
        title: the file's name, and what is taken of it.
        caption: the caption.
    """

    frames: tuple[np.ndarray, ...]
    title: str
    caption: str


def rows_of(
    clips: Sequence[CaptionedClip],
    height: int,
    width: int,
    num_frames: int,
    fps: float | None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Read clips as a training does.

    Args:
        clips: the clips.
        height, width, num_frames, fps: as in `diffattn.lora.encoding.prepare`.
        report: takes a line for each clip that is skipped or changed.

    Returns:
        The clips that can be used, in order.
    """
    rows = []
    for clip in clips:

        def say(line: str, path: Path = clip.path) -> None:
            report(f"{path}: {line}")

        try:
            shot = read_shot(clip.path, height, width, num_frames, fps, say)
        except ClipError as error:
            report(f"skipped {clip.path}: {error}")
            continue
        rate = "" if shot.rate is None else f", {shot.rate:.4g} frames a second"
        rows_cut, columns_cut = shot.size
        title = f"{clip.path.name}: {columns_cut}x{rows_cut}{rate}, frames 1 to {num_frames}"
        rows.append(Row(_some(shot.frames), title, clip.caption))
    return rows


def draw_sheet(rows: Sequence[Row]) -> Image.Image:
    """Draw clips below each other, each with its frames, its file and its caption."""
    height, width = rows[0].frames[0].shape[:2]
    scale = _SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    columns = len(rows[0].frames)
    across = max(columns * (size[0] + _GAP) + _GAP, 2 * _SIDE)
    font = ImageFont.load_default(_LETTER)
    texts = [_wrapped(row.caption, across - 2 * _GAP, font) for row in rows]
    heights = [size[1] + 2 * _GAP + _LINE * (1 + len(text)) + _LINE // 2 for text in texts]
    sheet = Image.new("RGB", (across, sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, text, below in zip(rows, texts, heights, strict=True):
        for number, frame in enumerate(row.frames):
            # As large as pixels allow: small frames are shown in squares.
            how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
            place = (_GAP + number * (size[0] + _GAP), top + _GAP)
            sheet.paste(Image.fromarray(frame).resize(size, how), place)
        y = top + size[1] + 2 * _GAP
        draw.text((_GAP, y), row.title, fill=_FAINT, font=font)
        for line in text:
            y += _LINE
            draw.text((_GAP, y), line, fill=_INK, font=font)
        top += below
    return sheet


def _some(frames: Tensor) -> tuple[np.ndarray, ...]:
    """Frames from the first to the last of a clip (3, frames, height, width) in [-1, 1]."""
    count = frames.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int))
    pixels = ((frames[:, chosen] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    return tuple(pixels)


def _wrapped(caption: str, width: int, font: Any) -> list[str]:
    """The lines of a caption, each at most so many pixels wide; dots are for lines left out."""
    lines = [""]
    # Languages without spaces break anywhere, as words wider than a line do.
    for word in caption.split():
        parts = [word] if font.getlength(word) <= width else list(word)
        for number, part in enumerate(parts):
            longer = f"{lines[-1]}{' ' if lines[-1] and not number else ''}{part}"
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(part)
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], "..."]
