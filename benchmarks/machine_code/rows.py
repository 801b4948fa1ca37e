"""The rows of the table: kernels, and the loops of each kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .compile_only import Compiled, compiled_by
from .launches import Launch, Tile
from .model import CHIPS, arithmetic, estimate, programs_per_multiprocessor
from .products import hot_loops, products_of, shapes
from .sass import Instruction, Loop, disassemble

_WARPS_OF_GROUP = 4


@dataclass(frozen=True)
class LoopRow:
    """A loop with matrix products, per iteration and warp.

    Attributes:
        name: of the loop, by what it walks: "full" or "partial" blocks.
        tile: queries and keys.
        spilled: words of registers that are stored to memory and loaded again.
        exps, arithmetic: instructions of the softmax.
        products: matrix instructions by shape; empty where there are none, as in float32.
        duplicated: multiplications / multiplications that the tile needs.
        exposed_exps, exposed_arithmetic: instructions of the softmax that run while no product
            does; None where the kind of product does not tell.
        cycles: of a quarter of a multiprocessor.
        share: estimate of the useful share of the tensor cores' cycles.
    """

    name: str
    tile: str
    instructions: int
    spilled: int
    exps: int
    arithmetic: int
    products: str = ""
    duplicated: float | None = None
    exposed_exps: int | None = None
    exposed_arithmetic: int | None = None
    cycles: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class KernelRow:
    """A compiled kernel.

    Attributes:
        family, variant, case: of the launch.
        kernel: "forward", "queries", "keys"; the Triton function's name for one without products.
        shared: bytes per program.
        programs: number of programs that fit on a multiprocessor.
        spilled: words of registers outside of the loops.
        serialized: codes of the assembler's remarks that it runs products one after the other.
        missing_warps: whether the compiler did not add the warps of a specialized kernel.
        expected_loops: number of loops with products in the source.
    """

    arch: int
    family: str
    kernel: str
    variant: str
    case: str
    warps: int
    registers: int
    shared: int
    programs: int
    spilled: int
    serialized: tuple[str, ...]
    missing_warps: bool
    expected_loops: int
    loops: tuple[LoopRow, ...]


def rows_of(launches: Iterable[Launch], arch: int) -> tuple[list[KernelRow], list[str]]:
    """Compile launches for an architecture and read their kernels.

    Returns:
        The kernels, each once, and a line for each launch that does not compile.
    """
    kernels: dict[bytes, tuple[Launch, Compiled]] = {}
    failed: list[str] = []
    for launch in launches:
        try:
            for kernel in compiled_by(launch.run, arch):
                kernels.setdefault(kernel.code, (launch, kernel))
        except Exception as error:  # the compiler raises whatever its passes raise
            label = f"sm_{arch} {launch.family} {launch.variant} {launch.case}"
            failed.append(f"{label}: {type(error).__name__}: {error}")
    return read(list(kernels.values())), failed


def read(kernels: Sequence[tuple[Launch, Compiled]]) -> list[KernelRow]:
    """The rows of kernels, all for one architecture."""
    if not kernels:
        return []
    arch = kernels[0][1].arch
    listings = disassemble([kernel.code for _, kernel in kernels], arch)
    return [_row(*pair, listing) for pair, listing in zip(kernels, listings, strict=True)]


def _row(launch: Launch, kernel: Compiled, listing: Sequence[Instruction]) -> KernelRow:
    programs = programs_per_multiprocessor(
        CHIPS[kernel.arch], kernel.registers, kernel.warps, kernel.shared
    )
    work = launch.work(kernel.name, kernel.constants)
    found = hot_loops(listing) if work else []
    return KernelRow(
        arch=kernel.arch,
        family=launch.family,
        kernel=work.kernel if work else kernel.name.removesuffix("_kernel"),
        variant=launch.variant,
        case=launch.case,
        warps=kernel.warps,
        registers=kernel.registers,
        shared=kernel.shared,
        programs=programs,
        spilled=spilled_words(listing) - sum(map(spilled_words, found)),
        serialized=kernel.serialized,
        missing_warps=bool(work and work.groups > 1 and kernel.warps == kernel.launched_warps),
        expected_loops=len(work.tiles) * work.groups if work else 0,
        loops=tuple(
            _loop_row(loop, work.tiles[i % len(work.tiles)], work.groups, listing, kernel, programs)
            for i, loop in enumerate(found)
            if work
        ),
    )


def _loop_row(
    loop: Loop, tile: Tile, groups: int, listing: Sequence[Instruction], kernel: Compiled,
    programs: int,
) -> LoopRow:  # fmt: skip
    kinds = Counter(x.kind for x in loop)
    row = LoopRow(
        name=tile.loop,
        tile=tile.shape,
        instructions=len(loop),
        spilled=spilled_words(loop),
        exps=kinds["MUFU"],
        arithmetic=arithmetic(kinds),
    )
    products = products_of(loop, listing)
    if not products:
        return row
    warps = _WARPS_OF_GROUP if groups > 1 else kernel.warps
    written_out = len(loop) == len(listing)
    needed = tile.macs // groups * (tile.trips if written_out else 1)
    estimated = estimate(
        loop, products, needed, CHIPS[kernel.arch], warps=warps, copies=max(1, programs) * groups
    )
    exposed = estimated.exposed
    return replace(
        row,
        products=shapes(products),
        duplicated=sum(product.macs(warps) for product in products) / needed,
        exposed_exps=None if exposed is None else exposed["MUFU"],
        exposed_arithmetic=None if exposed is None else arithmetic(exposed),
        cycles=estimated.cycles,
        share=estimated.share,
    )


def spilled_words(instructions: Sequence[Instruction]) -> int:
    """Words of registers that are stored to a thread's memory or loaded from there.

    The kernels keep no arrays there: every such word is a spilled register.
    """
    return sum(_words(x) for x in instructions if x.kind in ("STL", "LDL"))


def _words(x: Instruction) -> int:
    return {"64": 2, "128": 4}.get(x.opcode.split(".")[-1], 1)
