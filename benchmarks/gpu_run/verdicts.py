"""The requirements on a GPU, judged from the rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpu_run.journal import Row, latest

PASS, FAIL, INCOMPLETE, NOT_MEASURED = "PASS", "FAIL", "INCOMPLETE", "not measured"

FORWARD, BACKWARD = "forward", "backward"
ALIGNED, EXACT, OURS, FLEX = "block-aligned", "token-exact", "diffattn", "flex"
# The shapes that a whole run measures, by head_dim.
RATED = {128: ("wan-1.3b-480p", "wan-14b-720p", "hunyuan-720p"), 64: ("cogvideox-5b",)}
SPARSE = 3  # densities below 1
STATIC_METHODS = 6
LONG = 16_384  # tokens
QUARTER = 0.27  # a density of about a quarter: blocks do not divide every grid
WAN_720P = 75_600  # tokens
# Methods that select: VMoBA once for each kind of its blocks, SVG2 in a later step too.
SELECTING = 17
# Of these, at three sizes, those whose density is a quarter or less for any data.
QUARTERS = 3 * 7

Place = tuple[str, str, str, float]  # shape, direction, mask, density asked for


@dataclass(frozen=True)
class Verdict:
    """A requirement, what was measured, and whether it is met.

    Attributes:
        worst: the figure of the worst case; None without cases.
        where: the worst case.
        measured, planned: number of cases.
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


def rates(rows: list[Row], stage: str = "rates:") -> dict[tuple[Place, str], Row]:
    """The latest times, by place and candidate."""
    found = [
        row for row in rows
        if row["kind"] == "rate" and row["stage"].startswith(stage) and "ms" in row
    ]  # fmt: skip
    newest = latest(found, "shape", "direction", "mask", "asked", "candidate")
    return {
        ((row["shape"], row["direction"], row["mask"], row["asked"]), row["candidate"]): row
        for row in newest
    }


def verdicts(rows: list[Row]) -> list[Verdict]:
    """All requirements, judged."""
    times = rates(rows)
    own = {place: row for (place, candidate), row in times.items() if candidate == OURS}
    every_shape = sum(map(len, RATED.values()))

    def of_cudnn(directions: tuple[str, ...], head_dim: int, at_least: float) -> Verdict:
        found = [
            (name(place), row["of_cudnn"])
            for place, row in own.items()
            if place[1] in directions and place[2] == ALIGNED and place[3] < 1
            and row["head_dim"] == head_dim and "of_cudnn" in row
        ]  # fmt: skip
        return verdict(
            f"{' and '.join(directions)}, head_dim {head_dim}, densities 0.1-0.5: at least"
            f" {at_least} of cuDNN's rate",
            found, planned=len(directions) * len(RATED[head_dim]) * SPARSE, at_least=at_least,
        )  # fmt: skip

    def beside(other: Callable[[Place], Place], mask: str) -> list[tuple[str, float]]:
        """Time per visited block over the time per visited block at another place."""
        found = []
        for place, row in own.items():
            reference = own.get(other(place))
            if place[2] == mask and place[3] < 1 and reference is not None:
                per_block = [one["ms"] / one["density"] for one in (row, reference)]
                found.append((name(place), per_block[0] / per_block[1]))
        return found

    flex = rates(rows, "flex:")
    to_flex = [
        (name(place), row["ms"] / flex[place, FLEX]["ms"])
        for (place, candidate), row in flex.items()
        if candidate == OURS and (place, FLEX) in flex
    ]
    building = latest((r for r in rows if r["kind"] == "building" and "ms" in r), "shape", "method")
    selecting = latest(
        (r for r in rows if r["kind"] == "selecting" and "speed_up" in r),
        "tokens", "method", "partition",
    )  # fmt: skip
    quarter = [
        (f"{r['method']} {r['partition']} {r['tokens']}", r["speed_up"])
        for r in selecting
        if r["tokens"] >= LONG and r["density"] <= QUARTER
    ]
    return [
        of_cudnn((FORWARD,), 128, 0.85),
        of_cudnn((BACKWARD,), 128, 0.75),
        of_cudnn((FORWARD, BACKWARD), 64, 0.75),
        verdict(
            "time per visited block over that at density 1: at most 1.10",
            beside(lambda place: (*place[:2], ALIGNED, 1.0), ALIGNED),
            planned=2 * every_shape * SPARSE, at_most=1.10,
        ),
        verdict(
            "token-exact over block-aligned, per visited block: at most 1.5",
            beside(lambda place: (*place[:2], ALIGNED, place[3]), EXACT),
            planned=2 * every_shape * SPARSE, at_most=1.5,
        ),
        verdict(
            "time over compiled FlexAttention's under the same mask: below 1", to_flex,
            planned=6, at_most=1 - 1e-9,
        ),
        errors(rows),
        verdict(
            "HunyuanVideo's masks built on the device: under 100 ms",
            [(r["method"], r["ms"]) for r in building if r["shape"] == "hunyuan-720p"],
            planned=STATIC_METHODS, at_most=100 - 1e-9,
        ),
        verdict(
            "selecting methods at a density of a quarter from 16K tokens: faster than dense",
            quarter, planned=QUARTERS, at_least=1 + 1e-9,
        ),
        verdict(
            "selection at 75,600 tokens: under 5 % of the method's time",
            [
                (f"{r['method']} {r['partition']}", r["around_share"])
                for r in selecting
                if r["tokens"] == WAN_720P
            ],
            planned=SELECTING, at_most=0.05 - 1e-9,
        ),
        outcomes_of_tests(rows),
    ]  # fmt: skip


