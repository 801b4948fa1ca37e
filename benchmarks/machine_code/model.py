"""An estimate of the share of a GPU's tensor cores that a loop uses.

The model is of one quarter of a multiprocessor, which has tensor cores of its own. It is a guide
for choosing between variants of a kernel, not a prediction. Others have measured similar kernels on
an H100: there the model is 8 to 12 % too kind, after a common factor of 0.85. The model knows
neither L2 nor memory.

For wgmma the model walks through the loop in the order of the code. Instructions between a product
and the wait for it are hidden behind the product, up to the time that the product takes; all other
instructions are added. For mma.sync and tcgen05 the share is an upper bound: the model lets all
pipes overlap.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .products import WGMMA, Product, product_of
from .sass import Instruction, Loop

QUARTERS = 4
# Cycles: of a wait for products, of a barrier of warps, and of a wait for a copy.
PRODUCT_WAIT, BARRIER, COPY_WAIT = 60, 25, 20
# Reading shared memory takes a wgmma a cycle per 4 columns of its second operand, and 16 cycles for
# a first operand that is not in registers. These reads limit short products.
_COLUMNS_PER_CYCLE, _FIRST_OPERAND = 4, 16
_REGISTERS, _REGISTER_UNIT = 65536, 256
_SHARED_RESERVED = 1024  # bytes, by the driver, per program


@dataclass(frozen=True)
class Chip:
    """A multiprocessor.

    Attributes:
        macs: multiplications of 16-bit numbers per cycle in its tensor cores.
        float32: cycles of a warp's float32 instruction in one quarter.
        shared: bytes of shared memory; one program can have `shared_per_program` of them.
        max_warps: warps resident at a time.
    """

    macs: int
    float32: int
    shared: int
    shared_per_program: int
    max_warps: int = 64


CHIPS = {
    80: Chip(1024, 2, 164 * 1024, 163 * 1024),
    86: Chip(512, 1, 100 * 1024, 99 * 1024, max_warps=48),
    89: Chip(512, 1, 100 * 1024, 99 * 1024, max_warps=48),
    90: Chip(2048, 1, 228 * 1024, 227 * 1024),
    100: Chip(4096, 1, 228 * 1024, 227 * 1024),
    120: Chip(512, 1, 100 * 1024, 99 * 1024, max_warps=48),
}

_FLOAT32 = ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2")
# Integer and logic, comparisons, selections and conversions: half a warp per cycle.
_HALF_RATE = frozenset({
    "FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "F2FP", "IMAD", "IADD3", "IADD", "LOP3", "SHF",
    "LEA", "SEL", "ISETP", "PRMT", "MOV", "IMNMX", "VIADD", "VIMNMX", "VIADDMNMX", "LOP", "PLOP3",
    "IABS", "SGXT", "POPC", "FLO", "BMSK", "CS2R", "P2R", "R2P",
})  # fmt: skip
_ARITHMETIC = (*_FLOAT32, "FMNMX", "FMNMX3", "FSEL", "FSETP", "F2FP", "HADD2", "HMUL2", "HFMA2")


@dataclass(frozen=True)
class Estimate:
    """An estimate for one iteration of a loop.

    Attributes:
        cycles: of one quarter of a multiprocessor, per program.
        share: useful share of the tensor cores' cycles.
        exposed: instructions that no product hides, by kind; None where the model lets all overlap.
    """

    cycles: float
    share: float
    exposed: Counter[str] | None


def arithmetic(kinds: Counter[str]) -> int:
    """Instructions that compute with scores."""
    return sum(kinds[kind] for kind in _ARITHMETIC)


def programs_per_multiprocessor(chip: Chip, registers: int, warps: int, shared: int) -> int:
    """Number of programs that fit on a multiprocessor at a time."""
    per_warp = math.ceil(registers * 32 / _REGISTER_UNIT) * _REGISTER_UNIT
    return min(
        _REGISTERS // (per_warp * warps),
        chip.shared // (shared + _SHARED_RESERVED),
        chip.max_warps // warps,
    )


def ideal_cycles(macs: int, chip: Chip) -> float:
    """Cycles of the tensor cores for 16-bit multiplications of one program."""
    return macs / chip.macs


def estimate(
    loop: Loop, products: Sequence[Product], macs: int, chip: Chip, *, warps: int, copies: int
) -> Estimate:
    """The share of the tensor cores for one loop.

    Args:
        products: the products of the loop.
        macs: useful multiplications per iteration of these warps.
        warps: number of warps that execute the loop together: of a program, or of a group.
        copies: how many such groups of warps a multiprocessor has at a time.
    """
    per_quarter = warps / QUARTERS
    useful = ideal_cycles(macs, chip) * (2 if products[0].half_rate else 1)
    exposed: Counter[str] | None
    if any(product.kind == WGMMA for product in products):
        cycles, exposed = _walk(loop, per_quarter)
        cycles = _together(cycles, _bound(loop, products, chip, per_quarter), products, copies,
                           per_quarter)  # fmt: skip
    else:
        cycles, exposed = _bound(loop, products, chip, per_quarter), None
    return Estimate(cycles, useful / cycles, exposed)


def product_cycles(product: Product) -> float:
    """Cycles of a wgmma in the tensor cores of a quarter, for 16-bit inputs with k = 16."""
    reading = product.n / _COLUMNS_PER_CYCLE + (0 if product.from_registers else _FIRST_OPERAND)
    return max(product.n / 2, reading)


def _walk(loop: Loop, per_quarter: float) -> tuple[float, Counter[str]]:
    """Cycles of an iteration by itself, and unhidden instructions, once the loop is under way."""
    groups: list[float] = []  # cycles left of the products that are under way, oldest first
    for _ in range(3):
        cycles = 0.0
        work: Counter[str] = Counter()
        exposed: Counter[str] = Counter()
        unfinished = 0.0  # of a group whose last product has not been seen
        for x in loop:
            if x.kind == WGMMA:
                if not groups and not unfinished:
                    cycles += _issue_cycles(work, per_quarter)
                    work.clear()
                unfinished += product_cycles(product_of(x)) * per_quarter
                work[x.kind] += 1
                if "gsb0" in x.operands:
                    groups.append(unfinished)
                    unfinished = 0.0
            elif x.opcode.startswith("WARPGROUP.DEPBAR"):
                waited = len(groups) - int(x.operands.split("0x")[1], 16)
                spent = max(sum(groups[:waited]), _issue_cycles(work, per_quarter))
                cycles += spent + PRODUCT_WAIT
                groups = _after(groups, spent)
                work.clear()
            else:
                work[x.kind] += 1
                cycles += _fixed_cycles(x)
                if not groups and not unfinished:
                    exposed[x.kind] += 1
        rest = _issue_cycles(work, per_quarter)
        cycles += rest
        groups = _after(groups, rest)
    return cycles, exposed


def _after(groups: Iterable[float], cycles: float) -> list[float]:
    """Products under way, some cycles later."""
    left = []
    for group in groups:
        spent = min(group, cycles)
        cycles -= spent
        if group > spent:
            left.append(group - spent)
    return left


def _fixed_cycles(x: Instruction) -> int:
    if x.kind == "BAR":
        return BARRIER
    return COPY_WAIT if x.kind == "SYNCS" and "PHASECHK" in x.opcode else 0


def _issue_cycles(work: Counter[str], per_quarter: float, float32: int = 1) -> float:
    """Cycles in which a quarter's warps can issue some instructions: those of the slowest pipe."""
    half_rate = sum(count for kind, count in work.items() if kind in _HALF_RATE)
    multiplied = sum(work[kind] for kind in _FLOAT32)
    return per_quarter * max(work.total(), 8 * work["MUFU"], 2 * half_rate, float32 * multiplied)


