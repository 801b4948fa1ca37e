"""The backends of attention: each computes a small call, and is compared with float64."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator

import torch

from diffattn import GNAAttn, TokenGrid, attention
from diffattn.kernels.reference import reference_attention
from diffattn.operator import BACKEND_VARIABLE, BACKENDS, asked_backend

from ..errors import one_line
from .findings import Check, Finding

_GRID = TokenGrid(2, 8, 12, text_after=5)
_METHOD = GNAAttn(window=(1, 5, 5))
# Largest error over the largest value, by dtype; a kernel that computes something else is off by 1.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.05}
_INTERPRET = "TRITON_INTERPRET"


def check_cpu() -> Iterator[Finding]:
    """The kernels for the CPU."""
    yield _tried("cpu", torch.device("cpu"), gradients=True)


def check_triton() -> Iterator[Finding]:
    """Triton's kernels: compiled and run on the GPU, if there is one."""
    device = _gpu()
    if os.environ.get(_INTERPRET) == "1":
        yield Finding(
            "warning" if device is not None else "ok",
            "triton",
            f"{_INTERPRET}=1: kernels are interpreted, thousands of times slower than compiled",
            f"unset {_INTERPRET}" if device is not None else "",
        )
        return
    if device is None:
        yield Finding("ok", "triton", "not used: there is no GPU")
        return
    yield _tried("triton", device, gradients=True)


def check_flex() -> Iterator[Finding]:
    """torch's FlexAttention, the second opinion, which is compiled when first used."""
    device = _gpu()
    if device is not None:
        yield _tried("flex", device, gradients=False)
        return
    compiler = os.environ.get("CXX") or next(
        filter(None, map(shutil.which, ("g++", "clang++"))), ""
    )
    if compiler and shutil.which(compiler):
        yield Finding("ok", "flex", f"compiled by {compiler} when it is first used")
    else:
        yield Finding(
            "warning",
            "flex",
            f"no C++ compiler{f' {compiler}' if compiler else ''}: backend 'flex' and torch.compile"
            f" do not work on the CPU",
            "install g++, or name a compiler in CXX",
        )


def check_choice() -> Iterator[Finding]:
    """The environment variable that chooses a backend."""
    try:
        asked = asked_backend()
    except ValueError as error:
        yield Finding("problem", BACKEND_VARIABLE, str(error), f"unset {BACKEND_VARIABLE}")
        return
    if asked is not None:
        yield Finding(
            "warning",
            BACKEND_VARIABLE,
            f"is set: every sparse attention is computed by {asked!r}",
            f"unset {BACKEND_VARIABLE} for the fastest backend of each device",
        )


def check_attaching() -> Iterator[Finding]:
    """The names of diffusers that attaching needs."""
    try:
        import diffattn.attach.attachment  # noqa: F401
    except Exception as error:
        yield Finding(
            "problem",
            "attaching",
            f"does not work with this diffusers: {type(error).__name__}: {one_line(error)[:200]}",
            "install a version of diffusers that diffattn was tested with, see `versions`",
        )
        return
    yield Finding("ok", "attaching", "diffusers has what attaching needs")


def _tried(backend: str, device: torch.device, *, gradients: bool) -> Finding:
    """Compute a small call and compare."""
    assert backend in BACKENDS
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    size = (1, _GRID.tokens, 2, 64)
    tensors = [torch.randn(size, generator=generator).to(device, dtype) for _ in range(4)]
    *qkv, grad = tensors
    mask = _METHOD.mask(_GRID)
    start = time.perf_counter()
    try:
        leaves = [x.clone().requires_grad_(gradients) for x in qkv]
        with torch.set_grad_enabled(gradients):
            out = attention(leaves[0], leaves[1], leaves[2], mask, backend=backend)
        found = [out.detach()]
        if gradients:
            found += torch.autograd.grad(out, leaves, grad)
        found = [x.double().cpu() for x in found]
    except Exception as error:  # compilers and drivers raise errors of many types
        return Finding(
            "problem",
            backend,
            f"fails on {device}: {type(error).__name__}: {one_line(error)[:300]}",
            "look at the versions and the driver above; --device cpu works without Triton"
            if backend != "cpu"
            else "install diffattn and torch anew",
        )
    seconds = time.perf_counter() - start
    truths = [x.double().cpu().requires_grad_(gradients) for x in qkv]
    out, _ = reference_attention(truths[0], truths[1], truths[2], mask.dense())
    expected = [out.detach()]
    if gradients:
        expected += torch.autograd.grad(out, truths, grad.double().cpu())
    off = max(relative_error(x, y) for x, y in zip(found, expected, strict=True))
    what = "output and gradients" if gradients else "output"
    if off > ALLOWED[dtype]:
        return Finding(
            "problem",
            backend,
            f"computes wrong numbers on {device}: the {what} is off by {off:.2g} of the largest"
            f" value, {ALLOWED[dtype]:g} is allowed",
            "do not use this backend; please report this with the output of diffattn doctor --json",
        )
    return Finding("ok", backend, f"{what} on {device}: right to {off:.1g}, after {seconds:.1f} s")


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error over the largest value; infinite for NaN."""
    error = float((found - truth).abs().max() / truth.abs().max())
    return error if error == error else float("inf")


def _gpu() -> torch.device | None:
    """The accelerator that Triton's kernels run on."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("xpu") if torch.xpu.is_available() else None


CHECKS: tuple[Check, ...] = (check_cpu, check_triton, check_flex, check_choice, check_attaching)
