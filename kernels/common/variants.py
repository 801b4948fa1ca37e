"""The variant of a kernel that a call takes, and the fallback where a variant does not compile."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import torch
import triton.compiler
from triton.runtime.errors import OutOfResources

from . import tuned
from .launch import is_hopper
from .tile_tables import Choice, TileConfig

VARIANT_VARIABLE = "DIFFATTN_TRITON_VARIANT"

# The variants that kernels have, the most general first:
# plain  reads by pointers: runs on whatever Triton compiles for, and takes every call;
# tma    fetches tiles through the copy engine of Hopper GPUs (and newer, if asked for);
# gluon  has warps of its own for fetching, and computes weights beside products; Hopper only.
KERNELS = tuned.VARIANTS
VARIANTS = tuple(dict.fromkeys(name for names in KERNELS.values() for name in names))

Result = TypeVar("Result")


class Call(Protocol):
    """The properties of a call that decide its variant; `launch.Problem` is such a call."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def masked(self) -> bool:
        """Whether there is a key mask or padding in the head dimension: both take registers."""

    @property
    def compiled_for(self) -> tuple[object, ...]:
        """The constants that kernels are compiled for, beside device, dtype and head_dim."""

    def on_device(self) -> AbstractContextManager[object]:
        """A context in which Triton launches on the device of the tensors."""

    def tiles(self, kernel: str, variant: str, measured: TileConfig | None) -> TileConfig:
        """The measured tiles if there are any, else the shipped tiles; fitted to the call."""


# Calls whose kernel compiled, calls whose kernel did not, and variants that a warning has named.
_compiled: set[tuple[object, ...]] = set()
_broken: set[tuple[object, ...]] = set()
_warned: set[str] = set()

# What `choices` found, by call and environment: the tables are long.
_found: dict[tuple[object, ...], list[Choice]] = {}


def first_that_compiles(
    kernel: str,
    call: Call,
    takes: Callable[[str], bool],
    run: Callable[[Choice], Result],
    choice: Choice | None,
) -> Result:
    """The result of the best variant that takes a call and compiles; all give the same result.

    The best variant is the choice of the GPU's measured table, if there is one; else, on a Hopper
    GPU, the kernel's last variant; else the plain variant. The environment variable
    DIFFATTN_TRITON_VARIANT names a variant to try first, on any GPU. Where the best variant does
    not take a call, the variants before it are tried.

    Args:
        kernel: a name in `KERNELS`.
        takes: whether a variant takes the call.
        run: does the call by a choice.
        choice: the only variant and tiles to run, if given; errors of its compiler are raised.

    Raises:
        ValueError: if DIFFATTN_TRITON_VARIANT is not a variant, or the choice does not take the
            call.
    """
    if choice is not None:
        if not takes(choice.variant):
            raise ValueError(
                f"the {choice.variant!r} variant of {kernel!r} does not take this call"
            )
        return run(choice)
    kind = (kernel, call.device, call.dtype, call.head_dim, *call.compiled_for)
    asked = (os.environ.get(VARIANT_VARIABLE), os.environ.get(tuned.TABLE_VARIABLE))
    found = _found.get((kind, asked))
    if found is None:
        found = _found[kind, asked] = choices(kernel, call)
    *demanding, plain = found
    for best in demanding:
        compiled_for = (best.variant, *kind)
        if compiled_for in _broken or not takes(best.variant):
            continue
        try:
            if compiled_for in _compiled:
                return run(best)
            with _dumps_of_the_compiler_held_back():
                result = run(best)
            _compiled.add(compiled_for)
            return result
        except Exception as error:
            if not _is_compile_failure(error):
                raise
            _broken.add(compiled_for)
            _warn(kernel, best.variant, error)
    return run(plain)


@contextmanager
def _dumps_of_the_compiler_held_back() -> Iterator[None]:
    """Hold back the process's stderr while the block runs, and show it at the end.

    If a kernel does not compile, nothing is shown: stderr then has hundreds of lines of MLIR, for
    which there is a warning in one line.
    """
    if sys.stderr is None:  # a program without a console
        yield
        return
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        real = os.dup(2)
        os.dup2(file.fileno(), 2)
        shown = True
        try:
            yield
        except Exception as error:
            shown = not _is_compile_failure(error)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            if shown:
                file.seek(0)
                os.write(2, file.read())


def has_gluon(versions: tuple[str, ...], kernel_module: Callable[[], object]) -> bool:
    """Whether the installed Triton has the parts of Gluon that a kernel is written in.

    Args:
        versions: beginnings of the versions of Triton that the kernel was compiled with.
        kernel_module: imports the kernel.
    """
    if not triton.__version__.startswith(versions):
        return False
    try:
        kernel_module()
    except (ImportError, AttributeError):  # a build of Triton without Gluon
        return False
    return True


def takes_any(variant: str) -> bool:
    """True, for kernels whose every variant takes every call."""
    return True


def choices(kernel: str, call: Call) -> list[Choice]:
    """The choices for a call, the best first and "plain" last; they need not take the call."""
    forms = KERNELS[kernel]
    with call.on_device():
        measured = None
        if call.dtype.itemsize == 2 and not call.masked:
            measured = tuned.tuned_choice(kernel, call.head_dim)
        asked = _asked()
        if asked in forms:
            best = asked
        elif measured is not None and asked is None:
            best = measured.variant
        else:  # the environment names no variant, or one of another kernel only
            is_first = kernel not in tuned.NAMED_ONLY and (asked or is_hopper(call.device))
            best = forms[-1] if is_first else forms[0]
        found = []
        for variant in reversed(forms[: forms.index(best) + 1]):
            known = measured.tiles if measured and measured.variant == variant else None
            found.append(Choice(variant, call.tiles(kernel, variant, known)))
        return found


def _asked() -> str | None:
    """The variant that the environment names."""
    asked = os.environ.get(VARIANT_VARIABLE)
    if asked and asked not in VARIANTS:
        raise ValueError(f"{VARIANT_VARIABLE} is {asked!r}; choose from {', '.join(VARIANTS)}")
    return asked or None


def _is_compile_failure(error: Exception) -> bool:
    """Whether Triton could not compile a kernel, or made one that does not fit on the GPU."""
    if isinstance(error, OutOfResources):
        return True
    # Passes of the compiler mostly raise RuntimeError, and so does running out of memory: only the
    # traceback tells them apart.
    compile_kernel = triton.compiler.compile.__code__
    return any(
        frame.f_code is compile_kernel for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _warn(kernel: str, variant: str, error: Exception) -> None:
    if variant in _warned:
        return
    _warned.add(variant)
    lines = str(error).strip().splitlines()
    warnings.warn(
        f"the {variant!r} variant of the block-sparse Triton kernel {kernel!r} does not compile"
        f" with Triton {triton.__version__} ({type(error).__name__}: {lines[0] if lines else ''})."
        f" A simpler variant is used: same results, slower. {VARIANT_VARIABLE}=plain avoids this"
        " warning",
        stacklevel=2,
    )
