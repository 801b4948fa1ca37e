"""Rows of results: each row is on the disk before the next thing is tried."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Environment variables of a stage's process: the file of rows, the stage, the kernels' sources.
PATH_VARIABLE = "GPU_RUN_RESULTS"
STAGE_VARIABLE = "GPU_RUN_STAGE"
SOURCES_VARIABLE = "GPU_RUN_SOURCES"


@dataclass(frozen=True)
class Journal:
    """The rows that one stage adds to a file of rows.

    Attributes:
        path: JSON lines, one for each row.
        stage: the stage that adds rows.
        sources: the digest of the kernels' source text, see `sources_of`.
    """

    path: Path
    stage: str
    sources: str

    @staticmethod
    def of_environment() -> Journal:
        """The journal of a stage's process, which runs in this environment."""
        path, stage, sources = (
            os.environ[name] for name in (PATH_VARIABLE, STAGE_VARIABLE, SOURCES_VARIABLE)
        )
        return Journal(Path(path), stage, sources)

    def environment(self) -> dict[str, str]:
        """The environment variables that `of_environment` reads."""
        values = (str(self.path), self.stage, self.sources)
        return dict(zip((PATH_VARIABLE, STAGE_VARIABLE, SOURCES_VARIABLE), values, strict=True))

    def add(self, kind: str, **facts: object) -> Row:
        """Append a row, on the disk when this returns."""
        row = {"at": round(time.time(), 1), "stage": self.stage, "kind": kind}
        row |= {"sources": self.sources, **facts}
        line = json.dumps(row).encode() + b"\n"
        # Many processes append to the file: a line is one write, which no other write splits.
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)
        return row

    def rows(self) -> list[Row]:
        """All rows of the file, also the rows of other stages."""
        return read(self.path)

    def finish(self, unit: str) -> None:
        """Record that a part of the stage is done and all its rows are written."""
        self.add("unit", unit=unit)

    def is_finished(self, unit: str) -> bool:
        """Whether an earlier run has finished a part of the stage, with the same kernels."""
        wanted = {"kind": "unit", "unit": unit, "sources": self.sources}
        return any(wanted.items() <= row.items() for row in that_count(self.rows(), self.stage))

    def forget(self) -> None:
        """Record that the rows so far settle nothing of the stage."""
        self.add("forget")


def read(path: Path) -> list[Row]:
    """The rows of a file, without a last row that was cut off; none if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def that_count(rows: list[Row], stage: str) -> list[Row]:
    """The rows of a stage since its last `forget`."""
    own = [row for row in rows if row["stage"] == stage]
    forgotten = [number for number, row in enumerate(own) if row["kind"] == "forget"]
    return own[forgotten[-1] + 1 :] if forgotten else own


def end_last_line(path: Path) -> None:
    """End a line that was cut off, so that the next row does not continue it."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def latest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The last of the rows that agree in `keys`, in the order of the first rows that agree."""
    found: dict[str, Row] = {}
    for row in rows:
        found[json.dumps([row.get(key) for key in keys], sort_keys=True)] = row
    return list(found.values())
