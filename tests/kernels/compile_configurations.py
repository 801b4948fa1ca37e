"""Compiles every shipped Triton kernel for GPUs that need not be there, and prints what came out.

    python tests/kernels/compile_configurations.py [--arch 80 90 ...] [--all]

The launch code itself is run, on a driver that knows its target but cannot load a kernel: what is
compiled is what a launch would compile, with its tiles, its constants and its alignments. Exits
with 1 where a kernel does not compile, spills registers, or needs more shared memory than the chip
has.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from diffattn.blocks import FULL, PARTIAL, BlockLayout, layout_from_states
from diffattn.kernels.block_sparse import hopper
from diffattn.kernels.block_sparse.backward import backward
from diffattn.kernels.block_sparse.forward import forward

# Shared memory that one block of threads can have, in bytes.
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
DEFAULT_ARCHITECTURES = (80, 90, 100)
HEADS = 2
BLOCKS_PER_SIDE = 2


@dataclass(frozen=True)
class Case:
    """Arguments of a call.

    Attributes:
        ragged: whether the last block is short.
    """

    head_dim: int
    dtype: torch.dtype
    block_q: int = 128
    block_kv: int = 128
    partial: bool = True
    ragged: bool = True
    key_mask: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("partial", "ragged", "key_mask") if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"d{self.head_dim} {dtype} {self.block_q}x{self.block_kv} {' '.join(flags)}"

    def layout(self) -> BlockLayout:
        states = torch.full((BLOCKS_PER_SIDE, BLOCKS_PER_SIDE), FULL, dtype=torch.uint8)
        if self.partial:
            states[0, 1] = PARTIAL
        tokens = [BLOCKS_PER_SIDE * n - 5 * self.ragged for n in (self.block_q, self.block_kv)]

        def bits(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
            return torch.eye(self.block_q, self.block_kv, dtype=torch.bool).expand(len(row), -1, -1)

        return layout_from_states(
            states, bits, tokens_q=tokens[0], tokens_kv=tokens[1],
            block_q=self.block_q, block_kv=self.block_kv,
        )  # fmt: skip


# Every entry of the tables of tiles for 16-bit inputs, with and without what needs a mask.
ENTRIES = (
    *(Case(head_dim, torch.bfloat16) for head_dim in (64, 128, 256)),
    *(Case(head_dim, torch.float16, key_mask=True) for head_dim in (64, 128, 256)),
)
# Every other constant that a kernel is compiled for.
CONSTANTS = (
    *(Case(head_dim, torch.bfloat16, 64, 64) for head_dim in (64, 128)),
    *(Case(head_dim, torch.bfloat16, partial=False) for head_dim in (64, 128, 256)),
    Case(80, torch.bfloat16),
    Case(128, torch.bfloat16, partial=False, ragged=False),
    Case(128, torch.bfloat16, 256, 64, partial=False),
    Case(32, torch.bfloat16, 16, 256),
)
# One table of tiles for all chips, and no matrix units: slow to compile.
FLOAT32 = (
    *(Case(head_dim, torch.float32) for head_dim in (64, 128, 256)),
    *(Case(head_dim, torch.float32, key_mask=True) for head_dim in (64, 128, 256)),
)


def cases(arch: int, everything: bool) -> tuple[Case, ...]:
    """What to compile for an architecture: by default nothing twice that is alike on another."""
    if everything or arch == 80:
        return ENTRIES + CONSTANTS + FLOAT32
    return ENTRIES + CONSTANTS if arch == 90 else ENTRIES


def launches(case: Case, arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch that a call of this kind can lead to, forward by each variant, and backward."""
    layout = case.layout()
    q = torch.zeros(1, layout.tokens_q, HEADS, case.head_dim, dtype=case.dtype)
    k, v = (q.new_zeros(1, layout.tokens_kv, HEADS, case.head_dim) for _ in range(2))
    key_mask = torch.ones(k.shape[:2], dtype=torch.bool) if case.key_mask else None
    options: dict[str, Any] = {
        "block_q": case.block_q, "block_kv": case.block_kv, "scale": case.head_dim**-0.5,
    }  # fmt: skip
    everything = (q, k, v, layout.tensors, key_mask)
    yield "forward", lambda: forward(*everything, **options)
    lse = q.new_zeros(1, HEADS, layout.tokens_q, dtype=torch.float32)
    yield (
        "backward",
        lambda: backward(q, None, q, k, v, q, lse, layout.tensors, key_mask, **options),
    )
    if arch == 90 and hopper.tma_takes(q, k, v, **options):
        yield "forward tma", lambda: hopper.forward_tma(*everything, **options)
    if arch == 90 and hopper.warp_specialized_takes(*everything, **options):
        yield "forward tma_ws", lambda: hopper.forward_warp_specialized(*everything, **options)


