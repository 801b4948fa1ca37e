"""A picture of the losses of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

Point = tuple[int, float]

_WIDTH, _HEIGHT = 960, 540
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 40, 50
_EACH, _MEAN, _HELD_OUT, _INK = "#c6d4e6", "#1f4e8c", "#c0392b", "#333333"
# The smooth line has the mean over this part of the steps.
_SMOOTH = 30


def plot_losses(losses: Sequence[Point], held_out: Sequence[Point], file: Path) -> None:
    """Draw losses over steps, on a logarithmic scale if all are above 0.

    Args:
        losses: the loss of each step, in order.
        held_out: the loss on held-out clips at some steps, in order.
        file: the PNG file.
    """
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    points = [point for point in (*losses, *held_out) if math.isfinite(point[1])]
    if not points:
        draw.text((_LEFT, _TOP), "no steps yet", fill=_INK)
        picture.save(file)
        return
    logarithmic = all(loss > 0 for _, loss in points)
    heights = [math.log10(loss) if logarithmic else loss for _, loss in points]
    low, high = min(heights), max(heights)
    spread = (high - low) or 1.0
    low, high = low - 0.05 * spread, high + 0.05 * spread
    last = max(1, *(step for step, _ in points))

    def place(step: float, loss: float) -> tuple[float, float]:
        height = math.log10(loss) if logarithmic else loss
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last
        return x, _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (height - low) / (high - low)

    for part in range(5):
        height = low + (high - low) * part / 4
        y = _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * part / 4
        draw.line((_LEFT, y, _WIDTH - _RIGHT, y), fill="#eeeeee")
        value = 10**height if logarithmic else height
        draw.text((_LEFT - 8, y), f"{value:.3g}", fill=_INK, anchor="rm")
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * part / 4
        draw.text((x, _HEIGHT - _BOTTOM + 10), f"{last * part / 4:.0f}", fill=_INK, anchor="mt")
    finite = [point for point in losses if math.isfinite(point[1])]
    _line(draw, [place(*point) for point in finite], _EACH, 1)
    _line(draw, [place(*point) for point in _smooth(finite)], _MEAN, 2)
    _line(draw, [place(*point) for point in held_out if math.isfinite(point[1])], _HELD_OUT, 2)
    legend = [("each step", _EACH), ("mean", _MEAN)]
    legend += [("held-out clips", _HELD_OUT)] if held_out else []
    for number, (words, colour) in enumerate(legend):
        x = _LEFT + 160 * number
        draw.line((x, 20, x + 24, 20), fill=colour, width=3)
        draw.text((x + 32, 20), words, fill=_INK, anchor="lm")
    draw.text((_WIDTH - _RIGHT, _HEIGHT - 12), "step", fill=_INK, anchor="rb")
    picture.save(file)


def _smooth(points: Sequence[Point]) -> list[Point]:
    """The means over windows of steps, each at its last step."""
    window = max(1, len(points) // _SMOOTH)
    return [
        (points[end - 1][0], sum(loss for _, loss in points[end - window : end]) / window)
        for end in range(window, len(points) + 1)
    ]


def _line(draw: ImageDraw.ImageDraw, places: Sequence[tuple[float, float]], c: str, w: int) -> None:
    if len(places) > 1:
        draw.line(list(places), fill=c, width=w)
    for x, y in places if len(places) < _SMOOTH else ():
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=c)
