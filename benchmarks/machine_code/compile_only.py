"""Compiles the kernels of a launch on a machine without the GPU.

The launch code itself runs, on a driver that knows its target but cannot load a kernel. The
compiled kernels have the tiles, the constants and the alignments of a real launch. Works with
Triton 3.6 to 3.9. A process that interprets kernels (TRITON_INTERPRET) cannot compile them.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from diffattn.kernels.common import variants

_ELF_SECTIONS_AT = 0x28
_ELF_COUNTS_AT = 0x3C
_DEFAULT_WARPS = 4  # Triton's
_SECTION = struct.Struct("<IIQQQQIIQQ")


@dataclass(frozen=True)
class Compiled:
    """A kernel as the GPU gets it.

    Attributes:
        name: of the Python function.
        arch: 80, 90, 100.
        constants: compile-time arguments by name.
        warps: per program, with those that a warp-specialized kernel adds to `launched_warps`.
        registers: per thread.
        shared: bytes per program.
        code: machine instructions.
        serialized: codes of the assembler's remarks that it runs wgmma products one after the
            other: C7511 and C7512 for want of registers, C7514 and C7515 for other instructions
            that write an accumulator while a product does.
    """

    name: str
    arch: int
    constants: dict[str, Any]
    warps: int
    launched_warps: int
    registers: int
    shared: int
    code: bytes
    serialized: tuple[str, ...]


class _Driver:
    """Stands in for a GPU's driver up to the point where a kernel would be loaded."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept per device: one device per architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compiled_by(launch: Callable[[], object], arch: int) -> list[Compiled]:
    """The kernels that `launch` would start on a GPU, each as often as `launch` starts it.

    The kernels are kept in a folder of their own in Triton's cache, because the assembler's log is
    kept with each kernel.
    """
    started: list[tuple[Any, dict[str, Any]]] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, warmup=True, **kwargs)
        started.append((kernel, kwargs))
        return kernel

    triton.runtime.driver.set_active(_Driver(arch))
    variants._found.clear()  # what was chosen for the chip of the launch before
    triton.JITFunction.run = compile_only
    try:
        with knobs.cache.scope(), knobs.runtime.scope(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")
            knobs.cache.dir = str(Path(knobs.cache.dir) / "with_ptxas_log")
            knobs.runtime.add_stages_inspection_hook = _keep_log
            launch()
    finally:
        triton.JITFunction.run = run
    return [_read(kernel, arguments, arch) for kernel, arguments in started]


def _keep_log(*arguments: Any) -> tuple[str, str] | None:
    """Triton's hook into its stages: the assembler's log goes into a kernel's metadata.

    Without arguments Triton asks for a key that tells the hook's kernels from other kernels.
    """
    if not arguments:
        return "with_ptxas_log", "with_ptxas_log"
    _, stages, *_ = arguments
    assemble = stages["cubin"]

    def assemble_and_keep(source: Any, metadata: dict[str, Any]) -> Any:
        with knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as log:
            knobs.nvidia.dump_ptxas_log = True
            binary = assemble(source, metadata)
        metadata["ptxas_log"] = log.getvalue()
        return binary

    stages["cubin"] = assemble_and_keep
    return None


def _read(kernel: Any, arguments: dict[str, Any], arch: int) -> Compiled:
    log = kernel.metadata.ptxas_log
    return Compiled(
        name=kernel.metadata.name,
        arch=arch,
        constants={name: value for name, value in arguments.items() if name.isupper()},
        warps=kernel.metadata.num_warps,
        launched_warps=arguments.get("num_warps", _DEFAULT_WARPS),
        registers=int(re.findall(r"Used (\d+) registers", log)[0]),
        shared=kernel.metadata.shared,
        code=_instructions(kernel.asm["cubin"], kernel.metadata.name),
        serialized=tuple(re.findall(r"\((C\d+)\)[^\n]*wgmma[^\n]* serialized", log)),
    )


def _instructions(cubin: bytes, name: str) -> bytes:
    """The section of an ELF file that has a kernel's instructions."""
    (first,) = struct.unpack_from("<Q", cubin, _ELF_SECTIONS_AT)
    count, names = struct.unpack_from("<HH", cubin, _ELF_COUNTS_AT)
    sections = [_SECTION.unpack_from(cubin, first + i * _SECTION.size) for i in range(count)]
    text = sections[names][4]
    for at, _, _, _, offset, size, *_ in sections:
        end = cubin.index(b"\0", text + at)
        if cubin[text + at : end].decode() == f".text.{name}":
            return cubin[offset : offset + size]
    raise ValueError(f"the compiled kernel {name!r} has no instructions")
