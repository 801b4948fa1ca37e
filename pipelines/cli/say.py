"""How the command line speaks: lines on stdout, warnings on stderr."""

from __future__ import annotations

import typer


def say(line: str) -> None:
    typer.echo(line)


def warn(line: str) -> None:
    typer.echo(f"warning: {line}", err=True)
