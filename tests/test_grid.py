"""TokenGrid: sizes, places of tokens, text."""

import pytest
import torch

from diffattn import Reference, TokenGrid


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


def test_references_are_rectangles_among_the_other_tokens() -> None:
    picture = Reference(start=2, frames=1, height=3, width=4)
    clip = Reference(start=40, frames=2, height=2, width=2, aligned=False, times=(0, 4))
    grid = TokenGrid(2, 3, 4, text_before=14, text_after=12, references=(picture, clip))
    assert (picture.tokens, picture.stop, grid.tokens) == (12, 14, 50)
    assert grid.alone == TokenGrid(2, 3, 4)
    further = grid.beside(before=5, after=1)
    assert (further.text_before, further.text_after, further.tokens) == (19, 13, 56)
    assert [r.start for r in further.references] == [7, 45]
    assert grid != TokenGrid(2, 3, 4, text_before=14, text_after=12)


@pytest.mark.parametrize(
    "references",
    [
        (Reference(3, 1, 3, 4),),  # reaches into the video
        (Reference(40, 1, 3, 4),),  # ends after the sequence
        (Reference(0, 1, 2, 4), Reference(7, 1, 1, 2)),  # overlap
        (Reference(38, 1, 2, 2), Reference(0, 1, 2, 2)),  # out of order
    ],
)
def test_references_elsewhere_are_refused(references: tuple[Reference, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"a reference at tokens \d+ to \d+ is not among the other"
    ):
        TokenGrid(2, 3, 4, text_before=14, text_after=12, references=references)


def test_a_reference_without_tokens_or_with_odd_times_is_refused() -> None:
    with pytest.raises(ValueError, match="a reference of 1x0x4 tokens from position 2 needs at"):
        Reference(2, 1, 0, 4)
    with pytest.raises(ValueError, match="a reference of 2 frames has 1 times"):
        Reference(2, 2, 1, 4, times=(0.0,))
