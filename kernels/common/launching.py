"""Launches of Triton kernels whose compiled form an earlier launch has found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

_RUN = triton.JITFunction.run

# Other makers' backends specialise kernels on more than values, dtypes and alignments.
_NVIDIA = torch.version.hip is None and getattr(torch.version, "xpu", None) is None

# Compiled kernels and the constants in the order of their signatures, by `_kind`.
_compiled: dict[tuple[object, ...], tuple[CompiledKernel, tuple[object, ...]]] = {}
_MOST_COMPILED = 1024


def launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[Any],
    numbers: tuple[int, ...],
    floats: tuple[float, ...] = (),
    **constants: Any,
) -> None:
    """`kernel[(programs,)](*tensors, *numbers, *floats, **constants)`, sooner a second time.

    Triton finds the compiled kernel of a launch by what kernels are specialised on: dtypes,
    alignments, divisibility of numbers. That takes the host 40 us. A launch of the same kind as an
    earlier one takes the compiled kernel of that launch: its numbers, constants, dtypes and
    alignments are equal, and so is whatever Triton makes of them.

    Args:
        kernel: a function of `triton.jit`, whose arguments come in this order.
        programs: the number of programs.
        tensors: tensors and descriptors.
        numbers: integers.
        floats: numbers on whose values no kernel is specialised.
        constants: compile-time arguments and options of the compiler.
    """
    if not _NVIDIA or getattr(type(kernel), "run", None) is not _RUN or kernel.pre_run_hooks:
        kernel[(programs,)](*tensors, *numbers, *floats, **constants)
        return
    kind = _kind(kernel, tensors, numbers, constants)
    known = _compiled.get(kind)
    if known is not None:
        compiled, in_order = known
        compiled[(programs, 1, 1)](*tensors, *numbers, *floats, *in_order)
        return
    compiled = kernel[(programs,)](*tensors, *numbers, *floats, **constants)
    if isinstance(compiled, CompiledKernel):
        positional = len(tensors) + len(numbers) + len(floats)
        in_order = tuple(constants[name] for name in kernel.arg_names[positional:])
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[kind] = compiled, in_order


def _kind(
    kernel: Any, tensors: Sequence[Any], numbers: tuple[int, ...], constants: dict[str, Any]
) -> tuple[object, ...]:
    kinds: list[object] = []
    for x in tensors:
        if isinstance(x, torch.Tensor):
            kinds += x.dtype, x.data_ptr() % 16
        else:
            kinds += type(x), x.base.dtype, *x.shape, *x.strides, *x.block_shape
            kinds.append(getattr(x, "layout", None))
    return (
        kernel.fn,
        triton.runtime.driver.active.get_current_device(),
        triton.knobs.runtime.debug,
        triton.knobs.compilation.instrumentation_mode,
        numbers,
        tuple(constants),
        tuple(constants.values()),
        *kinds,
    )
