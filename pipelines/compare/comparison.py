"""Everything that a comparison is made of, and the folder that holds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn._locks import lock_file

from ..errors import UserError, shortened
from ..run.outputs import check_writable, slug
from ..run.request import Request
from ..run.sidecar import versions
from .case import DENSE, Case
from .sample_table import SampleTable, write_whole

_MARK = "diffattn_comparison"
_FORMAT = 1
_FOLDERS = ("samples", "dense", "masks")
# Settings that stand in the cases and the samples, not in what all requests have in common.
_APART = ("prompt", "seed", "attention", "compare")


@dataclass(frozen=True)
class Sample:
    """A prompt and a seed; each case makes a video of it.

    Attributes:
        number: of the sample, from 1.
    """

    number: int
    prompt: str
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt, self.seed


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison.

    Attributes:
        base: what the requests of all cases and samples have in common.
        cases: the dense model first, its floors next, then what is compared, and at last what of it
            FlexAttention computes, too.
        prompts, seeds: each prompt is made with each seed.
        measures: names of the measures to take.
        title: of the page.
    """

    base: Request
    cases: tuple[Case, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    measures: tuple[str, ...]
    title: str = "Methods against dense attention"

    @property
    def samples(self) -> list[Sample]:
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        return [Sample(number, *pair) for number, pair in enumerate(pairs, start=1)]

    def case(self, name: str) -> Case:
        return next(case for case in self.cases if case.name == name)

    def reference(self, case: Case) -> Case:
        """What a case is compared with: the dense model, or the case that it is a floor of."""
        return self.case(case.flex_of or DENSE)

    def is_reference(self, case: Case) -> bool:
        """Whether other cases are compared with a case, so that its exact frames are kept."""
        return case.name == DENSE or any(other.flex_of == case.name for other in self.cases)

    def stem(self, case: Case) -> str:
        """The beginning of the names of a case's files."""
        return f"{self.cases.index(case):02d}-{slug(case.name)}"

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        settings = {k: v for k, v in self.base.to_dict().items() if k not in _APART}
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return {
            "settings": plain,
            "cases": {case.name: case.to_dict() for case in self.cases},
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "measures": list(self.measures),
            "title": self.title,
        }


class Folder:
    """The folder of a comparison.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def settings(self) -> Path:
        return self.path / "comparison.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.csv"

    @property
    def page(self) -> Path:
        return self.path / "index.html"

    @property
    def summary(self) -> Path:
        return self.path / "summary.md"

    def video(self, stem: str, sample: Sample, picture: bool) -> Path:
        """The file of a sample of the case whose files begin with `stem`."""
        name = f"{stem}-{sample.number:03d}{'.png' if picture else '.mp4'}"
        return self.path / "samples" / name

    def dense_frames(self, sample: Sample) -> Path:
        """The exact frames of the dense model, which the other cases are compared with."""
        return self.path / "dense" / f"{sample.number:03d}.npz"

    def frames(self, stem: str, sample: Sample) -> Path:
        """The exact frames of a case that has a floor of its own."""
        return self.path / "dense" / f"{stem}-{sample.number:03d}.npz"

    def mask(self, stem: str) -> Path:
        """The picture of the blocks that the case whose files begin with `stem` computed."""
        return self.path / "masks" / f"{stem}.png"

    @contextmanager
    def opened(
        self, comparison: Comparison, device: Mapping[str, Any], warn: Callable[[str], None]
    ) -> Iterator[SampleTable]:
        """The table of the samples that are there already; no other process has it meanwhile.

        Args:
            comparison: the settings.
            device: of the run, as `describe_device` has it.
            warn: takes a warning where a run goes on elsewhere than it began.

        Raises:
            UserError: if the folder cannot be written, belongs to other settings or to a living
                run, or holds a table that cannot be read.
        """
        check_writable(self.path)
        lock = lock_file(self.path / ".lock")
        if lock is None:
            raise UserError(f"another run is at work in {self.path}: wait for its end, or end it")
        try:
            self._check(comparison, device, warn)
            for part in [*self.path.glob("*/.part-*"), *self.path.glob(".*.part")]:
                part.unlink(missing_ok=True)  # of a run that was killed
            yield SampleTable(self.samples, comparison.measures)
        finally:
            lock.remove()
            with suppress(OSError):  # a folder with anything in it stays
                self.path.rmdir()

    def begin(self, comparison: Comparison, device: Mapping[str, Any]) -> None:
        """Write down the settings, unless that has been done, before the first sample."""
        for name in _FOLDERS:
            (self.path / name).mkdir(exist_ok=True)
        if not self.settings.exists():
            record = {_MARK: _FORMAT, **comparison.to_dict(), **_now(device)}
            write_whole(self.settings, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def _check(
        self, comparison: Comparison, device: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        """Refuse a folder of other settings."""
        if not self.settings.exists():
            if self.samples.exists():
                raise UserError(
                    f"{self.samples} is there without {self.settings.name}, which says how its"
                    f" rows were made: choose another folder"
                )
            return
        found = read_record(self.settings)
        difference = _difference(found, comparison.to_dict())
        if difference is not None:
            raise UserError(
                f"{self.path} holds a comparison with {difference}: repeat the same options to go"
                f" on, or choose another folder"
            )
        for name, value in _now(device).items():
            for part, new in value.items():
                old = found.get(name, {}).get(part)
                if old != new:
                    warn(f"{self.path} was begun with {part} {old}, now {new}: times may differ")


def _now(device: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {"versions": versions(), "device": dict(device)}


def read_record(path: Path) -> dict[str, Any]:
    """The record of a comparison.

    Raises:
        UserError: if the file cannot be read, or is none.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; choose another folder") from None
    if not isinstance(found, dict) or found.get(_MARK) != _FORMAT:
        raise UserError(f"{path} is no record of this version's diffattn compare")
    return found


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first difference of two records, in words; None for equal settings."""
    for name, value in found.get("settings", {}).items():
        new = wanted["settings"].get(name)
        if value != new:
            return f"{name} {shortened(value)}, not {shortened(new)}"
    old_cases, new_cases = found.get("cases", {}), wanted["cases"]
    for name in [*old_cases, *new_cases]:
        if name not in new_cases:
            return f"the case {name!r}, which is missing here"
        if name not in old_cases:
            return f"no case {name!r}"
        if old_cases[name] != new_cases[name]:
            return f"other parameters of the case {name!r}"
    for name in ("prompts", "seeds", "measures", "title", "settings"):
        if found.get(name) != wanted[name]:
            return f"other {name}, {_first(found.get(name), wanted[name])}"
    return None


def _first(old: Any, new: Any) -> str:
    if isinstance(old, Sequence) and isinstance(new, Sequence) and not isinstance(old, str):
        for a, b in zip(old, new, strict=False):
            if a != b:
                return f"{shortened(a)}, not {shortened(b)}"
        return f"{len(old)}, not {len(new)}"
    return f"{shortened(old)}, not {shortened(new)}"
