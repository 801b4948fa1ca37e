"""The measures of a comparison: what each needs, and how a sample gets its number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffattn._checks import did_you_mean

from ..errors import UserError
from ..run.compare import MS_SSIM_SIDE, ms_ssim, psnr, ssim
from . import by_ffmpeg, by_packages, vbench
from .checking import right_share, whole_right
from .clip import Clip, NotMeasuredError

# A step between frames that changes less than this shows nothing that moves, in levels of 255.
FROZEN = 0.25

# In the table until the end of the run.
LATER = "not scored yet"
# Why measures could not be had in this process, by what they come from.
_failed: dict[str, str] = {}

INSTALL = "pip install 'diffattn[compare]'"


@dataclass(frozen=True)
class Measure:
    """A number for each sample of a case.

    Attributes:
        name: as the CSV and `--measure` have it.
        title: as tables show it, with the unit.
        better: "high" or "low" values, or those "near" the dense model's.
        against_dense: whether the number compares with the dense sample; the dense model itself has
            none then.
        value: takes the dense clip and another.
        lacking: the reason why no clip like this has a number; None if it has.
        package: the package that the measure needs; None for none.
        prepare: loads what all clips need, and raises `NotMeasuredError` where it cannot be had.
        later: whether all videos of a run get their numbers together at its end; `value` is not
            called then.
        digits: after the point, in tables.
    """

    name: str
    title: str
    better: Literal["high", "low", "near"]
    against_dense: bool
    value: Callable[[Clip, Clip], float]
    lacking: Callable[[Clip], str | None] = lambda clip: None
    package: str | None = None
    digits: int = 3
    prepare: Callable[[], object] = lambda: None
    later: bool = False

    def of(self, dense: Clip, other: Clip) -> float | str:
        """The number of a clip, or the reason why there is none."""
        if self.package is not None and not by_packages.installed(self.package):
            return f"not installed: {self.package}"
        reason = self.lacking(other) or _failed.get(self._source)
        if reason is not None:
            return reason
        if self.later:
            return LATER
        try:
            return self.value(dense, other)
        except NotMeasuredError as error:
            # Trying again for each sample would take as long each time.
            return _failed.setdefault(self._source, str(error))

    @property
    def _source(self) -> str:
        """What the measure comes from, which fails for all measures that come from it."""
        return self.package or self.name


def motion(clip: Clip) -> float:
    """Mean change of brightness from frame to frame, in levels of 255."""
    return float(np.mean(_changes(clip)))


def frozen(clip: Clip) -> float:
    """Share of the steps between frames in which nothing moves."""
    return float(np.mean(_changes(clip) < FROZEN))


def _motion_to_dense(dense: Clip, other: Clip) -> float:
    """The motion of a clip as a multiple of the dense clip's."""
    own, of_dense = motion(other), motion(dense)
    if of_dense == 0:
        return 1.0 if own == 0 else math.inf
    return own / of_dense


def _audio_error(dense: Clip, other: Clip) -> float:
    """The squared error of the sound, as a share of the dense sound's energy."""
    assert dense.audio is not None
    assert other.audio is not None
    samples = min(dense.audio.shape[-1], other.audio.shape[-1])
    a, b = (x.audio[..., :samples].astype(np.float64) for x in (dense, other))  # type: ignore[index]
    energy = float((a**2).sum())
    error = float(((a - b) ** 2).sum())
    if energy == 0:
        return 0.0 if error == 0 else math.inf
    return error / energy


def _changes(clip: Clip) -> np.ndarray:
    """The mean absolute change of brightness of each step between frames."""
    # The weights of BT.601.
    bright = clip.frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.abs(np.diff(bright, axis=0)).mean((1, 2))


def _one_frame(clip: Clip) -> str | None:
    return "a picture" if len(clip.frames) < 2 else None


def _at_the_end(dense: Clip, other: Clip) -> float:
    raise AssertionError("scored with all videos together")


def _silent(clip: Clip) -> str | None:
    return "no sound" if clip.audio is None else None


