"""Which variant of a kernel a call takes, and what happens where one does not compile."""

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

# The forms that kernels have, each the most general first:
# plain     reads by pointers: runs on whatever Triton compiles for, and takes every call;
# tma       fetches tiles through the copy engine of Hopper GPUs (and newer, if asked for);
# tma_ws    has the compiler give warps of their own to fetching; for full blocks only;
# gluon     has warps of its own for fetching, and weights computed beside products;
# one_pass  adds to dQ where it computes dK and dV, in no fixed order.
# The last three have to be asked for, by the environment or by a table measured on the GPU.
KERNELS = tuned.VARIANTS
VARIANTS = tuple(dict.fromkeys(name for names in KERNELS.values() for name in names))

Result = TypeVar("Result")


class Call(Protocol):
    """What has to be known of a call, `launch.Problem` for one."""

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
        """What kernels are compiled for, device, dtype and head_dim apart."""

    def on_device(self) -> AbstractContextManager[object]:
        """A context in which Triton launches on the device of the tensors."""

    def tiles(self, kernel: str, variant: str, measured: TileConfig | None) -> TileConfig:
        """The measured tiles if there are some, else the shipped ones, fitted to the call."""


# Calls whose kernel compiled, calls whose kernel did not, and variants that were complained about.
_compiled: set[tuple[object, ...]] = set()
_broken: set[tuple[object, ...]] = set()
_warned: set[str] = set()


def first_that_compiles(
    kernel: str,
    call: Call,
    takes: Callable[[str], bool],
    run: Callable[[Choice], Result],
    choice: Choice | None,
) -> Result:
    """What the best variant returns that takes a call and compiles. All give the same result.

    That is the one of the GPU's measured table if there is one, else the one that fetches by the
    copy engine on a Hopper GPU, else the plain one. The environment variable
    DIFFATTN_TRITON_VARIANT names another one to try first, whatever the GPU.

    Args:
        kernel: of `KERNELS`.
        takes: whether a variant can do this call.
        run: does it.
        choice: the only thing to run, if given; then what its compiler raises is raised.

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
    *demanding, plain = choices(kernel, call)
    for best in demanding:
        compiled_for = (
            kernel,
            best.variant,
            call.device,
            call.dtype,
            call.head_dim,
            *call.compiled_for,
        )
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
    """Show what is written to the process's stderr meanwhile, unless a kernel does not compile.

    Then it is hundreds of lines of MLIR, for which there is a warning in one line.
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


def takes_any(variant: str) -> bool:
    """For kernels whose every form takes every call."""
    return True


def choices(kernel: str, call: Call) -> list[Choice]:
    """What to try for a call, the best first and "plain" last, whether or not it takes the call."""
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
        else:  # asked for a form that only another kernel has, or for none
            best = "tma" if "tma" in forms and (asked or is_hopper(call.device)) else "plain"
        found = []
        for variant in dict.fromkeys((best, "tma", "plain")):
            if variant in forms and (best != "plain" or variant == "plain"):
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
    # The compiler raises what its passes raise, RuntimeError mostly, as running out of memory does.
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
