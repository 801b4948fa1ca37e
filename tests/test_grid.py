"""TokenGrid: sizes, places of tokens, text."""

import pytest
import torch

from diffattn import TokenGrid


def test_tokens_are_frame_by_frame_and_row_by_row() -> None:
    grid = TokenGrid(2, 3, 4, text_before=5, text_after=1)
    assert grid.tokens == 5 + 24 + 1
    assert grid.video == slice(5, 29)
    frame, row, column = grid.coordinates(torch.arange(5, 29))
    where = torch.stack([frame, row, column], -1).tolist()
    assert where == [[t, h, w] for t in range(2) for h in range(3) for w in range(4)]
    assert grid.is_text(torch.arange(30)).tolist() == [True] * 5 + [False] * 24 + [True]


def test_a_single_frame_is_an_image() -> None:
    grid = TokenGrid(1, 7, 7)
    assert grid.tokens == grid.frame_tokens == 49


@pytest.mark.parametrize("axis", ["frames", "height", "width"])
def test_axes_are_at_least_one(axis: str) -> None:
    sizes = {"frames": 2, "height": 2, "width": 2} | {axis: 0}
    with pytest.raises(ValueError, match=f"{axis} is 0, but a grid needs at least 1"):
        TokenGrid(**sizes)


def test_text_is_not_negative() -> None:
    with pytest.raises(ValueError, match="text_after is -1, but cannot be negative"):
        TokenGrid(1, 1, 1, text_after=-1)


def test_a_grid_says_what_it_is() -> None:
    assert str(TokenGrid(2, 3, 4, text_after=7)) == "2x3x4+7 text"
    assert str(TokenGrid(2, 3, 4)) == "2x3x4"


@pytest.mark.parametrize("axis", ["frames", "height", "width", "text_before", "text_after"])
@pytest.mark.parametrize("value", [1.5, 2.0, "3", None])
def test_numbers_of_tokens_are_integers(axis: str, value: object) -> None:
    sizes = {"frames": 2, "height": 3, "width": 4, axis: value}
    with pytest.raises(TypeError, match=f"^{axis} is {value!r}, but must be an integer$"):
        TokenGrid(**sizes)
