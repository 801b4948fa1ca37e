"""How a program holds a row of scores."""

from __future__ import annotations

# The longest row that the registers of a program hold.
MOST_COLUMNS = 1 << 14


def warps_for(columns: int) -> int:
    """Warps of a program, so that a thread holds at most 16 entries of a row."""
    warps = 1
    while warps < 32 and warps * 32 * 16 < columns:
        warps *= 2
    return warps
