"""The `diffattn` command: its sub-commands, and how errors and warnings are shown."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer

from ..errors import RunInterruptedError, UserError, one_line
from .generate import generate
from .lora import app as lora_app
from .mask import mask
from .plan import plan
from .say import say, warn
from .upscale import upscale

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_BAD_INPUT = 2
_INTERRUPTED = 130


def _show_version(asked: bool) -> None:
    if asked:
        from ..run.sidecar import versions

        say(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit()


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 2."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    command = typer.main.get_command(app)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(command, list(arguments))


def _run(command: Any, arguments: list[str]) -> int:
    try:
        return command.main(arguments, prog_name="diffattn", standalone_mode=False) or 0
    except UserError as error:
        return _fail(str(error), _BAD_INPUT)
    except RunInterruptedError as interruption:
        return _fail(str(interruption), _INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(str(RunInterruptedError([])), _INTERRUPTED)
    except Exception as error:
        # Typer has a copy of click's usage errors, whose module differs between Typer's versions.
        if not hasattr(error, "format_message"):
            raise
        return _fail(one_line(error.format_message()), _BAD_INPUT)


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions."),
    ] = False,
) -> None:
    """Sparse attention for diffusers video pipelines."""


def methods() -> None:
    """List the attention methods with their parameters."""
    from .listing import method_lines

    for line in method_lines():
        say(line)


def models() -> None:
    """List the model families."""
    from .listing import model_lines

    for line in model_lines():
        say(line)


for _command in (generate, upscale, methods, models, plan, mask):
    app.command()(_command)
app.add_typer(lora_app, name="lora")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a library's warning as one line, without the place in the library's code."""
    warn(one_line(message))


def _fail(message: str, code: int) -> int:
    typer.echo(f"diffattn: {message}", err=True)
    return code