def errors(rows: list[Row]) -> Verdict:
    """The largest error over the error that eager attention of the dtype allows.

    A kernel that raises, or gives other bits the second time, counts as an infinite error.
    """
    found = []
    cases = latest((r for r in rows if r["kind"] == "smoke"), "stage", "case")
    for row in cases:
        if not row["taken"]:
            continue
        ratios = [x["of_allowed"] for x in row.get("deviations", {}).values()]
        largest = max(ratios, key=lambda x: (x != x, x), default=float("inf"))
        if not row["right"] and largest <= 1:
            largest = float("inf")  # other bits the second time
        found.append((f"{row['what']} {row['case']}", largest))
    for (place, candidate), row in {**rates(rows), **rates(rows, "flex:")}.items():
        if candidate == OURS:
            found.append((name(place), row["of_allowed"]))
    ended = [r for r in rows if r["kind"] == "stage" and r["stage"].startswith("smoke:")]
    ended = latest((r for r in ended if r["rc"] != "settled before"), "stage")
    # A stage that was killed has a case that never ended.
    found += [(r["stage"], float("inf")) for r in ended if r["rc"] not in (0, "no time")]
    missing = sum(r["rc"] == "no time" for r in ended)
    return verdict(
        "largest error over what eager attention's own allows: at most 1", found,
        planned=len(found) + missing, at_most=1,
    )  # fmt: skip


def outcomes_of_tests(rows: list[Row]) -> Verdict:
    """How many tests failed on the GPU."""
    outcomes = latest((r for r in rows if r["kind"] == "test"), "test")
    failed = [r for r in outcomes if r["outcome"] not in ("passed", "skipped")]
    ran = [r for r in outcomes if r["outcome"] != "skipped"]
    what = f"tests on the GPU: none fails ({len(ran)} ran)"
    if not ran:
        return Verdict(what, NOT_MEASURED, None, "", 0, 1)
    ended = latest(
        (r for r in rows if r["kind"] == "stage" and r["stage"].startswith("tests:")), "stage"
    )
    complete = bool(ended) and all(r["rc"] in (0, "settled before") for r in ended)
    where = failed[0]["test"] if failed else "-"
    status = FAIL if failed else PASS if complete else INCOMPLETE
    return Verdict(what, status, float(len(failed)), where, len(ran), len(outcomes))


def name(place: Place) -> str:
    return f"{place[0]} {place[1]} {place[2]} {place[3]:g}"