def _bound(loop: Loop, products: Sequence[Product], chip: Chip, per_quarter: float) -> float:
    """Cycles of an iteration if everything overlaps."""
    work = Counter(x.kind for x in loop)
    issue = _issue_cycles(work, per_quarter, chip.float32)
    return max(
        issue, _tensor_cycles(products, chip, per_quarter), _shared_cycles(loop, per_quarter)
    )


def _tensor_cycles(products: Sequence[Product], chip: Chip, per_quarter: float) -> float:
    if any(product.kind == WGMMA for product in products):
        return sum(map(product_cycles, products)) * per_quarter
    warps = round(per_quarter * QUARTERS)
    macs = sum(x.macs(warps) * (2 if x.half_rate else 1) for x in products)
    return ideal_cycles(macs, chip)


def _shared_cycles(loop: Loop, per_quarter: float) -> float:
    """Cycles of shared memory for the operands of mma.sync: 128 bytes a cycle for all quarters."""
    matrices = sum(int(x.opcode[-1]) for x in loop if x.kind == "LDSM" and x.opcode[-1].isdigit())
    return matrices * per_quarter * QUARTERS


def _together(
    alone: float, bound: float, products: Sequence[Product], copies: int, per_quarter: float
) -> float:
    """Cycles per iteration of each of several copies that share a multiprocessor.

    One copy works while another waits. The result is the mean of the best that this can bring, and
    of no gain.
    """
    if copies == 1:
        return alone
    best = max(copies * bound, alone)
    return max(best, (best + copies * alone) / 2) / copies
