"""How the command line speaks: lines on stdout, warnings on stderr."""

from __future__ import annotations

import typer

from ..errors import UserError


def say(line: str) -> None:
    """Print a line.

    Raises:
        UserError: if stdout cannot be written to, as on a full disk.
        BrokenPipeError: if the program that reads stdout has ended.
    """
    try:
        typer.echo(line)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to stdout: {error.strerror}") from None


def warn(line: str) -> None:
    typer.echo(f"warning: {line}", err=True)
