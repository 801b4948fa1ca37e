"""The `diffattn` command: its sub-commands, and how errors and warnings are shown."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer

from ..errors import RunInterruptedError, UserError, one_line
from ..run.machine import quiet_imports
from . import options
from .bench import EXAMPLES as BENCH_EXAMPLES
from .bench import bench
from .calibrate import EXAMPLES as CALIBRATE_EXAMPLES
from .calibrate import calibrate
from .compare import EXAMPLES as COMPARE_EXAMPLES
from .compare import compare
from .doctor import EXAMPLES as DOCTOR_EXAMPLES
from .doctor import doctor
from .generate import EXAMPLES as GENERATE_EXAMPLES
from .generate import generate
from .lora_preview import app as lora_app
from .mask import EXAMPLES as MASK_EXAMPLES
from .mask import mask
from .options import examples
from .plan import EXAMPLES as PLAN_EXAMPLES
from .plan import plan
from .say import say, warn
from .study import EXAMPLES as STUDY_EXAMPLES
from .study import study
from .upscale import EXAMPLES as UPSCALE_EXAMPLES
from .upscale import upscale

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("methods", "plan --model Wan-AI/Wan2.1-T2V-14B", "generate -h"),
)

_STDOUT_CLOSED = 1
_BAD_INPUT = 2
_INTERRUPTED = 130


def _show_version(asked: bool) -> None:
    if asked:
        from ..run.sidecar import versions

        say(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit()


def finish(code: int) -> int:
    """Write out what is buffered, and return the exit code of the process.

    A program that reads stdout may have ended, as `head` does: then nothing is said. A full disk is
    an error.
    """
    if sys.stdout is None:  # closed by the shell
        return code
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return code or _STDOUT_CLOSED
        return _fail(f"cannot write to stdout: {error.strerror}", _BAD_INPUT)
    return code


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    command = typer.main.get_command(app)
    quiet_imports()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(command, list(arguments))


def _run(command: Any, arguments: list[str]) -> int:
    try:
        code = command.main(arguments, prog_name="diffattn", standalone_mode=False) or 0
    except UserError as error:
        return _fail(str(error), _BAD_INPUT)
    except RunInterruptedError as interruption:
        return _fail(str(interruption), _INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(str(RunInterruptedError([])), _INTERRUPTED)
    except BrokenPipeError:
        return _STDOUT_CLOSED
    except OSError as error:
        return _fail(one_line(error), _BAD_INPUT)
    except OverflowError as error:
        return _fail(f"a number is too large: {one_line(error)}", _BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        from ..run.refusals import is_lack_of_memory

        if not is_lack_of_memory(error):
            raise
        return _fail("out of memory: take a smaller size or grid", _BAD_INPUT)
    except Exception as error:
        # Typer has a copy of click's usage errors, whose module differs between Typer's versions.
        if not hasattr(error, "format_message"):
            raise
        message = one_line(error.format_message())
        # Without arguments the help is shown, which says it all.
        return _fail(message, _BAD_INPUT) if message else _BAD_INPUT
    # Releases of Typer make an exit code of Ctrl-C, and say nothing.
    return _fail(str(RunInterruptedError([])), code) if code == _INTERRUPTED else code


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions."),
    ] = False,
) -> None:
    """Sparse attention for diffusers video pipelines."""


def methods(as_json: options.AsJson = False) -> None:
    """List the attention methods with their parameters."""
    from .listing import method_lines, methods_as_json

    if as_json:
        say(methods_as_json())
        return
    for line in method_lines():
        say(line)


def models(as_json: options.AsJson = False) -> None:
    """List the model families."""
    from .listing import model_lines, models_as_json

    if as_json:
        say(models_as_json())
        return
    for line in model_lines():
        say(line)


for _command, _examples in (
    (generate, GENERATE_EXAMPLES),
    (upscale, UPSCALE_EXAMPLES),
    (compare, COMPARE_EXAMPLES),
    (study, STUDY_EXAMPLES),
    (methods, examples("methods", "methods --json")),
    (models, examples("models", "models --json")),
    (plan, PLAN_EXAMPLES),
    (mask, MASK_EXAMPLES),
    (bench, BENCH_EXAMPLES),
    (doctor, DOCTOR_EXAMPLES),
    (calibrate, CALIBRATE_EXAMPLES),
):
    app.command(epilog=_examples)(_command)
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
