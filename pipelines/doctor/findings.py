"""What checks find, and running them where anything may be broken."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from ..errors import one_line

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: "ok"; "warning" where something works, but worse than it could; "problem" where
            something does not work.
        subject: the thing that was checked.
        said: what was found.
        advice: what to do; empty for "ok".
    """

    status: Status
    subject: str
    said: str
    advice: str = ""


# Modules whose name is not that of their distribution.
_DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python"}

# A check yields what it finds. It may raise anything, which is a problem.
Check = Callable[[], Iterable[Finding]]

# The sections in the order of the report, each with its module.
SECTIONS = {
    "versions": "versions",
    "devices": "devices",
    "backends": "backends",
    "numerics": "numerics",
    "ffmpeg": "video_tools",
    "disk": "disk",
    "models": "models",
    "optional packages": "optional",
}


def examine(section: str) -> list[Finding]:
    """Run the checks of a section; a check that raises is a problem, and stops no other check."""
    # Some packages print advice as they are imported. The report has stdout for itself.
    with redirect_stdout(sys.stderr):
        try:
            module = import_module(f".{SECTIONS[section]}", __package__)
        except Exception as error:
            return [broken(section, error)]
        return [finding for check in module.CHECKS for finding in _run(check)]


def broken(subject: str, error: Exception) -> Finding:
    """The problem that an unforeseen error is."""
    advice = "see `pip check`; a fresh virtual environment with `pip install diffattn` is the cure"
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition(".")[0]
        advice = f"pip install {_DISTRIBUTIONS.get(module, module)}"
    return Finding("problem", subject, f"{type(error).__name__}: {one_line(error)[:300]}", advice)


def _run(check: Check) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:
        yield broken(check.__name__.removeprefix("check_").replace("_", " "), error)
