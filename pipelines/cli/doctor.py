"""`diffattn doctor`: its arguments; `diffattn.pipelines.doctor` does the work."""

from __future__ import annotations

import json

import typer

from . import options
from .say import say

EXAMPLES = options.examples("doctor", "doctor --json")

_PROBLEMS = 1


def doctor(as_json: options.AsJson = False) -> None:
    """Check this installation, and say what to do; exit code 1 if something does not work."""
    from ..doctor.report import count, examine_all, section_lines, summary, to_dict

    report = {}
    for section, findings in examine_all():
        report[section] = findings
        if not as_json:
            for line in section_lines(section, findings):
                say(line)
    say(json.dumps(to_dict(report), indent=1) if as_json else summary(report))
    if count(report, "problem"):
        raise typer.Exit(_PROBLEMS)
