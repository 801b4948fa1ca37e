"""Equal numbers and equal rows, found by sorting one number per row and never whole rows.

Torch's `unique` over rows sorts whole rows, word by word: a GPU takes longer for some hundred rows
than for all else that building a layout needs.
"""

from __future__ import annotations

import torch

# Odd numbers without a pattern, as int64: the golden ratio, and a factor of splitmix64.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_SPLITMIX = 0xBF58476D1CE4E5B9 - (1 << 64)


def distinct(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct numbers among integers `(n,)`, in the order of their first appearance.

    Returns:
        int64 `(distinct,)`, the index at which each appears first, and int64 `(n,)`, which of these
        each number equals.
    """
    values, like = numbers.unique(return_inverse=True)
    every = torch.arange(len(numbers), device=numbers.device)
    first = torch.full((len(values),), len(numbers), device=numbers.device)
    first, by_appearance = first.scatter_reduce(0, like, every, "amin").sort()
    place = torch.empty_like(by_appearance)
    place[by_appearance] = every[: len(values)]
    return first, place[like]


def distinct_rows(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct rows of bool or integers `(n, words)`, as `distinct` gives them for numbers."""
    first, like = distinct(_keys(table))
    if not torch.equal(table[first[like]], table):
        # Different rows have equal keys.
        first, like = distinct(table.unique(dim=0, return_inverse=True)[1])
    return first, like


def _keys(table: torch.Tensor) -> torch.Tensor:
    """A number for each row, int64 `(n,)`: equal for equal rows, and as good as never otherwise."""
    factor = torch.arange(1, table.shape[1] + 1, device=table.device) * _GOLDEN
    factor = (factor ^ (factor >> 32)) * _SPLITMIX | 1
    # High bits reach low ones before the sum: else rows that differ in high bits would often meet.
    word = table.to(torch.int64) * _GOLDEN
    word ^= word >> 32
    return word.mul_(factor).sum(1)
