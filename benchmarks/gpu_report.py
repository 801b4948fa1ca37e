"""What benchmarks/gpu.py writes: the rows, the verdicts on what must be reached, the tables."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpu_candidates import DENSE, OURS
from gpu_layouts import ALIGNED, EXACT
from gpu_shapes import BACKWARD, DENSITIES, FORWARD
from gpu_timing import median_ratio

PASS, FAIL, INCOMPLETE, NOT_MEASURED = "PASS", "FAIL", "INCOMPLETE", "not measured"


@dataclass(frozen=True)
class Row:
    """One candidate under one mask.

    Attributes:
        shape, direction, candidate: which.
        head_dim, tokens: of the shape.
        kind, asked: of the mask; "dense" and 1 without one.
        density: fraction of blocks visited.
        attended: fraction of token pairs that attend.
        ms, low, high: median of the rounds, 10th and 90th percentile.
        tflops: effective, in 10^12 floating-point operations a second for the attended pairs.
        of_cudnn, of_best: `tflops` over those of dense attention by cuDNN, and by the faster of
            torch's dense backends, round by round; None where those were not measured.
        first_call_s: the first call, compilation included.
        error: relative, against float64, the largest of the checked results.
        rounds: all times in ms.
        note: warnings of the first call.
    """

    shape: str
    direction: str
    candidate: str
    head_dim: int
    tokens: int
    kind: str
    asked: float
    density: float
    attended: float
    ms: float
    low: float
    high: float
    tflops: float
    of_cudnn: float | None
    of_best: float | None
    first_call_s: float
    error: float | None
    rounds: list[float] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class MaskRow:
    """What making a mask takes: seconds, bytes of the layout, and peak bytes on the way."""

    shape: str
    kind: str
    asked: float
    density: float
    attended: float
    window: tuple[int, int, int] | None
    full_blocks: int
    partial_blocks: int
    bit_masks: int
    build_ms: float
    nbytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class CallRow:
    """What is around the kernel: the host's work, and putting tokens into tile order and back.

    Attributes:
        public_us, raw_us: host time of a call of the public function and of the raw operator.
        public_ms, raw_ms: device time of the same.
        permute_ms: index_select of q, k, v and of the output.
        of_sparse: `permute_ms` over the time of this package's forward at a density of `asked`.
    """

    shape: str
    asked: float
    public_us: float
    raw_us: float
    public_ms: float
    raw_ms: float
    permute_ms: float
    of_sparse: float


@dataclass(frozen=True)
class LeftOut:
    """Something that was to be measured and was not."""

    what: str
    why: str


@dataclass
class Results:
    """Everything so far; written again after every group."""

    info: dict[str, object]
    rows: list[Row] = field(default_factory=list)
    masks: list[MaskRow] = field(default_factory=list)
    calls: list[CallRow] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    planned: list[tuple[str, str, int]] = field(default_factory=list)  # shape, direction, head_dim
    densities: tuple[float, ...] = DENSITIES


@dataclass(frozen=True)
class Verdict:
    """A requirement, what was measured, and whether it is met.

    Attributes:
        measured, planned: number of cases.
        worst: the figure of the worst case; None without cases.
        where: that case.
    """

    what: str
    status: str
    worst: float | None
    where: str
    measured: int
    planned: int

    def __str__(self) -> str:
        if self.worst is None:
            return f"{self.status}: {self.what}"
        return (
            f"{self.status}: {self.what}; worst {self.worst:.3f} ({self.where}),"
            f" {self.measured} of {self.planned} cases"
        )


def verdict(
    what: str,
    cases: Iterable[tuple[str, float]],
    *,
    planned: int,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Verdict:
    """Judge a requirement by its worst case; NaN is worse than anything."""
    measured = list(cases)
    if not measured:
        return Verdict(what, NOT_MEASURED, None, "", 0, planned)
    sign = 1 if at_least is None else -1
    where, worst = max(measured, key=lambda case: (case[1] != case[1], sign * case[1]))
    met = worst >= at_least if at_least is not None else at_most is not None and worst <= at_most
    complete = PASS if len(measured) >= planned else INCOMPLETE
    return Verdict(what, complete if met else FAIL, worst, where, len(measured), planned)


def verdicts(results: Results) -> list[Verdict]:
    """The issue's list of what must be reached, from the rows."""
    rows = {(r.shape, r.direction, r.candidate, r.kind, r.asked): r for r in results.rows}
    sparse = [density for density in results.densities if density < 1]
    large_heads = [(s, d) for s, d, head_dim in results.planned if head_dim == 128]
    everywhere = [(s, d) for s, d, _ in results.planned]
    every_mask = [(ALIGNED, d) for d in results.densities] + [(EXACT, d) for d in sparse]

    def of_cudnn(direction: str, at_least: float, aim: float) -> Verdict:
        places = [
            (s, d, OURS, ALIGNED, x) for s, d in large_heads if d == direction for x in sparse
        ]
        found = [(name(p), r.of_cudnn) for p in places if (r := rows.get(p)) and r.of_cudnn]
        return verdict(
            f"{direction}, head_dim 128, block-aligned, density 0.1-0.5: at least {at_least:.0%} of"
            f" dense cuDNN's TFLOP/s (aim {aim:.0%})",
            found, planned=len(places), at_least=at_least,
        )  # fmt: skip

    def compared(
        what: str,
        pairs: list[tuple[Place, Place]],
        ratio: Callable[[Row, Row], float],
        at_most: float,
    ) -> Verdict:
        found = [(name(a), ratio(rows[a], rows[b])) for a, b in pairs if a in rows and b in rows]
        return verdict(what, found, planned=len(pairs), at_most=at_most)

    to_dense = [
        ((s, d, OURS, ALIGNED, x), (s, d, OURS, ALIGNED, 1.0))
        for s, d in everywhere
        for x in sparse
    ]
    to_flex = [
        ((s, d, OURS, k, x), (s, d, "flex", k, x)) for s, d in everywhere for k, x in every_mask
    ]
    to_aligned = [
        ((s, d, OURS, EXACT, x), (s, d, OURS, ALIGNED, x)) for s, d in everywhere for x in sparse
    ]
    return [
        of_cudnn(FORWARD, 0.75, 0.90),
        of_cudnn(BACKWARD, 0.60, 0.80),
        compared(
            "time per visited block at density 0.5-0.1 over that at 1.0: at most 1.10",
            to_dense, lambda a, b: a.ms / a.density / (b.ms / b.density), 1.10,
        ),
        compared(
            "time over compiled FlexAttention's with the same mask: below 1 everywhere",
            to_flex, lambda a, b: a.ms / b.ms, 1 - 1e-9,
        ),
        compared(
            "token-exact over block-aligned at equal density, per visited block: at most 1.5",
            to_aligned, lambda a, b: a.ms / a.density / (b.ms / b.density), 1.5,
        ),
    ]  # fmt: skip


