"""Figures that papers report for their methods, beside those that a study has measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .sample_table import Row


@dataclass(frozen=True)
class Figure:
    """A figure of a paper.

    Attributes:
        method: the method, with its paper.
        setting: model, length and schedule.
        headline: what the paper reports.
        case: the beginning of the names of the cases of a study that are nearest to it.
    """

    method: str
    setting: str
    headline: str
    case: str


FIGURES = (
    Figure("Radial, arXiv 2506.19852", "HunyuanVideo, 117 frames, no training",
           "27.3 dB, SSIM .886, LPIPS .114; 1.88x faster", "radial, as published"),
    Figure("Radial", "Wan 2.1 14B, 69 frames, no training",
           "23.9 dB, SSIM .842, LPIPS .163; 1.77x", "radial, as published"),
    Figure("Radial", "dense first steps: 0, 4, 8, 12 of 50",
           "12.8, 18.5, 21.7, 23.6 dB", "radial at 0.25"),
    Figure("Radial", "HunyuanVideo, 4 times its length, with LoRA",
           "VisionReward .134, dense .133; 3.71x", "radial + LoRA"),
    Figure("VMoBA, arXiv 2506.23858", "Wan 2.1 1.3B, no training",
           "16.0 dB at 1.01x, 18.8 dB at 1.35x", "vmoba at"),
    Figure("VMoBA", "trained, 55 k tokens", "VBench 68.34, dense 68.25; 1.48x", "vmoba + LoRA"),
    Figure("GNA, arXiv 2504.16922", "HunyuanVideo, B200, window 30x40x40",
           "VBench 83.40, dense 83.08; 1.53x", "gna at 0.5"),
    Figure("GNA", "HunyuanVideo, B200, window 18x24x24", "VBench 82.04; 2.27x", "gna at 0.125"),
    Figure("SVG-EAR, arXiv 2603.08982", "Wan 2.2, H100", "29.8 and 26 dB; 1.77x to 1.81x",
           "svg2"),
    Figure("SVG-EAR", "HunyuanVideo, H100", "31 and 30 dB; 1.93x", "svg2"),
    Figure("Agent Attention, arXiv 2312.08874", "Stable Diffusion 1.5, ratio .2 and .5",
           "FID 27.77 and 28.42, dense 28.84; 1.45x and 1.84x", "agent"),
)  # fmt: skip


def papers_beside(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows of a table: each figure, and the PSNR and time of the study's nearest cases."""
    return [
        {
            "method": figure.method,
            "setting": figure.setting,
            "the paper": figure.headline,
            "here": _measured(figure.case, rows),
        }
        for figure in FIGURES
    ]


def _measured(case: str, rows: Sequence[Row]) -> str:
    dense = median([row.seconds for row in rows if row.case == "dense"] or [0.0])
    # What is combined with the method stands in names after a plus.
    plain = "+" not in case
    names = dict.fromkeys(
        row.case for row in rows if row.case.startswith(case) and not (plain and " + " in row.case)
    )
    parts = []
    for name in names:
        own = [row for row in rows if row.case == name]
        ratio = _mean([value for row in own if (value := row.number("psnr")) is not None])
        seconds = median(row.seconds for row in own)
        closeness = "" if ratio is None else f" {ratio:.1f} dB,"
        speed = f" {dense / seconds:.2f}x" if dense and seconds else ""
        parts.append(f"{name}:{closeness}{speed}")
    return "; ".join(parts) if parts else "not measured yet"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