@dataclass(frozen=True)
class Resources:
    """What a kernel needs: registers and bytes of stack per thread, bytes of shared memory."""

    warps: int
    registers: int
    stack: int
    shared: int


class CompileOnlyDriver:
    """Stands in for a GPU's driver up to the point where a kernel would be loaded."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept per device: one device per architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compiled_by(launch: Callable[[], object], arch: int) -> list[Any]:
    """The kernels that `launch` would have started."""
    kernels: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, warmup=True, **kwargs))
        return kernels[-1]

    triton.runtime.driver.set_active(CompileOnlyDriver(arch))
    triton.JITFunction.run = compile_only
    try:
        launch()
    finally:
        triton.JITFunction.run = run
    return kernels


def resources(kernel: Any, arch: int) -> Resources:
    """Ask the binary itself. Our kernels keep no arrays: a stack is for spilled registers only."""
    cuobjdump = Path(get_ptxas(arch).path).with_name("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return Resources(
        warps=kernel.metadata.num_warps,
        registers=int(registers),
        stack=int(stack),
        shared=kernel.metadata.shared,
    )


def check(arch: int, everything: bool = False) -> tuple[int, list[str]]:
    """Compile everything for one architecture; how many kernels there were, and what is wrong."""
    return examine(
        arch,
        (
            (name, str(case), launch)
            for case in cases(arch, everything)
            for name, launch in launches(case, arch)
        ),
    )


def examine(
    arch: int, calls: Iterable[tuple[str, str, Callable[[], object]]]
) -> tuple[int, list[str]]:
    """`check` for other kernels: what is launched, with what, and what launches it."""
    problems: list[str] = []
    seen: set[str] = set()
    for name, case, launch in calls:
        label = f"sm_{arch} {name:<16} {case:<42}"
        try:
            kernels = compiled_by(launch, arch)
        except Exception as error:
            print(f"{label} {type(error).__name__}")
            problems.append(f"{label}: {type(error).__name__}: {error}")
            continue
        for kernel in kernels:
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            needs = resources(kernel, arch)
            line = (
                f"{label} {kernel.metadata.name:<28} warps {needs.warps:>2}"
                f" regs {needs.registers:>3} stack {needs.stack:>4} B"
                f" smem {needs.shared / 1024:>5.1f} KiB"
            )
            print(line, flush=True)
            if name.endswith("_ws") and needs.warps == 4:
                problems.append(f"{line}: the compiler did not specialize warps")
            if needs.stack:
                problems.append(f"{line}: has a stack, of spilled registers")
            if needs.shared > SHARED_MEMORY[arch]:
                problems.append(f"{line}: the chip has {SHARED_MEMORY[arch] // 1024} KiB")
    return len(seen), problems


def main(check: Callable[[int, bool], tuple[int, list[str]]] = check) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=SHARED_MEMORY, default=DEFAULT_ARCHITECTURES
    )
    parser.add_argument("--all", action="store_true", help="every case on every architecture")
    arguments = parser.parse_args()
    problems = []
    for arch in arguments.arch:
        count, found = check(arch, arguments.all)
        problems += found
        print(f"sm_{arch}: {count} kernels with Triton {triton.__version__}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