Place = tuple[str, str, str, str, float]


def name(place: Place) -> str:
    shape, direction, _, kind, asked = place
    return f"{shape} {direction} {kind} {asked:g}"


def number(x: float | None, form: str = ".3g") -> str:
    return "-" if x is None else format(x, form)


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def times_table(rows: list[Row]) -> str:
    header = [
        "shape", "direction", "mask", "density", "attended", "candidate", "ms", "10-90 %",
        "TFLOP/s", "of cuDNN", "of best dense", "error",
    ]  # fmt: skip
    return table(
        header,
        (
            [
                r.shape, r.direction, r.kind, f"{r.density:.3f}", f"{r.attended:.3f}", r.candidate,
                f"{r.ms:.3f}", f"{r.low:.3f}-{r.high:.3f}", f"{r.tflops:.0f}",
                number(r.of_cudnn, ".0%"), number(r.of_best, ".0%"), number(r.error, ".1e"),
            ]
            for r in rows
        ),
    )  # fmt: skip


def summary_table(rows: list[Row]) -> str:
    """This package's times, and how many times longer the others take under the same mask."""
    places = {(r.shape, r.direction, r.candidate, r.kind, r.asked): r for r in rows}
    others = sorted({r.candidate for r in rows if r.kind != "dense"} - {OURS})
    header = [
        "shape", "direction", "mask", "density", "ms", "TFLOP/s", "of cuDNN", "of best dense",
        *(f"{other} / {OURS}" for other in others),
    ]  # fmt: skip
    lines = []
    for r in rows:
        if r.candidate != OURS:
            continue
        same = [places.get((r.shape, r.direction, other, r.kind, r.asked)) for other in others]
        lines.append(
            [
                r.shape, r.direction, r.kind, f"{r.density:.3f}", f"{r.ms:.3f}",
                f"{r.tflops:.0f}", number(r.of_cudnn, ".0%"), number(r.of_best, ".0%"),
                *("-" if s is None else f"{median_ratio(s.rounds, r.rounds):.2f}" for s in same),
            ]
        )  # fmt: skip
    return table(header, lines)


