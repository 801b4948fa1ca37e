"""Clips and pictures from files: frames at a given rate, scaled and cropped to a size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from diffattn.lora.errors import LoraError
from diffattn.lora.frames import ANIMATIONS, IMAGES, VIDEOS, Frame, at_rate, read_frames

# How the names of clips and pictures end.
SUFFIXES = tuple(dict.fromkeys((*VIDEOS, *ANIMATIONS, *IMAGES)))

_TABLES = (".csv", ".json", ".jsonl")


class ClipError(ValueError):
    """A clip that cannot be used; other clips can."""


@dataclass(frozen=True)
class Shot:
    """The frames of a clip at the size of a training, and where they are from.

    Attributes:
        frames: float32 (3, frames, height, width) in [-1, 1].
        rate: how many of the frames are shown a second; None for one frame.
        size: rows and columns of the last frame in its file.
        crop: rows above and columns left of that frame, cut off after it was scaled.
    """

    frames: Tensor
    rate: float | None
    size: tuple[int, int]
    crop: tuple[int, int]


def find_clips(folder: Path) -> list[Path]:
    """The clips and pictures in a folder and in its subfolders, in the order of their names.

    Raises:
        LoraError: if there is no such folder, or the folder has no clip and no picture.
    """
    if not folder.is_dir():
        what = "a file" if folder.is_file() else "not there"
        raise LoraError(f"{folder} is {what}; the data are a folder of clips")
    found = [path for path in _files_in(folder) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise LoraError(
            f"there are no clips in {folder}: none of its files ends in {_or(SUFFIXES)}"
        )
    return found


def find_others(folder: Path, clips: Sequence[Path]) -> list[Path]:
    """The files in a folder of clips that are neither clips nor captions, in the order of names.

    A text without a clip is among them, since its clip may have a name of another kind. Tables are
    not.
    """
    captions = {clip.with_suffix(".txt") for clip in clips}
    known = (*SUFFIXES, *_TABLES)
    return [
        path
        for path in _files_in(folder)
        if path.suffix.lower() not in known and path not in captions
    ]


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder and in its subfolders that are not hidden, in the order of names."""
    found = [
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read_clip(
    path: Path,
    height: int,
    width: int,
    num_frames: int = 1,
    fps: float | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """The frames of `read_shot`."""
    return read_shot(path, height, width, num_frames, fps, note).frames


def read_shot(
    path: Path,
    height: int,
    width: int,
    num_frames: int = 1,
    fps: float | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Shot:
    """The first frames of a clip, or a picture as a clip of one frame.

    Args:
        path: the file.
        height, width: pixels. Frames are scaled to cover this size and cropped at the centre.
        num_frames: number of frames.
        fps: frames to take a second: the frames shown at multiples of 1 / fps. None takes every
            frame.
        note: takes a line about what the reader has changed, such as transparent areas.

    Returns:
        The frames, and where they are from.

    Raises:
        ClipError: if the file cannot be read, or is too short.
    """
    chosen: list[np.ndarray] = []
    size = crop = (0, 0)
    first = last = end = 0.0

    def all_frames() -> Iterator[Frame]:
        nonlocal end
        for frame in read_frames(path, note):
            end = frame.end
            yield frame

    try:
        frames = all_frames()
        for frame in frames if fps is None else at_rate(frames, fps):
            first, last = (first if chosen else frame.start), frame.start
            pixels, crop = _fit(frame.pixels, height, width)
            chosen.append(pixels)
            size = frame.pixels.shape[0], frame.pixels.shape[1]
            if len(chosen) == num_frames:
                break
    except Exception as error:  # decoders raise errors of many kinds for bad files
        raise ClipError(f"cannot read it: {_reason(error)}") from None
    if len(chosen) < num_frames:
        raise ClipError(_too_short(path, len(chosen), end, num_frames, fps))
    video = torch.from_numpy(np.stack(chosen)).permute(3, 0, 1, 2)
    rate = None if num_frames == 1 else fps or (num_frames - 1) / (last - first)
    return Shot(video.float() / 127.5 - 1, rate, size, crop)


def _fit(frame: np.ndarray, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Scale a frame to cover the size, and crop the frame at its centre; see `Shot.crop`."""
    rows, columns = frame.shape[:2]
    scale = max(height / rows, width / columns)
    rows, columns = max(height, round(rows * scale)), max(width, round(columns * scale))
    # INTER_AREA averages when shrinking only.
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = cv2.resize(frame, (columns, rows), interpolation=how)
    top, left = (rows - height) // 2, (columns - width) // 2
    return scaled[top : top + height, left : left + width], (top, left)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _too_short(path: Path, found: int, end: float, wanted: int, fps: float | None) -> str:
    if path.suffix.lower() in IMAGES and end < 1e-3:
        return f"it is a picture, but {wanted} frames are wanted"
    if fps is None:
        return f"it has {found} frames, but {wanted} are wanted"
    return (
        f"it is over after {end:.2f} s, but the last of {wanted} frames at {fps:g} a second is"
        f" shown at {(wanted - 1) / fps:.2f} s"
    )


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
