"""What the table says of a kernel and of its loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .cases import Launch, Work
from .compile_only import Compiled, compiled_by
from .model import CHIPS, arithmetic, estimate, programs_per_multiprocessor
from .products import product_loops, products_of, shapes
from .sass import Instruction, Loop, disassemble

_WARPS_OF_GROUP = 4


@dataclass(frozen=True)
class LoopRow:
    """A loop with matrix products, per iteration and warp.

    Attributes:
        name: "full" or "partial", by the blocks that it walks.
        tile: queries and keys.
        products: matrix instructions by shape.
        duplicated: multiplications / those that the tile needs.
        spilled: words of registers that are stored to memory and loaded again.
        exps, arithmetic: instructions of the softmax; the exposed ones run while no product does
            (None: not known of this kind of product).
        cycles: of a quarter of a multiprocessor.
        share: estimate of the useful part of the tensor cores' cycles.
    """

    name: str
    tile: str
    instructions: int
    products: str
    duplicated: float
    spilled: int
    exps: int
    exposed_exps: int | None
    arithmetic: int
    exposed_arithmetic: int | None
    cycles: float
    share: float


@dataclass(frozen=True)
class KernelRow:
    """A compiled kernel.

    Attributes:
        kernel, variant, case: what was launched.
        function: the Triton function.
        shared: bytes per program.
        programs: that fit on a multiprocessor.
        spilled: words outside of the loops.
        serialized: codes of the assembler's remarks that it runs products one after the other.
        specialized: whether it has warps besides those that it was launched with.
    """

    arch: int
    kernel: str
    variant: str
    case: str
    function: str
    warps: int
    registers: int
    shared: int
    programs: int
    spilled: int
    serialized: tuple[str, ...]
    specialized: bool
    loops: tuple[LoopRow, ...]


def rows_of(launches: Sequence[Launch], arch: int) -> list[KernelRow]:
    """Compile launches for an architecture and read each kernel of theirs once.

    Raises:
        Exception: what the compiler raises.
    """
    return read(
        [(launch, kernel) for launch in launches for kernel in compiled_by(launch.run, arch)]
    )


def read(kernels: Sequence[tuple[Launch, Compiled]]) -> list[KernelRow]:
    """The rows of kernels for one architecture."""
    if not kernels:
        return []
    arch = kernels[0][1].arch
    listings = disassemble([kernel.code for _, kernel in kernels], arch)
    rows = [_row(*pair, listing) for pair, listing in zip(kernels, listings, strict=True)]
    return list(dict.fromkeys(rows))  # a kernel that a call starts twice is one of its kernels


def _row(launch: Launch, kernel: Compiled, listing: Sequence[Instruction]) -> KernelRow:
    chip = CHIPS[kernel.arch]
    programs = programs_per_multiprocessor(chip, kernel.registers, kernel.warps, kernel.shared)
    work = launch.work(kernel.name, kernel.constants)
    found = product_loops(listing) if work else []
    rows = tuple(
        _loop_row(index, loop, listing, kernel, work, max(1, programs), len(found))
        for index, loop in enumerate(found)
        if work
    )
    return KernelRow(
        arch=kernel.arch,
        kernel=launch.kernel,
        variant=launch.variant,
        case=launch.case,
        function=kernel.name,
        warps=kernel.warps,
        registers=kernel.registers,
        shared=kernel.shared,
        programs=programs,
        spilled=spilled_words(listing) - sum(map(spilled_words, found)),
        serialized=kernel.serialized,
        specialized=kernel.warps != kernel.launched_warps,
        loops=rows,
    )


def _loop_row(
    index: int, loop: Loop, listing: Sequence[Instruction], kernel: Compiled, work: Work,
    programs: int, count: int,
) -> LoopRow:  # fmt: skip
    tile = work.tiles[index % len(work.tiles)]
    products = products_of(loop, listing)
    groups = work.groups
    warps = _WARPS_OF_GROUP if groups > 1 else kernel.warps
    needed = tile.macs // groups
    kinds = Counter(x.kind for x in loop)
    estimated = estimate(
        loop, products, needed, CHIPS[kernel.arch], warps=warps, copies=programs * groups
    )
    exposed = estimated.exposed
    return LoopRow(
        name=tile.name,
        tile=tile.shape,
        instructions=len(loop),
        products=shapes(products),
        duplicated=sum(product.macs(warps) for product in products) / needed,
        spilled=spilled_words(loop),
        exps=kinds["MUFU"],
        exposed_exps=None if exposed is None else exposed["MUFU"],
        arithmetic=arithmetic(kinds),
        exposed_arithmetic=None if exposed is None else arithmetic(exposed),
        cycles=estimated.cycles,
        share=estimated.share,
    )


def spilled_words(instructions: Sequence[Instruction]) -> int:
    """Words of registers that are stored to a thread's memory or loaded from there.

    Kernels of ours keep no arrays there: what is stored has found no register.
    """
    return sum(_words(x) for x in instructions if x.kind in ("STL", "LDL"))


def _words(x: Instruction) -> int:
    return {"64": 2, "128": 4}.get(x.opcode.split(".")[-1], 1)
