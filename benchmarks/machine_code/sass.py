"""Machine instructions (SASS) and the loops in them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from triton.backends.nvidia.compiler import get_ptxas

# Machine code is for one architecture; wgmma and tcgen05 are in its "a" form.
_NAMES = {90: "SM90a", 100: "SM100a"}
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_JUMPS = ("BRA", "JMP")
_INDIRECT = ("BRX", "JMX")  # to an address in a register: what is printed is an offset
_ENDS = ("EXIT", "RET", "BPT")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: bytes from the kernel's first instruction.
        predicate: condition of its execution; empty if there is none.
        opcode: with its modifiers: "MUFU.EX2".
        operands: as the disassembler prints them.
    """

    address: int
    predicate: str
    opcode: str
    operands: str

    @cached_property
    def kind(self) -> str:
        """The opcode without modifiers: "MUFU"."""
        return self.opcode.split(".")[0]

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or "UP" in self.operands

    @property
    def target(self) -> int | None:
        """Where a branch goes, if that is a constant."""
        if self.kind not in _JUMPS:
            return None
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if found else None


Loop = tuple[Instruction, ...]


def disassemble(codes: Sequence[bytes], arch: int) -> list[list[Instruction]]:
    """The instructions of kernels for one architecture, kernel by kernel.

    One run of the disassembler reads all kernels: a start takes as long as a dozen kernels.
    """
    starts = [0]
    for code in codes:
        starts.append(starts[-1] + len(code))
    tool = Path(get_ptxas(arch).path).with_name("nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [str(tool), "--binary", _NAMES.get(arch, f"SM{arch}"), file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: list[list[Instruction]] = [[] for _ in codes]
    index = 0
    for match in _LINE.finditer(listing):
        address = int(match[1], 16)
        while address >= starts[index + 1]:
            index += 1
        instruction = Instruction(address, match[2] or "", match[3], match[4].strip())
        kernels[index].append(_moved(instruction, starts[index]))
    return kernels


def _moved(instruction: Instruction, start: int) -> Instruction:
    target = instruction.target
    operands = instruction.operands
    if target is not None:
        operands = re.sub(r"0x[0-9a-f]+$", hex(target - start), operands)
    return replace(instruction, address=instruction.address - start, operands=operands)


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Every loop, in the order of the code; an outer one has the instructions of its inner ones.

    A backward branch closes a loop if every way to the branch passes its target. The retries of
    waits, which stand at the end of the code and jump back into it, close no loop.
    """
    successors = _successors(instructions)
    entries = _entries(instructions, successors)
    found: dict[int, int] = {}
    for instruction in instructions:
        target = instruction.target
        if target is None or target > instruction.address:
            continue
        if instruction.address not in _reachable(successors, entries, without=target):
            found[target] = max(found.get(target, 0), instruction.address)
    return [
        tuple(x for x in instructions if first <= x.address <= last)
        for first, last in sorted(found.items())
    ]


def innermost(some: Sequence[Loop]) -> list[Loop]:
    """The loops that have no other of these loops inside."""

    def holds(outer: Loop, inner: Loop) -> bool:
        return outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address

    return [x for x in some if not any(holds(x, other) for other in some if other is not x)]


def _successors(instructions: Sequence[Instruction]) -> dict[int, list[int]]:
    """Addresses to which execution can go from the instruction at an address."""
    found: dict[int, list[int]] = {instructions[-1].address: []}
    for instruction, following in pairwise(instructions):
        next_ones = []
        if instruction.conditional or instruction.kind not in (*_JUMPS, *_INDIRECT, *_ENDS):
            next_ones.append(following.address)
        if instruction.target is not None:
            next_ones.append(instruction.target)
        found[instruction.address] = next_ones
    last = instructions[-1]
    if last.target is not None:
        found[last.address].append(last.target)
    return found


def _entries(instructions: Sequence[Instruction], successors: dict[int, list[int]]) -> list[int]:
    """The first instruction, and the targets of indirect branches: code of specialized warps."""
    entries: list[int] = []
    seen: set[int] = set()
    for instruction in instructions:
        if instruction.address not in seen:
            entries.append(instruction.address)
            seen |= _reachable(successors, [instruction.address])
    return entries


def _reachable(
    successors: dict[int, list[int]], entries: Sequence[int], *, without: int | None = None
) -> set[int]:
    seen: set[int] = set()
    waiting = [x for x in entries if x != without]
    while waiting:
        address = waiting.pop()
        if address in seen:
            continue
        seen.add(address)
        waiting += [x for x in successors.get(address, ()) if x != without]
    return seen
