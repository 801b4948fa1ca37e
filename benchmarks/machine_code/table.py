"""The table in Markdown and in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import triton

from .limits import Verdict
from .rows import KernelRow, LoopRow

_HEAD = (
    "kernel", "variant", "case", "loop", "tile", "warps", "registers", "KiB", "programs",
    "spilled in loop / outside", "products", "x ideal", "exps exposed", "arithmetic exposed",
    "cycles", "share",
)  # fmt: skip
_LEGEND = """\
Compiled with Triton {version} for GPUs that were not there; nothing here has been measured. A line
per loop with matrix products; figures are per warp and iteration.

- **KiB**: shared memory of a program; **programs**: that fit on a multiprocessor.
- **spilled**: words of registers stored to memory or loaded back, per iteration / outside of loops.
- **products**: matrix instructions (RS: first operand from registers, SS: from shared memory);
  **x ideal**: multiplications / those that the tile needs. SERIALIZED: ptxas runs them one after
  the other, with its code for why.
- **exps, arithmetic exposed**: those that run while no matrix product does, of all; wgmma (sm_90)
  only.
- **cycles, share**: estimate of an iteration's cycles, and of the useful part of the tensor cores'
  time. sm_90: a walk through the code (`model.py`), 8 to 12 % too kind where it could be compared
  with measurements of others. sm_80 and sm_100: an upper bound, all pipes overlap; on sm_100 what a
  program's warps do is not told apart, if some of them only wait.
"""


def markdown(rows: Sequence[KernelRow], verdicts: Sequence[Verdict]) -> str:
    """The table as a page of Markdown."""
    parts = ["# Machine code of the Triton kernels\n\n", _LEGEND.format(version=triton.__version__)]
    if verdicts:
        parts += [
            "\n## Must reach (sm_90, bfloat16; the best of plain and tma)\n\n",
            *map(verdict, verdicts),
        ]
    for arch in dict.fromkeys(row.arch for row in rows):
        parts.append(f"\n## sm_{arch}\n\n")
        parts.append(lines([row for row in rows if row.arch == arch]))
    return "".join(parts)


def lines(rows: Sequence[KernelRow]) -> str:
    """One line per loop, or per kernel without one."""
    table = [_HEAD, tuple("---" for _ in _HEAD)]
    table += [cells for row in rows for cells in _cells(row)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def as_json(rows: Sequence[KernelRow], verdicts: Sequence[Verdict], problems: Sequence[str]) -> str:
    """The table as JSON, for programs."""
    content: dict[str, Any] = {
        "triton": triton.__version__,
        "must_reach": [asdict(x) | {"passed": x.passed} for x in verdicts],
        "problems": list(problems),
        "kernels": [asdict(row) for row in rows],
    }
    return json.dumps(content, indent=1) + "\n"


def verdict(of: Verdict) -> str:
    """One goal, as a line."""
    found = "nothing compiled" if of.found is None else f"{of.found:.2f}"
    word = "PASS" if of.passed else "FAIL"
    return f"- {word} {of.goal}: {found} ({of.by}), wanted {of.wanted}\n"


def _cells(row: KernelRow) -> Iterator[tuple[str, ...]]:
    name = (f"{row.family} {row.kernel}", row.variant, row.case)
    needs = (
        str(row.warps), str(row.registers), f"{row.shared / 1024:.0f}", str(row.programs),
    )  # fmt: skip
    if not row.loops:
        yield (*name, "", "", *needs, f"/ {row.spilled}", *[""] * 6)
    # Groups of warps have loops of their own, mostly the same.
    for loop in dict.fromkeys(row.loops):
        yield (
            *name, loop.name, loop.tile, *needs, f"{loop.spilled} / {row.spilled}",
            " ".join([loop.products, *(f"SERIALIZED {code}" for code in row.serialized)]),
            _number(loop.duplicated, 2), *_exposed(loop), _number(loop.cycles, 0),
            _number(loop.share, 2),
        )  # fmt: skip


def _exposed(loop: LoopRow) -> tuple[str, str]:
    if loop.exposed_exps is None:
        return "", ""
    return (
        f"{loop.exposed_exps} of {loop.exps}",
        f"{loop.exposed_arithmetic} of {loop.arithmetic}",
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
