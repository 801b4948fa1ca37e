"""The tuned table made from the rows of a run, as diffattn.kernels.common.tuned reads it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from statistics import fmean
from typing import Any

from gpu_run.journal import Row, latest


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
    found = []
    for key, choices in timed.items():
        whole = [by for by in choices.values() if by.keys() == places[key]]
        if whole:
            found.append(_entry(min(whole, key=_cost), choices))
    return found


def _cost(by_place: dict[str, Row]) -> float:
    """Logarithm of the geometric mean of the times over the shipped choice's."""
    return fmean(math.log(row["of_shipped"] or row["ms"]) for row in by_place.values())


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
