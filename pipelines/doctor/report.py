"""The report: every section with its findings, as lines or for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .findings import SECTIONS, Finding, examine

Report = Mapping[str, Sequence[Finding]]


def examine_all() -> Iterator[tuple[str, list[Finding]]]:
    """Every section, one after another."""
    for section in SECTIONS:
        yield section, examine(section)


def section_lines(section: str, findings: Sequence[Finding]) -> Iterator[str]:
    """A section of the report."""
    yield section
    for finding in findings:
        mark = "ok" if finding.status == "ok" else finding.status.upper()
        yield f"  {mark:<8} {finding.subject}: {finding.said}"
        if finding.advice:
            yield f"           -> {finding.advice}"


def summary(report: Report) -> str:
    """The last line of the report."""
    problems, warnings = count(report, "problem"), count(report, "warning")
    if not problems and not warnings:
        return "everything works"
    parts = [
        f"{number} {word}{'s' * (number != 1)}"
        for number, word in ((problems, "problem"), (warnings, "warning"))
        if number
    ]
    return f"{' and '.join(parts)}: what to do stands after ->"


def count(report: Report, status: str) -> int:
    """The number of findings with a status."""
    return sum(finding.status == status for found in report.values() for finding in found)


def to_dict(report: Report) -> dict[str, Any]:
    """All findings, ready for JSON."""
    return {
        "problems": count(report, "problem"),
        "warnings": count(report, "warning"),
        "sections": {name: [asdict(x) for x in found] for name, found in report.items()},
    }
