"""Measures of other packages, which are taken where the package is installed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line
from ..run.video import write_video
from .clip import Clip, NotMeasuredError

# Packages that the extra "compare" installs.
IN_EXTRA = ("flip-evaluator",)
# Dimensions of VBench that need no prompt suite of its own (mode "custom_input").
VBENCH = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)

_MODULES = {"flip-evaluator": "flip_evaluator"}
# FLIP takes a tenth of a second a frame: of long videos so many frames are compared.
FLIP_FRAMES = 16
_LPIPS_FRAMES_AT_ONCE = 8


@functools.cache
def installed(package: str) -> bool:
    """Whether a package can be imported here."""
    return importlib.util.find_spec(_MODULES.get(package, package)) is not None


def flip(dense: Clip, other: Clip) -> float:
    """The mean FLIP error (Andersson et al. 2020), 0 to 1, of at most `FLIP_FRAMES` even frames."""
    import flip_evaluator

    count = len(dense.frames)
    some = np.unique(np.linspace(0, count - 1, min(count, FLIP_FRAMES)).round().astype(int))
    errors = []
    for index in some:
        a, b = (x.frames[index].astype(np.float32) / 255 for x in (dense, other))
        _, error, _ = flip_evaluator.evaluate(a, b, "LDR", applyMagma=False)
        errors.append(float(error))
    return float(np.mean(errors))


def lpips(dense: Clip, other: Clip) -> float:
    """The mean LPIPS distance (Zhang et al. 2018, AlexNet) of the frames."""
    import torch

    model = _lpips_model()
    values = []
    for first in range(0, len(dense.frames), _LPIPS_FRAMES_AT_ONCE):
        pair = [
            torch.from_numpy(x.frames[first : first + _LPIPS_FRAMES_AT_ONCE])
            .permute(0, 3, 1, 2)
            .float()
            / 127.5
            - 1
            for x in (dense, other)
        ]
        with torch.no_grad():
            values += model(*pair).flatten().tolist()
    return float(np.mean(values))


@functools.cache
def _lpips_model() -> Any:
    import lpips

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception as error:  # a download fails in many ways
        raise NotMeasuredError(f"LPIPS cannot load its network ({one_line(error)})") from None


def vbench(dimension: str) -> Callable[[Clip, Clip], float]:
    """The function that scores a clip in one dimension of VBench (Huang et al. 2024)."""

    def score(dense: Clip, other: Clip) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return _vbench(Path(folder), dimension, other)

    return score


def _vbench(folder: Path, dimension: str, clip: Clip) -> float:
    import torch
    import vbench

    video = folder / "clip.mp4"
    write_video(video, clip.frames, clip.fps or 16.0)
    info = Path(vbench.__file__).with_name("VBench_full_info.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            bench = vbench.VBench(device, str(info), str(folder))
            bench.evaluate(
                videos_path=str(video), name="clip", dimension_list=[dimension],
                mode="custom_input",
            )  # fmt: skip
        found = json.loads((folder / "clip_eval_results.json").read_text("utf-8"))
        return float(found[dimension][0])
    except Exception as error:  # VBench downloads networks, and fails in many ways
        raise NotMeasuredError(f"VBench cannot score {dimension} ({one_line(error)})") from None
