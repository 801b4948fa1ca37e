"""Equal numbers and equal rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn import distinct as module
from diffattn.distinct import distinct, distinct_rows


def by_first_appearance(items: list) -> tuple[list[int], list[int]]:
    """The index at which each different item appears first, and which of these every item is."""
    places: dict = {}
    like = [places.setdefault(item, len(places)) for item in items]
    return [like.index(n) for n in range(len(places))], like


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-2, 2), max_size=40))
@settings(deadline=None)
def test_numbers(numbers: list[int]) -> None:
    first, like = distinct(torch.tensor(numbers, dtype=torch.int64))
    assert (first.tolist(), like.tolist()) == by_first_appearance(numbers)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "words"), [(0, 3), (1, 1), (50, 1), (200, 3), (90, 512)])
def test_rows(rows: int, words: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows + words)
    few = torch.randint(0, 2, (7, words), generator=generator).to(dtype)
    table = few[torch.randint(0, 7, (rows,), generator=generator)]
    first, like = distinct_rows(table)
    assert (first.tolist(), like.tolist()) == by_first_appearance([*map(tuple, table.tolist())])


def test_rows_that_differ_in_one_bit() -> None:
    # The highest bits of several words, and of pairs of words, which many sums would cancel.
    one = torch.eye(64, dtype=torch.int32) * -(1 << 31)
    table = torch.cat([one, one + one.roll(1, 0), torch.zeros(1, 64, dtype=torch.int32), one])
    first, like = distinct_rows(table)
    assert first.tolist() == list(range(129))
    assert like.tolist() == [*range(129), *range(64)]


def test_different_rows_of_equal_keys_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_keys", lambda table: table[:, 0].long())
    table = torch.tensor([[1, 2], [1, 3], [0, 2], [1, 2], [1, 3]])
    first, like = distinct_rows(table)
    assert (first.tolist(), like.tolist()) == ([0, 1, 2], [0, 1, 2, 0, 1])
