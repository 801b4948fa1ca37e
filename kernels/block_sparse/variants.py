"""Which form of the forward kernel a call takes, and what happens where one does not compile."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterator
from typing import TypedDict

import torch
import triton.compiler
from triton.runtime.errors import OutOfResources

from ..checks import LayoutTensors
from .forward import forward as plain_forward
from .hopper import forward_tma, forward_warp_specialized, tma_takes, warp_specialized_takes

VARIANT_VARIABLE = "DIFFATTN_TRITON_VARIANT"

# Each asks more of the GPU and of the call than the one before it:
# plain    runs on whatever Triton compiles for, and takes every call;
# tma      fetches tiles through the copy engine of Hopper GPUs (and newer, if asked for);
# tma_ws   has warps of its own for that; for layouts without partial blocks.
VARIANTS = ("plain", "tma", "tma_ws")

# Calls whose kernel did not compile, and variants that were complained about.
_broken: set[tuple[object, ...]] = set()
_warned: set[str] = set()


class _Options(TypedDict):
    block_q: int
    block_kv: int
    scale: float


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp by the best variant that takes the call and compiles.

    That is one of the Hopper variants on a Hopper GPU and the plain one elsewhere. The environment
    variable DIFFATTN_TRITON_VARIANT names the most demanding variant to use instead, whatever the
    GPU; a call that it does not take goes to a less demanding one. All give the same result.

    Raises:
        ValueError: if DIFFATTN_TRITON_VARIANT is not a variant.
    """
    options = _Options(block_q=block_q, block_kv=block_kv, scale=scale)
    for name in variants_of(q, k, v, layout, key_mask, **options):
        compiled_for = (name, q.device, q.dtype, q.shape[-1], block_q, block_kv)
        if compiled_for in _broken:
            continue
        run = forward_tma if name == "tma" else forward_warp_specialized
        try:
            return run(q, k, v, layout, key_mask, **options)
        except Exception as error:
            if not _is_compile_failure(error):
                raise
            _broken.add(compiled_for)
            _warn(name, error)
    return plain_forward(q, k, v, layout, key_mask, **options)


def variants_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
) -> Iterator[str]:
    """Names of the variants that take a call, most demanding first, without "plain"."""
    allowed = VARIANTS.index(_most_demanding(q.device))
    options = _Options(block_q=block_q, block_kv=block_kv, scale=scale)
    if allowed >= 2 and warp_specialized_takes(q, k, v, layout, key_mask, **options):
        yield "tma_ws"
    if allowed >= 1 and tma_takes(q, k, v, **options):
        yield "tma"


def _most_demanding(device: torch.device) -> str:
    asked = os.environ.get(VARIANT_VARIABLE)
    if asked:
        if asked not in VARIANTS:
            raise ValueError(f"{VARIANT_VARIABLE} is {asked!r}; choose from {', '.join(VARIANTS)}")
        return asked
    return "tma_ws" if _is_hopper(device) else "plain"


def _is_hopper(device: torch.device) -> bool:
    # ROCm's GPUs are "cuda" to torch, with capabilities of their own numbering.
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) == (9, 0)
    )


def _is_compile_failure(error: Exception) -> bool:
    """Whether Triton could not compile a kernel, or made one that does not fit on the GPU."""
    if isinstance(error, OutOfResources):
        return True
    # The compiler raises what its passes raise, RuntimeError mostly, as running out of memory does.
    compile_kernel = triton.compiler.compile.__code__
    return any(
        frame.f_code is compile_kernel for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _warn(name: str, error: Exception) -> None:
    if name in _warned:
        return
    _warned.add(name)
    lines = str(error).strip().splitlines()
    warnings.warn(
        f"the {name!r} variant of the block-sparse Triton kernel does not compile with Triton"
        f" {triton.__version__} ({type(error).__name__}: {lines[0] if lines else ''}). A simpler"
        f" variant is used: same results, slower. {VARIANT_VARIABLE}=plain avoids this warning",
        stacklevel=2,
    )
