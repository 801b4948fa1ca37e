"""A rendered sample as measures see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class NotMeasuredError(Exception):
    """A measure cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Clip:
    """A video or a picture, with what is known of it.

    Attributes:
        frames: (count, height, width, 3), uint8; one frame for a picture.
        fps: frames a second; None for a picture.
        prompt: what it was to show.
        bundled: whether the bundled model made it, whose prompts the checker can read.
        audio: float32 (channels, samples); None without sound.
    """

    frames: np.ndarray
    fps: float | None
    prompt: str
    bundled: bool = False
    audio: np.ndarray | None = None
