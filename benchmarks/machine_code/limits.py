"""Limits that every kernel must keep, and goals that the fast kernels must reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .model import CHIPS
from .rows import KernelRow, LoopRow

# Words of registers that a warp may store to memory or load back per iteration of a loop: some 8 %
# of the instructions of such a loop.
SPILLED_IN_LOOP = 36
_ROUNDING = 1e-6


def problems(rows: Iterable[KernelRow]) -> list[str]:
    """All problems of the kernels, a line each."""
    return [f"{_label(row)}: {problem}" for row in rows for problem in _of_kernel(row)]


def _of_kernel(row: KernelRow) -> list[str]:
    found = []
    limit = CHIPS[row.arch].shared_per_program
    if row.shared > limit:
        found.append(
            f"needs {row.shared / 1024:.0f} KiB of shared memory: the chip has {limit // 1024} KiB"
        )
    if row.missing_warps:
        found.append("the compiler did not specialize warps")
    with_products = sum(loop.products != "" for loop in row.loops)
    if with_products not in (0, row.expected_loops):
        found.append(
            f"has {with_products} loops with products, its source {row.expected_loops}: the table"
            " may take one for another"
        )
    for code in row.serialized:
        found.append(f"wgmma products are serialized (ptxas {code})")
    return found + [problem for loop in row.loops for problem in _of_loop(loop)]


def _of_loop(loop: LoopRow) -> list[str]:
    found = []
    if loop.spilled > SPILLED_IN_LOOP:
        found.append(
            f"spills {loop.spilled} words of registers in the {loop.name!r} loop:"
            f" up to {SPILLED_IN_LOOP} are allowed"
        )
    if loop.duplicated is not None and loop.duplicated > 1 + _ROUNDING:
        found.append(
            f"computes its products {loop.duplicated:.2f} times in the {loop.name!r} loop"
            f" ({loop.products} for a tile of {loop.tile}): use fewer warps or a larger tile"
        )
    return found


def _label(row: KernelRow) -> str:
    return f"sm_{row.arch} {row.family} {row.kernel} {row.variant} {row.case}"


@dataclass(frozen=True)
class Verdict:
    """A goal, and whether it is reached.

    Attributes:
        wanted: the least share, or the most duplication.
        found: None where nothing of the kind was compiled.
        by: the kernel that has the figure.
    """

    goal: str
    wanted: float
    found: float | None
    by: str
    at_most: bool = False

    @property
    def passed(self) -> bool:
        if self.found is None:
            return False
        found = round(self.found, 2)
        return found <= self.wanted if self.at_most else found >= self.wanted


# Least shares of the tensor cores' cycles on sm_90, for bfloat16: kernel, head_dim, loop, share.
SHARES = (
    ("forward", 128, "full", 0.72),
    ("forward", 64, "full", 0.65),
    ("forward", 128, "partial", 0.53),
    ("queries", 128, "full", 0.79),
    ("keys", 128, "full", 0.66),
    ("keys", 64, "full", 0.66),
)
# Least share of a gather kernel over the share of the block-sparse kernel. On an H200 the fastest
# tiles of both are not those of the largest share.
GATHER = 0.65
_GATHER_LOOPS = {"forward": "whole", "queries": "whole", "keys": "all"}
# The Gluon variant is not counted: the model is too kind to specialized warps.
_COUNTED = ("plain", "tma")


def verdicts(rows: Sequence[KernelRow]) -> list[Verdict]:
    """Every goal, judged by the best variant on sm_90; none without rows for sm_90."""
    rows = [row for row in rows if row.arch == 90]
    if not rows:
        return []
    found = [
        Verdict(f"share of {kernel} at head_dim {head_dim}, {loop} blocks", least,
                *_best(rows, "block_sparse", kernel, head_dim, loop))
        for kernel, head_dim, loop, least in SHARES
    ]  # fmt: skip
    for kernel, loop in _GATHER_LOOPS.items():
        for head_dim in (64, 128):
            share, by = _best(rows, "gather", kernel, head_dim, loop)
            other, than = _best(rows, "block_sparse", kernel, head_dim, "full")
            relative = share / other if share and other else None
            goal = f"share of gather's {kernel} at head_dim {head_dim} / that of block_sparse"
            found.append(Verdict(goal, GATHER, relative, f"{by} / {than}"))
    most, by = max(
        ((loop.duplicated, f"{_label(row)} {loop.name}") for row in rows for loop in row.loops
         if loop.duplicated is not None), default=(None, "nothing"),
    )  # fmt: skip
    goal = "multiplications / those needed, anywhere"
    return [*found, Verdict(goal, 1.0, most, by, at_most=True)]


def _best(
    rows: Iterable[KernelRow], family: str, kernel: str, head_dim: int, loop: str
) -> tuple[float | None, str]:
    """The highest share of a kernel's variants, and the variant that has it."""
    cases = (f"d{head_dim} bfloat16", f"d{head_dim} bfloat16 128x128 partial ragged")
    shares = [
        (found.share, f"{row.family} {row.variant} {found.tile}")
        for row in rows
        if row.family == family and row.kernel == kernel and row.case in cases
        if row.variant in _COUNTED
        for found in row.loops
        if found.name == loop and found.share is not None
    ]
    return max(shares, default=(None, "nothing"))
