"""The table in Markdown and in JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .rows import KernelRow, LoopRow

HEAD = (
    "kernel", "case", "loop", "tile", "warps", "registers", "spilled in / out", "KiB", "programs",
    "products", "x ideal", "exps exposed", "arithmetic exposed", "cycles", "share",
)  # fmt: skip


def markdown(rows: Sequence[KernelRow]) -> str:
    """One line per loop, or per kernel without one."""
    lines = [HEAD, tuple("---" for _ in HEAD)]
    lines += [cells for row in rows for cells in _cells(row)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(row: KernelRow) -> Iterator[tuple[str, ...]]:
    name = f"sm_{row.arch} {row.kernel} {row.variant}"
    needs = (str(row.warps), str(row.registers))
    room = (f"{row.shared / 1024:.0f}", str(row.programs))
    if not row.loops:
        yield (name, row.case, row.function, "", *needs, f"0 / {row.spilled}", *room, *[""] * 6)
    for loop in row.loops:
        yield (
            name, row.case, loop.name, loop.tile, *needs, f"{loop.spilled} / {row.spilled}", *room,
            loop.products + "".join(f" SERIALIZED {code}" for code in row.serialized),
            f"{loop.duplicated:.2f}", *_exposed(loop), f"{loop.cycles:.0f}", f"{loop.share:.2f}",
        )  # fmt: skip


def _exposed(loop: LoopRow) -> tuple[str, str]:
    if loop.exposed_exps is None:
        return "", ""
    return (
        f"{loop.exposed_exps} of {loop.exps}",
        f"{loop.exposed_arithmetic} of {loop.arithmetic}",
    )
