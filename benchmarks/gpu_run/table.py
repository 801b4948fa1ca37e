"""The tuned table made from the rows of a run, as diffattn.kernels.common.tuned reads it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

from gpu_run.journal import Row, latest

# A form of one kernel that does the work of another kernel, too.
DOES_ALSO = {("keys", "one_pass"): "queries"}


def tuned_table(rows: list[Row]) -> str | None:
    """The JSON of the fastest choices so far; None if there are none yet."""
    choices = fastest(rows)
    if not choices:
        return None
    facts = [row for row in rows if row["kind"] == "facts" and row["stage"].startswith("tune:")][-1]
    run = [row for row in rows if row["kind"] == "run"][-1]
    record = {
        "gpu": facts["gpu"],
        "triton": facts["triton"],
        "torch": facts["torch"],
        "revision": run["revision"],
        "date": run["date"],
        "choices": choices,
    }
    return json.dumps(record, indent=1) + "\n"


def fastest(rows: list[Row]) -> list[dict[str, Any]]:
    """The fastest choice of each kernel and head_dim, among those that were timed on every mask.

    The fastest choice has the least geometric mean, over the masks, of its time over the time of
    the shipped choice.
    """
    tuned = latest(
        (row for row in rows if row["kind"] == "tune"),
        "kernel", "head_dim", "place", "variant", "tiles",
    )  # fmt: skip
    places = {(row["kernel"], row["head_dim"]): set[str]() for row in tuned}
    timed: dict[tuple[str, int], dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in tuned:
        key = row["kernel"], row["head_dim"]
        places[key].add(row["place"])
        if "ms" in row:
            name = json.dumps([row["variant"], row["tiles"]], sort_keys=True)
            timed[key][name][row["place"]] = row
    found: dict[tuple[str, int], dict[str, Row]] = {}
    # A kernel whose work another kernel can do comes before that kernel.
    for key in sorted(timed, key=lambda key: any(key[0] == of for of, _ in DOES_ALSO)):
        whole = [by for by in timed[key].values() if by.keys() == places[key]]
        spared = found.get((DOES_ALSO.get((key[0], "one_pass"), ""), key[1]), {})
        if whole:
            found[key] = min(whole, key=lambda by: _cost(by, spared))
    return [_entry(by, timed[key]) for key, by in found.items()]


def _cost(by_place: dict[str, Row], spared: dict[str, Row]) -> float:
    """Geometric mean of the times over the shipped choice's, without the work spared elsewhere."""
    logarithms = []
    for place, row in by_place.items():
        ms = row["ms"]
        if (row["kernel"], row["variant"]) in DOES_ALSO:
            if place not in spared:
                return math.inf  # whether it pays is not known
            ms -= spared[place]["ms"]
        shipped = row["ms"] / row["of_shipped"] if row["of_shipped"] else 1.0
        logarithms.append(math.log(max(ms, 1e-6) / shipped))
    return sum(logarithms) / len(logarithms)


def _entry(by_place: dict[str, Row], others: dict[str, dict[str, Row]]) -> dict[str, Any]:
    row = next(iter(by_place.values()))
    shipped = next((by for by in others.values() if next(iter(by.values()))["shipped"]), {})
    return {
        "kernel": row["kernel"],
        "head_dim": row["head_dim"],
        "variant": row["variant"],
        **row["tiles"],
        "shape": row["shape"],
        "ms": {place: round(one["ms"], 4) for place, one in by_place.items()},
        "shipped_ms": {place: round(one["ms"], 4) for place, one in shipped.items()},
    }
