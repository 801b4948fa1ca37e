"""The table of samples: a CSV with one row for each sample of each case.

The file is written whole beside itself and renamed, so that no moment finds half a row.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import UserError, shortened

_FIXED = ("case", "prompt", "seed", "seconds", "loop_seconds", "memory_gib", "density", "file")
_NUMBERS = ("seconds", "loop_seconds")

Value = float | str


@dataclass(frozen=True)
class Row:
    """One sample of one case.

    Attributes:
        case: the name of the case.
        prompt: the text.
        seed: of the noise.
        seconds: of the pipeline's call, without loading and writing.
        loop_seconds: of the denoising loop alone.
        memory_gib: the peak while the sample was made; words where it is not known.
        density: share of the token pairs that were computed in all calls of attention; words where
            the method chooses no pairs.
        file: the video or the picture, relative to the folder.
        measures: the value of each measure, or the reason why there is none.
    """

    case: str
    prompt: str
    seed: int
    seconds: float
    loop_seconds: float
    memory_gib: Value
    density: Value
    file: str
    measures: dict[str, Value] = field(default_factory=dict)

    @property
    def sample(self) -> tuple[str, int]:
        return self.prompt, self.seed

    def number(self, name: str) -> float | None:
        """A measure, or "seconds", "density" and the like, as a number; None if it is none."""
        value = self.measures.get(name, getattr(self, name, ""))
        return value if isinstance(value, float) else None


class SampleTable:
    """The rows of a file.

    Attributes:
        path: the file.
        measures: the names of the measures, in the order of the columns.
        rows: all rows that the file has.
    """

    def __init__(self, path: Path, measures: Sequence[str]) -> None:
        """Read the file, if there is one.

        Raises:
            UserError: if the file cannot be read, or holds anything but such a table.
        """
        self.path = path
        self.measures = list(measures)
        self.rows: list[Row] = _read(path, self.columns) if path.exists() else []

    @property
    def columns(self) -> list[str]:
        return [*_FIXED, *self.measures]

    def has(self, case: str, sample: tuple[str, int]) -> bool:
        """Whether there is a row of a sample of a case."""
        return any(row.case == case and row.sample == sample for row in self.rows)

    def add(self, row: Row) -> None:
        """Add a row, in the file too.

        Raises:
            UserError: if the file cannot be written.
        """
        cells = self._write([*self.rows, row])
        # The row as a later run will read it: both make the same table.
        self.rows.append(self._read_back(len(self.rows), cells[-1]))

    def put(self, measure: str, values: Mapping[tuple[str, tuple[str, int]], Value]) -> None:
        """Put values of a measure into rows, in the file too.

        Args:
            measure: the name.
            values: by case and sample.

        Raises:
            UserError: if the file cannot be written.
        """
        rows = []
        for row in self.rows:
            own = values.get((row.case, row.sample))
            changed = {} if own is None else {measure: own}
            rows.append(replace(row, measures=row.measures | changed))
        cells = self._write(rows)
        self.rows = [self._read_back(index, one) for index, one in enumerate(cells)]

    def _write(self, rows: Sequence[Row]) -> list[list[str]]:
        """Write the file; returns the cells of its rows."""
        cells = [_cells(row, self.measures) for row in rows]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.columns, *cells])
        write_whole(self.path, text.getvalue())
        return cells

    def _read_back(self, index: int, cells: list[str]) -> Row:
        by_column = dict(zip(self.columns, cells, strict=True))
        return _row(self.path, index + 2, by_column, len(cells), "")


def write_whole(path: Path, text: str) -> None:
    """Write a file, or leave the former one as it was.

    Raises:
        UserError: if the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _cells(row: Row, measures: Sequence[str]) -> list[str]:
    fixed = [_cell(getattr(row, name)) for name in _FIXED]
    return fixed + [_cell(row.measures.get(name, "")) for name in measures]


def _cell(value: Value | int) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _read(path: Path, columns: list[str]) -> list[Row]:
    advice = "move the file away, or choose another folder"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {path}: it is not UTF-8; {advice}") from None
    except csv.Error as error:
        raise UserError(f"cannot read {path}: {error}; {advice}") from None
    if not lines or lines[0] != columns:
        raise UserError(f"{path} has other columns than this comparison writes; {advice}")
    rows: list[Row] = []
    known: set[tuple[str, str, int]] = set()
    for number, cells in enumerate(lines[1:], start=2):
        row = _row(path, number, dict(zip(columns, cells, strict=False)), len(cells), advice)
        if (row.case, *row.sample) in known:
            raise UserError(f"{path}: row {number} repeats a sample of {row.case!r}; {advice}")
        known.add((row.case, *row.sample))
        rows.append(row)
    return rows


def _row(path: Path, number: int, cells: dict[str, str], count: int, advice: str) -> Row:
    if count != len(cells) or "file" not in cells:
        raise UserError(f"{path}: row {number} has {count} cells, not as many as columns; {advice}")
    try:
        seed = int(cells["seed"])
        seconds, loop = (float(cells[name]) for name in _NUMBERS)
    except ValueError:
        raise UserError(
            f"{path}: row {number} is not a sample: {shortened(','.join(cells.values()))}; {advice}"
        ) from None
    return Row(
        cells["case"],
        cells["prompt"],
        seed,
        seconds,
        loop,
        _value(cells["memory_gib"]),
        _value(cells["density"]),
        cells["file"],
        {name: _value(cells[name]) for name in cells if name not in _FIXED},
    )


def _value(cell: str) -> Value:
    try:
        number = float(cell)
    except ValueError:
        return cell
    return cell if math.isnan(number) else number
