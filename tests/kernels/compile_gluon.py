"""Compiles the Gluon forward for a Hopper GPU that need not be there, and looks at the result.

    python tests/kernels/compile_gluon.py

Exits with 1 where a hot loop spills, or where the assembler moved the wait for the products with
the values above the softmax that should run beside them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from compile_configurations import SHARED_MEMORY, Case, compiled_by, resources
from triton.backends.nvidia.compiler import get_ptxas

from diffattn.kernels.block_sparse import gluon_forward

ARCH = 90
CASES = (Case(128, torch.bfloat16), Case(64, torch.float16))
LOOPS = 4  # full and partial blocks, for each of two groups
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
BACKWARDS = re.compile(r"BRA.* 0x([0-9a-f]+)")


@dataclass(frozen=True)
class Loop:
    """A loop that multiplies with keys and with values.

    Attributes:
        exps: in all of the loop.
        hidden: those between the two waits, while the products with the values run.
        spills: accesses to spilled registers.
    """

    exps: int
    hidden: int
    spills: int


def machine_code(kernel: Any) -> list[tuple[int, str]]:
    """Addresses and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        cuobjdump = Path(get_ptxas(ARCH).path).with_name("cuobjdump")
        text = subprocess.run(
            [cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = (INSTRUCTION.match(line) for line in text.splitlines())
    return [(int(m[1], 16), m[2]) for m in found if m]


def hot_loops(code: list[tuple[int, str]]) -> Iterator[Loop]:
    """Innermost loops with two waits for products."""
    products = [address for address, text in code if "HGMMA" in text]
    ends = [(int(m[1], 16), end) for end, text in code if (m := BACKWARDS.search(text))]
    spans = [s for s in ends if s[0] < s[1] and any(s[0] <= a <= s[1] for a in products)]
    for first, end in spans:
        if any(first <= a and b <= end and (a, b) != (first, end) for a, b in spans):
            continue
        body = [text for address, text in code if first <= address <= end]
        waits = [i for i, text in enumerate(body) if "WARPGROUP.DEPBAR" in text]
        exps = [i for i, text in enumerate(body) if "MUFU.EX2" in text]
        if len(waits) == 2:
            yield Loop(
                exps=len(exps),
                hidden=sum(waits[0] < i < waits[1] for i in exps),
                spills=sum("LDL" in text or "STL" in text for text in body),
            )


def problems_of(case: Case) -> Iterator[str]:
    layout = case.layout()
    q = torch.zeros(1, layout.tokens_q, 2, case.head_dim, dtype=case.dtype)
    k = q.new_zeros(1, layout.tokens_kv, 2, case.head_dim)

    def launch() -> object:
        return gluon_forward.forward(
            q, k, k, layout.tensors, None, block_q=case.block_q, block_kv=case.block_kv, scale=0.1
        )

    (kernel,) = compiled_by(launch, ARCH)
    needs = resources(kernel, ARCH)
    loops = list(hot_loops(machine_code(kernel)))
    print(
        f"sm_{ARCH} gluon {case} {kernel.metadata.name} warps {needs.warps} regs {needs.registers}"
        f" stack {needs.stack} B smem {needs.shared / 1024:.1f} KiB {loops}"
    )
    if needs.shared > SHARED_MEMORY[ARCH]:
        yield f"{case}: the chip has {SHARED_MEMORY[ARCH] // 1024} KiB"
    if len(loops) != LOOPS:
        yield f"{case}: {len(loops)} hot loops, expected {LOOPS}"
    for loop in loops:
        if loop.spills:
            yield f"{case}: a hot loop accesses {loop.spills} spilled registers"
        if loop.exps == 0 or loop.hidden < 0.9 * loop.exps:
            yield f"{case}: {loop.hidden} of {loop.exps} exps run beside products"


def main() -> int:
    gluon_forward._on_hopper = lambda device: True
    problems = [problem for case in CASES for problem in problems_of(case)]
    print(f"with Triton {triton.__version__}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
