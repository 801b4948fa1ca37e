"""The matrix products of a loop, and their shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .sass import Instruction, Loop, innermost, loops

WGMMA, MMA_SYNC, TCGEN05 = "HGMMA", "HMMA", "UTCHMMA"
_KINDS = (WGMMA, MMA_SYNC, TCGEN05)
_WARPS_OF_WGMMA = 4
_FLOAT32 = ("FFMA", "FFMA2")
_MANY = 64
_TF32 = 2  # as the format of tcgen05's inputs


@dataclass(frozen=True)
class Product:
    """What one matrix instruction multiplies: (m, k) by (k, n).

    Attributes:
        kind: HGMMA (wgmma, by four warps), HMMA (mma.sync, by one) or UTCHMMA (tcgen05, by the
            whole program).
        from_registers: whether its first operand is not in shared memory, but in registers or
            tensor memory.
    """

    kind: str
    m: int
    n: int
    k: int
    from_registers: bool

    def macs(self, warps: int) -> int:
        """Multiplications, if each of a number of warps executes the instruction."""
        copies = {WGMMA: warps // _WARPS_OF_WGMMA, MMA_SYNC: warps, TCGEN05: 1}[self.kind]
        return self.m * self.n * self.k * copies

    @property
    def half_rate(self) -> bool:
        """Whether the tensor cores take twice as long: for TF32, 8 deep where 16 bits are 16."""
        return self.k < 16

    def __str__(self) -> str:
        if self.kind == MMA_SYNC:
            return f"m{self.m}n{self.n}k{self.k}"
        return f"m{self.m}n{self.n}{'RS' if self.from_registers else 'SS'}"


def is_product(instruction: Instruction) -> bool:
    return instruction.kind in _KINDS


def product_of(instruction: Instruction, before: Sequence[Instruction] = ()) -> Product:
    """The shape of a matrix instruction.

    Args:
        before: earlier instructions of the kernel; for tcgen05 one of them sets the shape.
    """
    if instruction.kind == WGMMA:
        m, n, k = (int(x) for x in instruction.opcode.split(".")[1].split("x"))
        _, first, *_ = instruction.operands.split(",")
        return Product(WGMMA, m, n, k, not first.strip().startswith("gdesc"))
    if instruction.kind == MMA_SYNC:
        shape = instruction.opcode.split(".")[1]  # "16816", "1688"
        return Product(MMA_SYNC, 16, 8, int(shape[3:]), True)
    return _tcgen05(instruction, before)


def _tcgen05(instruction: Instruction, before: Sequence[Instruction]) -> Product:
    """A product whose shape, the PTX manual's descriptor, is in a register set shortly before."""
    (register,) = re.findall(r"idesc\[(UR\d+)\]", instruction.operands)
    for x in reversed(before):
        if x.opcode == "UMOV" and x.operands.startswith(f"{register}, 0x"):
            bits = int(x.operands.split("0x")[1], 16)
            break
    else:
        raise ValueError(f"the shape of a tcgen05 product is not set to a constant: {instruction}")
    return Product(
        kind=TCGEN05,
        m=(bits >> 24 & 0x1F) * 16,
        n=(bits >> 17 & 0x3F) * 8,
        k=8 if bits >> 7 & 0x7 == _TF32 else 16,
        from_registers=instruction.operands.startswith("tmem"),
    )


def hot_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Innermost loops with matrix products, in the order of the code.

    If the products are in no loop, the whole kernel is the only loop. A kernel without matrix
    products, as in float32, has the innermost loops with many float32 multiplications.
    """
    every = loops(instructions)
    if any(map(is_product, instructions)):
        found = innermost([x for x in every if any(map(is_product, x))])
        return found or [tuple(instructions)]
    return innermost([x for x in every if sum(y.kind in _FLOAT32 for y in x) >= _MANY])


def products_of(loop: Loop, kernel: Sequence[Instruction]) -> list[Product]:
    """The products of a loop of a kernel, in order."""
    index = {x.address: i for i, x in enumerate(kernel)}
    return [product_of(x, kernel[: index[x.address]]) for x in loop if is_product(x)]


def shapes(products: Iterable[Product]) -> str:
    """Counts and shapes of products: "8 m64n64SS, 4 m64n128RS"."""
    return ", ".join(f"{count} {shape}" for shape, count in Counter(map(str, products)).items())
