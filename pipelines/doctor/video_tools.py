"""ffmpeg: whether it is there, and has what outputs and training clips need."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffattn.lora.ffmpeg import FfmpegError, executable, run

from ..errors import UserError
from ..run.video import write_video
from .findings import Check, Finding

_WAYS = "pip install imageio-ffmpeg, or point IMAGEIO_FFMPEG_EXE at an ffmpeg"
# Decoders of videos that people have; any of the names serves.
_DECODERS = {
    "H.264": ("h264",),
    "HEVC": ("hevc",),
    "VP9": ("vp9", "libvpx-vp9"),
    "AV1": ("libdav1d", "av1", "libaom-av1"),
    "MPEG-4": ("mpeg4",),
    "ProRes": ("prores",),
}
# Filters that measure quality.
_MEASURES = {"VMAF": "libvmaf", "XPSNR": "xpsnr"}


def check_program() -> Iterator[Finding]:
    """The program, by its version."""
    try:
        program = executable()
        version = run(["-version"]).splitlines()[0].partition(" Copyright")[0]
    except FfmpegError as error:
        yield Finding("problem", "ffmpeg", str(error), f"{_WAYS}; .gif and .png need no ffmpeg")
        return
    yield Finding("ok", "ffmpeg", f"{version} ({program})")
    yield from _listed("decoders", _DECODERS, "clips in it cannot be read for training")
    yield from _listed(
        "filters", {n: (name,) for n, name in _MEASURES.items()}, "it cannot be measured"
    )


def check_outputs() -> Iterator[Finding]:
    """A small video and a small GIF, written and read back."""
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    frames[1] = 128
    for suffix in (".mp4", ".gif"):
        with tempfile.TemporaryDirectory(prefix="diffattn-doctor-") as folder:
            try:
                write_video(Path(folder) / f"try{suffix}", frames, 8)
            except (UserError, FfmpegError) as error:
                yield Finding("problem", suffix, str(error), _WAYS)
                continue
        yield Finding("ok", suffix, "written and read back")


def _listed(what: str, wanted: dict[str, tuple[str, ...]], without: str) -> Iterator[Finding]:
    """Which of the wanted parts ffmpeg lists."""
    try:
        lines = run([f"-{what}"]).splitlines()
    except FfmpegError as error:
        yield Finding("warning", what, f"ffmpeg does not list them: {error}", _WAYS)
        return
    # Each line has flags, a name and a description.
    names = {line.split()[1] for line in lines if len(line.split()) > 1}
    found = [label for label, any_of in wanted.items() if names & set(any_of)]
    missing = [label for label in wanted if label not in found]
    if found:
        yield Finding("ok", what, ", ".join(found))
    if missing:
        yield Finding(
            "warning", what, f"no {', '.join(missing)}: {without}", "take a full build of ffmpeg"
        )


CHECKS: tuple[Check, ...] = (check_program, check_outputs)
