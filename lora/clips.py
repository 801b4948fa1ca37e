"""Clips and pictures from files: frames at a given rate, scaled and cropped to a size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from diffattn.lora.errors import LoraError

VIDEOS = (".avi", ".mkv", ".mov", ".mp4", ".webm")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_GIF = ".gif"

# At the moment when a frame ends, the next frame is shown. The tolerance, in seconds, covers
# rounding of the two times.
_INSTANT = 1e-6

# Seconds between frames if a file has no rate.
_USUAL = 1 / 25


class ClipError(ValueError):
    """A clip that cannot be used; other clips can."""


def find_clips(folder: Path) -> list[Path]:
    """The clips and pictures in a folder and in its subfolders, in the order of their names.

    Raises:
        LoraError: if there is no such folder, or the folder has no clip and no picture.
    """
    if not folder.is_dir():
        what = "a file" if folder.is_file() else "not there"
        raise LoraError(f"{folder} is {what}; the data are a folder of clips")
    known = (*VIDEOS, _GIF, *IMAGES)
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in known
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise LoraError(f"there are no clips in {folder}: none of its files ends in {_or(known)}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read_clip(
    path: Path, height: int, width: int, num_frames: int = 1, fps: float | None = None
) -> Tensor:
    """The first frames of a clip, or a picture as a clip of one frame.

    Args:
        path: the file.
        height, width: pixels. Frames are scaled to cover this size and cropped at the centre.
        num_frames: number of frames.
        fps: frames to take a second: the frames shown at multiples of 1 / fps. None takes every
            frame.

    Returns:
        float32 (3, frames, height, width) in [-1, 1].

    Raises:
        ClipError: if the file cannot be read, or is too short.
    """
    chosen: list[np.ndarray] = []
    end = 0.0
    try:
        for frame, end in _frames(path):
            while len(chosen) < num_frames and (fps is None or len(chosen) / fps < end - _INSTANT):
                chosen.append(_fit(frame, height, width))
                if fps is None:
                    break
            if len(chosen) == num_frames:
                break
    except Exception as error:  # decoders raise errors of many kinds for bad files
        raise ClipError(f"cannot read it: {_reason(error)}") from None
    if len(chosen) < num_frames:
        raise ClipError(_too_short(path, len(chosen), end, num_frames, fps))
    video = torch.from_numpy(np.stack(chosen)).permute(3, 0, 1, 2)
    return video.float() / 127.5 - 1


def _frames(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    """The frames, uint8 (height, width, 3), each with the time in seconds when the frame ends."""
    suffix = path.suffix.lower()
    if suffix in VIDEOS:
        return _video_frames(path)
    return _gif_frames(path) if suffix == _GIF else _picture(path)


def _video_frames(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    capture = _opened(path)
    try:
        if not capture.isOpened():
            raise ValueError("it is not a video that OpenCV can decode")
        rate = capture.get(cv2.CAP_PROP_FPS)
        lasts = 1 / rate if rate > 0 else _USUAL
        frame, start = None, 0.0
        while True:
            found, following = capture.read()
            # Times are read from the file: phones and screen recorders take frames unevenly.
            now = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 if found else start + lasts
            if frame is not None:
                # Some files have no times.
                now = now if now > start else start + lasts
                lasts = now - start
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), now
            if not found:
                return
            frame, start = following, now
    finally:
        capture.release()


def _opened(path: Path) -> cv2.VideoCapture:
    """The file as opened by OpenCV, whose messages about bad files on stderr are switched off."""
    # ffmpeg inside OpenCV reads this variable when the first file is opened.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    finally:
        cv2.utils.logging.setLogLevel(level)


def _gif_frames(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    from PIL import Image, ImageSequence

    end = 0
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            # Players show a frame for a tenth of a second if its delay is missing or 0.
            end += frame.info.get("duration") or 100
            yield np.asarray(frame.convert("RGB")), end / 1000


def _picture(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        # Cameras store their orientation instead of turning the picture.
        yield np.asarray(ImageOps.exif_transpose(image).convert("RGB")), _INSTANT * 2


def _fit(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale a frame to cover the size, and crop the frame at its centre."""
    rows, columns = frame.shape[:2]
    scale = max(height / rows, width / columns)
    rows, columns = max(height, round(rows * scale)), max(width, round(columns * scale))
    # INTER_AREA averages when shrinking only.
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = cv2.resize(frame, (columns, rows), interpolation=how)
    top, left = (rows - height) // 2, (columns - width) // 2
    return scaled[top : top + height, left : left + width]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _too_short(path: Path, found: int, end: float, wanted: int, fps: float | None) -> str:
    if path.suffix.lower() in IMAGES:
        return f"it is a picture, but {wanted} frames are wanted"
    if fps is None:
        return f"it has {found} frames, but {wanted} are wanted"
    return (
        f"it is over after {end:.2f} s, but the last of {wanted} frames at {fps:g} a second is"
        f" shown at {(wanted - 1) / fps:.2f} s"
    )


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
