"""Rows of a measurement, and the JSON files that hold them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from diffattn import TokenGrid
from diffattn.grid import Reference

from ..errors import UserError
from .cases import BACKWARD, DTYPES, FORWARD, Bound, Case, Shape
from .timing import Spread, median_ratio

DENSE = "dense attention"
_MARK, _FORMAT = "diffattn_bench", 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """The times of one attention at one shape in one direction; times in ms.

    Attributes:
        label: the method for tables; `DENSE` for torch's own attention.
        grid: the fields of a `TokenGrid`.
        heads, head_dim, batch, dtype, direction: of the call.
        method: the settings of the method; None for dense attention.
        family, layer, layers: the block of a model that the method is measured at.
        backend: what computes: a backend of `diffattn.attention`, or one of torch's for dense.
        rounds: the time of each round, in the order of time. Empty where the call failed.
        dense_rounds: the times of dense attention in the same rounds.
        density, bound: of the method's plan; None where not known.
        first_ms: the first call, which builds masks and compiles kernels.
        peak_mib: peak of memory in a call, results counted; None where not known.
        selection_rounds: the times of the selection alone, in the same rounds; empty without any.
        failed: why there are no times; empty if there are.
    """

    label: str
    grid: dict[str, Any]
    heads: int
    head_dim: int
    batch: int
    dtype: str
    direction: str
    method: dict[str, Any] | None = None
    family: str = ""
    layer: int = 0
    layers: int = 1
    backend: str = ""
    rounds: tuple[float, ...] = ()
    dense_rounds: tuple[float, ...] = ()
    density: float | None = None
    bound: float | None = None
    first_ms: float | None = None
    peak_mib: float | None = None
    selection_rounds: tuple[float, ...] = ()
    failed: str = ""

    @property
    def shape(self) -> Shape:
        grid = dict(self.grid)
        references = tuple(Reference(**entry) for entry in grid.pop("references", ()))
        return Shape(
            TokenGrid(**grid, references=references),
            self.heads,
            self.head_dim,
            self.batch,
            self.dtype,
        )

    @property
    def spread(self) -> Spread:
        """Median and range of the rounds, of which there must be some."""
        return Spread.of(list(self.rounds))

    @property
    def costs(self) -> list[float]:
        """The times over those of dense attention, round by round."""
        return [a / b for a, b in zip(self.rounds, self.dense_rounds, strict=False)]

    @property
    def speed_up(self) -> float | None:
        """Median over the rounds of dense attention's time over this time."""
        if not self.rounds or not self.dense_rounds:
            return None
        return median_ratio(list(self.dense_rounds), list(self.rounds))

    @property
    def of_bound(self) -> float | None:
        """The speed-up as a share of the plan's bound."""
        return None if self.speed_up is None or self.bound is None else self.speed_up / self.bound

    @property
    def selection(self) -> Spread | None:
        """The time of the selection alone."""
        return Spread.of(list(self.selection_rounds)) if self.selection_rounds else None

    @property
    def attention(self) -> Spread | None:
        """The time of the rest, where the selection is known apart."""
        pairs = zip(self.rounds, self.selection_rounds, strict=False)
        rest = [whole - selection for whole, selection in pairs]
        return Spread.of(rest) if rest else None

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the figures that follow from them, ready for JSON."""
        spreads = {
            name: None if spread is None else asdict(spread)
            for name, spread in (
                ("ms", self.spread if self.rounds else None),
                ("selection_ms", self.selection),
                ("attention_ms", self.attention),
            )
        }
        return asdict(self) | spreads | {"speed_up": self.speed_up, "of_bound": self.of_bound}


def new_row(shape: Shape, direction: str, case: Case | None, bound: Bound, **facts: Any) -> Row:
    """A row of a case; None for dense attention."""
    common: dict[str, Any] = {
        "grid": asdict(shape.grid),
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "batch": shape.batch,
        "dtype": shape.dtype,
        "direction": direction,
        "density": bound.density,
        "bound": bound.speed_up,
    }
    if case is None:
        return Row(label=DENSE, **common, **facts)
    return Row(
        label=case.label,
        method=case.method.to_dict(),
        family=case.family,
        layer=case.layer,
        layers=case.layers,
        **common,
        **facts,
    )


@dataclass(frozen=True)
class Record:
    """The content of a JSON file.

    Attributes:
        device: type and name of the device, and the number of threads of a CPU.
        versions: by package.
        date: when the run began.
        rows: the measurements.
    """

    device: dict[str, Any]
    versions: dict[str, str]
    date: str
    rows: tuple[Row, ...]


def write_record(path: Path, record: Record) -> None:
    """Write a file under a hidden name, and rename it: an interrupt leaves what was there.

    Raises:
        UserError: if the file cannot be written.
    """
    content = {
        _MARK: _FORMAT,
        "date": record.date,
        "device": record.device,
        "versions": record.versions,
        "rows": [row.to_dict() for row in record.rows],
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    hidden = None
    try:
        handle, hidden = tempfile.mkstemp(prefix=".diffattn-bench-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(hidden).chmod(0o644)
        Path(hidden).replace(path)
    except OSError as error:
        raise UserError(f"cannot write --output {path}: {error.strerror}") from None
    finally:
        if hidden is not None:
            Path(hidden).unlink(missing_ok=True)


def read_record(path: Path) -> Record:
    """Read a file that `write_record` wrote.

    Raises:
        UserError: if the file cannot be read, or is no such file.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a file of diffattn bench: {error}") from None
    if not isinstance(content, dict) or _MARK not in content:
        raise UserError(f'{path} is not a file of diffattn bench: it has no "{_MARK}"')
    if content[_MARK] != _FORMAT:
        raise UserError(f"{path} is a file of another version of diffattn bench")
    try:
        return Record(
            device=dict(content["device"]),
            versions=dict(content["versions"]),
            date=str(content["date"]),
            rows=tuple(_read_row(entry) for entry in content["rows"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: {type(error).__name__}: {error}; measure again"
        ) from None


def _read_row(entry: Mapping[str, Any]) -> Row:
    known = {field.name: entry[field.name] for field in fields(Row) if field.name in entry}
    missing = [f.name for f in fields(Row) if f.default is MISSING and f.name not in known]
    if missing:
        raise ValueError(f"a row lacks {', '.join(missing)}")
    if known["dtype"] not in DTYPES or known["direction"] not in (FORWARD, BACKWARD):
        raise ValueError(f"a row of {known['dtype']!r}, {known['direction']!r}")
    for name in ("rounds", "dense_rounds", "selection_rounds"):
        known[name] = tuple(float(ms) for ms in known.get(name, ()))
    row = Row(**known)
    if row.shape.grid.tokens < 1 or any(ms <= 0 for ms in row.rounds):
        raise ValueError("a time is not above 0")
    return row


def key_of(row: Row) -> str:
    """What tells a row apart from all others of a file, and finds the same case in another."""
    method = None if row.method is None else dict(sorted(row.method.items()))
    parts: Sequence[Any] = (
        row.grid, row.heads, row.head_dim, row.batch, row.dtype, row.direction, method, row.family,
        row.layer, row.layers,
    )  # fmt: skip
    return json.dumps(parts, sort_keys=True)
