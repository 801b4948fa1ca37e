"""VMAF and XPSNR, by ffmpeg's own filters."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import numpy as np

from diffattn.lora.ffmpeg import FfmpegError, run

from .clip import Clip, NotMeasuredError

# The models of VMAF were fitted to videos on screens. Below this size they call everything good.
LEAST_SIDE = 240

_USUAL_FPS = 16.0
_PLANE = re.compile(r"\b([yuv]):\s*([\d.]+|inf|nan)", re.IGNORECASE)


def too_small(clip: Clip) -> str | None:
    """Why a clip is too small for these measures; None if it is not."""
    if min(clip.frames.shape[1:3]) < LEAST_SIDE:
        return f"too small: needs {LEAST_SIDE} pixels a side"
    return None


def vmaf(dense: Clip, other: Clip) -> float:
    """The mean VMAF of the frames, 0 to 100 (ffmpeg's libvmaf and its built-in model)."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "vmaf.json"
        _filter(Path(folder), dense, other, f"libvmaf=log_fmt=json:log_path={log.name}")
        found = json.loads(log.read_text("utf-8"))
    return float(found["pooled_metrics"]["vmaf"]["mean"])


def xpsnr(dense: Clip, other: Clip) -> float:
    """XPSNR in dB (ffmpeg's xpsnr), weighted over the planes as for 4:2:0: (6 Y + U + V) / 8."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "xpsnr.log"
        _filter(Path(folder), dense, other, f"xpsnr=stats_file={log.name}")
        lines = log.read_text("utf-8").splitlines()
    # Each frame has a line; averages stand at the end, as the filter computes them.
    for line in reversed(lines):
        planes = {name.lower(): float(value) for name, value in _PLANE.findall(line)}
        if "average" in line.lower() and len(planes) == 3:
            return (6 * planes["y"] + planes["u"] + planes["v"]) / 8
    raise NotMeasuredError("ffmpeg's xpsnr gave no average")


def _filter(folder: Path, dense: Clip, other: Clip, words: str) -> None:
    """Run a filter of two inputs; its log is written to the folder."""
    inputs: list[str] = []
    for name, clip in (("other", other), ("dense", dense)):
        height, width = clip.frames.shape[1:3]
        raw = folder / f"{name}.rgb"
        raw.write_bytes(np.ascontiguousarray(clip.frames).tobytes())
        rate = f"{clip.fps or _USUAL_FPS:.10g}"
        inputs += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate]
        inputs += ["-i", f"file:{raw}"]
    log = words.rpartition("=")[2]
    words = words.replace(log, str(folder / log).replace(":", r"\\:"))
    graph = f"[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]{words}"
    try:
        run([*inputs, "-lavfi", graph, "-f", "null", "-"])
    except FfmpegError as error:
        name = words.partition("=")[0]
        raise NotMeasuredError(f"ffmpeg cannot compute {name} ({error})") from None
