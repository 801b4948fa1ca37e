"""Two runs beside each other: what became slower, and what is only noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .rows import DENSE, Record, Row, key_of
from .timing import Spread


@dataclass(frozen=True)
class Change:
    """The times of one case in two runs.

    Attributes:
        old, new: the rows.
        relative: whether times are taken over those of dense attention in the same rounds.
    """

    old: Row
    new: Row
    relative: bool = False

    @property
    def spreads(self) -> tuple[Spread, Spread]:
        """The old and the new times in ms, or as multiples of dense attention's."""
        old, new = (
            Spread.of(row.costs) if self.relative else row.spread for row in (self.old, self.new)
        )
        return old, new

    @property
    def ratio(self) -> float:
        """The new time over the old time."""
        old, new = self.spreads
        return new.median / old.median

    @property
    def noise(self) -> float:
        """The part of the ratio that the spread of the rounds explains.

        Half of the range from the 10th to the 90th percentile, over the median, of both runs.
        """
        parts = [(s.high - s.low) / 2 / s.median for s in self.spreads]
        return self.ratio * math.hypot(*parts)

    @property
    def verdict(self) -> str:
        """ "slower" or "faster" if the change is more than noise, "the same" otherwise."""
        if abs(self.ratio - 1) <= self.noise:
            return "the same"
        return "slower" if self.ratio > 1 else "faster"

    def fails(self, percent: float) -> bool:
        """Whether the new time is more than so many percent above the old one, and above noise."""
        return self.ratio > 1 + percent / 100 and self.verdict == "slower"


@dataclass(frozen=True)
class Comparison:
    """Two runs, row by row.

    Attributes:
        changes: the cases that both runs have measured alike.
        left_out: why other rows are not compared, a line each.
        versions: a line for each package whose version differs.
        relative: whether times are taken over those of dense attention.
    """

    changes: tuple[Change, ...]
    left_out: tuple[str, ...]
    versions: tuple[str, ...]
    relative: bool


def compare(old: Record, new: Record, relative: bool = False) -> Comparison:
    """Put two runs beside each other.

    Args:
        old, new: the runs.
        relative: compare times over dense attention's in the same rounds. What slows both down
            alike, as other load does, then does not count.

    Raises:
        UserError: if the runs are of different devices, or have no case in common.
    """
    check_device(old, new.device)
    before, after = ({key_of(row): row for row in record.rows} for record in (old, new))
    changes: list[Change] = []
    left_out: list[str] = []
    for key, row in before.items():
        if relative and row.label == DENSE:
            continue
        if key not in after:
            left_out.append(f"{name_of(row)}: not in the new run")
            continue
        reason = _difference(row, after[key], relative)
        if reason:
            left_out.append(f"{name_of(row)}: {reason}")
        else:
            changes.append(Change(row, after[key], relative))
    left_out += [f"{name_of(row)}: not in the old run" for key, row in after.items()
                 if key not in before]  # fmt: skip
    if not changes:
        raise UserError(f"the runs have no time to compare: {'; '.join(left_out) or 'no rows'}")
    return Comparison(tuple(changes), tuple(left_out), tuple(_versions(old, new)), relative)


def check_device(old: Record, device: dict[str, Any]) -> None:
    """Refuse another device than that of the old run.

    Raises:
        UserError: names both.
    """
    if old.device != device:
        raise UserError(
            f"times of different devices cannot be compared: the old run is of"
            f" {shown_device(old.device)}, the new one of {shown_device(device)}"
        )


def shown_device(device: dict[str, Any]) -> str:
    """A device in words."""
    threads = f", {device['threads']} threads" if "threads" in device else ""
    return f"{device.get('type')} ({device.get('name')}{threads})"


def name_of(row: Row) -> str:
    """A row in words."""
    tokens = row.shape.grid.tokens
    return f"{row.label} at {tokens:,} tokens, {row.dtype}, {row.direction}"


def _difference(old: Row, new: Row, relative: bool) -> str:
    """Why two rows of one case cannot be compared; empty if they can."""
    for when, row in (("old", old), ("new", new)):
        if not row.rounds:
            return f"the {when} run has no time: {row.failed}"
        if relative and not row.dense_rounds:
            return f"the {when} run has no time of dense attention"
    if old.backend != new.backend:
        what = "torch's backend" if old.label == DENSE else "the backend"
        return f"{what} was {old.backend} and is {new.backend}"
    return ""


def _versions(old: Record, new: Record) -> Iterator[str]:
    for name in sorted({*old.versions, *new.versions}):
        then, now = (record.versions.get(name, "missing") for record in (old, new))
        if then != now:
            yield f"{name} {then} -> {now}"
