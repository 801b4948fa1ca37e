"""The `diffattn` command: one file for each sub-command."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["app", "main", "run"]


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 2."""
    try:
        from .commands import finish, run

        code = finish(run(sys.argv[1:]))
    except KeyboardInterrupt:  # while modules load
        sys.stderr.write("diffattn: interrupted: nothing was written\n")
        code = 130
    sys.exit(code)


def __getattr__(name: str) -> Any:
    # The modules below load in `main`, which can answer Ctrl-C.
    if name in ("app", "run"):
        from . import commands

        return getattr(commands, name)
    raise AttributeError(f"module 'diffattn.pipelines.cli' has no attribute {name!r}")
