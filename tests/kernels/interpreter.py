"""Triton's interpreter with what is broken in it put right.

It keeps bfloat16 as its bits in uint16, multiplies those bits as integers in `tl.dot`, and
truncates where the hardware rounds to nearest even (Triton 3.6 and 3.9). Loads, stores and `where`
are right as they are; the kernels do all other arithmetic in float32. And Triton 3.6 takes a number
from an array of one element as numpy 2.5 no longer allows. It has no additions by a descriptor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_NUMPY = {tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make casts to and from bfloat16, and products of it, what a GPU makes of them."""
    cast, to_fp, dot = (
        getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot")
    )

    def cast_impl(self: Any, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        return _cast(src, dst_type) if _is_ours(src, dst_type) else cast(self, src, dst_type)

    def create_fp_to_fp(
        self: Any, src: TensorHandle, dst_type: tl.dtype, rounding: Any
    ) -> TensorHandle:
        if _is_ours(src, dst_type):
            return _cast(src, dst_type)
        return to_fp(self, src, dst_type, rounding)

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any
    ) -> TensorHandle:
        # Products of two bfloat16 are exact in float32.
        a, b = (_cast(x, tl.float32) if _is_ours(x, tl.float32) else x for x in (a, b))
        return dot(self, a, b, d, *options)

    def create_descriptor_reduce(
        self: Any, kind: Any, descriptor: Any, value: TensorHandle, places: list[TensorHandle]
    ) -> None:
        assert kind == ir.DESCRIPTOR_REDUCE_KIND.ADD
        pointers, mask = descriptor.materialize_pointers(places)
        self.create_atomic_rmw(
            ir.ATOMIC_OP.FADD, pointers, value, mask, ir.MEM_SEMANTIC.RELAXED,
            ir.MEM_SYNC_SCOPE.GPU,
        )  # fmt: skip

    monkeypatch.setattr(
        InterpreterBuilder, "create_descriptor_reduce", create_descriptor_reduce, raising=False
    )
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type[tl.tensor], scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)


def _is_ours(src: TensorHandle, dst_type: tl.dtype) -> bool:
    found, wanted = src.dtype.scalar, dst_type.scalar
    return (found == tl.bfloat16 and wanted in _NUMPY) or (
        wanted == tl.bfloat16 and found in _NUMPY
    )


def _cast(src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    wanted = dst_type.scalar
    if wanted == tl.bfloat16:
        rounded = torch.tensor(src.data).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), wanted)
    values = (src.data.astype(np.uint32) << 16).view(np.float32)
    return TensorHandle(values.astype(_NUMPY[wanted]), wanted)