MEASURES: tuple[Measure, ...] = (
    Measure("psnr", "PSNR, dB", "high", True, lambda a, b: psnr(a.frames, b.frames), digits=2),
    Measure(
        "ssim",
        "SSIM",
        "high",
        True,
        lambda a, b: ssim(a.frames, b.frames),
        lambda clip: _smaller(clip, 11, "SSIM's window"),
        digits=4,
    ),
    Measure(
        "ms_ssim",
        "MS-SSIM",
        "high",
        True,
        lambda a, b: ms_ssim(a.frames, b.frames),
        lambda clip: _smaller(clip, MS_SSIM_SIDE, "MS-SSIM"),
        digits=4,
    ),
    Measure("flip", "FLIP", "low", True, by_packages.flip, package="flip-evaluator", digits=4),
    Measure("vmaf", "VMAF", "high", True, by_ffmpeg.vmaf, by_ffmpeg.too_small, digits=2),
    Measure("xpsnr", "XPSNR, dB", "high", True, by_ffmpeg.xpsnr, by_ffmpeg.too_small, digits=2),
    Measure(
        "lpips",
        "LPIPS",
        "low",
        True,
        by_packages.lpips,
        lambda clip: _smaller(clip, by_packages.LPIPS_SIDE, "LPIPS"),
        "lpips",
        4,
        by_packages.lpips_network,
    ),
    *(
        Measure(
            f"vbench_{name}",
            f"VBench {name.replace('_', ' ')}",
            "high",
            False,
            _at_the_end,
            lambda clip: _one_frame(clip) or vbench.lacking(),
            digits=4,
            prepare=vbench.prepare,
            later=True,
        )
        for name in vbench.DIMENSIONS
    ),
    Measure(
        "motion", "motion, levels", "near", False, lambda a, b: motion(b), _one_frame, digits=2
    ),
    Measure("motion_ratio", "motion to dense", "near", True, _motion_to_dense, _one_frame),
    Measure("frozen", "frozen steps", "near", False, lambda a, b: frozen(b), _one_frame),
    Measure("right", "prompt right", "high", False, right_share.value, right_share.lacking),
    Measure("all_right", "all right", "high", False, whole_right.value, whole_right.lacking),
    Measure("audio_nmse", "sound, nMSE", "low", True, _audio_error, _silent, digits=4),
)
BY_NAME = {measure.name: measure for measure in MEASURES}


def _smaller(clip: Clip, least: int, what: str) -> str | None:
    side = min(clip.frames.shape[1:3])
    return f"too small: {what} needs {least} pixels a side" if side < least else None


def choose_measures(names: Sequence[str]) -> list[str]:
    """The names of the measures to take: those that the user names, or all.

    Raises:
        UserError: for an unknown name, a name given twice, or a measure that the user names and
            that cannot be had.
    """
    for name in names:
        if name not in BY_NAME:
            known = ", ".join(BY_NAME)
            hint = did_you_mean(name, list(BY_NAME))
            raise UserError(f"--measure {name!r} is not known{hint}; there are: {known}")
        package = BY_NAME[name].package
        if package is not None and not by_packages.installed(package):
            how = INSTALL if package in by_packages.IN_EXTRA else f"pip install {package}"
            raise UserError(f"--measure {name} needs the package {package}: {how}")
        try:
            BY_NAME[name].prepare()
        except NotMeasuredError as error:
            raise UserError(f"--measure {name}: {error}") from None
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise UserError(f"--measure {repeated[0]} is given twice")
    return [measure.name for measure in MEASURES if not names or measure.name in names]


def take(names: Iterable[str], dense: Clip, other: Clip, is_dense: bool) -> dict[str, float | str]:
    """The values of a sample by measure; "" where the dense model is compared with itself."""
    values: dict[str, float | str] = {}
    for name in names:
        measure = BY_NAME[name]
        alike = is_dense and measure.against_dense
        values[name] = "" if alike else measure.of(dense, other)
    return values