def masks_table(masks: list[MaskRow]) -> str:
    header = [
        "shape", "mask", "asked", "visited", "attended", "window", "full", "partial",
        "bit masks", "build ms", "MiB", "peak MiB",
    ]  # fmt: skip
    return table(
        header,
        (
            [
                m.shape, m.kind, f"{m.asked:g}", f"{m.density:.3f}", f"{m.attended:.3f}",
                "x".join(map(str, m.window)) if m.window else "-", str(m.full_blocks),
                str(m.partial_blocks), str(m.bit_masks), f"{m.build_ms:.0f}",
                f"{m.nbytes / 2**20:.1f}", number(m.peak_bytes and m.peak_bytes / 2**20, ".0f"),
            ]
            for m in masks
        ),
    )  # fmt: skip


def calls_table(calls: list[CallRow]) -> str:
    header = [
        "shape", "density", "public host us", "raw host us", "public ms", "raw ms", "permute ms",
        "permute / sparse",
    ]  # fmt: skip
    return table(
        header,
        (
            [
                c.shape, f"{c.asked:g}", f"{c.public_us:.0f}", f"{c.raw_us:.0f}",
                f"{c.public_ms:.3f}", f"{c.raw_ms:.3f}", f"{c.permute_ms:.3f}",
                f"{c.of_sparse:.0%}",
            ]
            for c in calls
        ),
    )  # fmt: skip


def markdown(title: str, about: str, results: Results) -> str:
    facts = "\n".join(f"- {key}: {value}" for key, value in results.info.items())
    must = "\n".join(f"- {v}" for v in verdicts(results))
    reasons: dict[str, list[str]] = {}
    for x in results.left_out:
        reasons.setdefault(x.why, []).append(x.what)
    left = "\n".join(f"- {', '.join(what)}: {why}" for why, what in reasons.items()) or "Nothing."
    return "\n\n".join(
        [
            f"# {title}", "Written by benchmarks/gpu.py.", facts, about.strip(),
            "## What must be reached", must, "## Summary",
            summary_table(results.rows), "## Times", times_table(results.rows),
            "## Masks", masks_table(results.masks), "## Around the kernel",
            calls_table(results.calls), "## Left out", left,
        ]
    ) + "\n"  # fmt: skip


def write(folder: Path, stem: str, title: str, about: str, results: Results) -> None:
    """Write both files whole or not at all: an interrupted run leaves the ones before."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **results.info,
        "verdicts": [asdict(v) for v in verdicts(results)],
        "rows": [asdict(r) for r in results.rows],
        "masks": [asdict(m) for m in results.masks],
        "calls": [asdict(c) for c in results.calls],
        "left_out": [asdict(x) for x in results.left_out],
    }
    replace_file(folder / f"{stem}.json", json.dumps(record, indent=1) + "\n")
    replace_file(folder / f"{stem}.md", markdown(title, about, results))


def replace_file(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def best_dense(times: dict[str, list[float]]) -> str | None:
    """Which of torch's dense backends has the lowest time, if any was measured."""
    measured = [name for name in DENSE if times.get(name)]
    return min(measured, key=lambda name: sorted(times[name])[len(times[name]) // 2], default=None)
