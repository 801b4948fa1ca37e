"""Grids of models that make pictures and say only by position ids where a token is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffattn.grid import Reference, TokenGrid
from diffattn.models.base import argument, first_input
from diffattn.models.position_ids import Rectangle, rectangles


def earliest(pictures: Sequence[Rectangle]) -> Rectangle:
    """The picture with the smallest time: references have a larger time than the target."""
    return min(pictures, key=lambda picture: picture.times)


def grid_of_ids(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    position: int,
    name: str = "img_ids",
    text: tuple[int, str] | None = None,
    target: Callable[[Sequence[Rectangle]], Rectangle] = earliest,
) -> TokenGrid:
    """The grid of a call on the packed tokens of a picture and of reference pictures.

    Args:
        position, name: the argument with the position ids of all these tokens: (tokens, 3 or more)
            or with a batch in front; time, row, column.
        text: position and name of the argument with the text whose tokens stand in the ids before
            the pictures; None if the ids are those of pictures only.
        target: the picture that the model makes, among the pictures of the ids.

    Raises:
        ValueError: if the ids place more or fewer tokens than `hidden_states` has, do not place
            tokens row by row, or place no token beside another where the number of tokens is no
            square.
    """
    ids = argument(args, kwargs, position, name)
    tokens = first_input(args, kwargs).shape[1]
    if text is None:
        pictures = pictures_of(model, ids, name, {"hidden_states": tokens})
    else:
        words = argument(args, kwargs, *text).shape[1]
        counted = {text[1]: words, "hidden_states": tokens}
        pictures = pictures_of(model, ids, name, counted, start=words)
    return grid_of_pictures(target(pictures), pictures)


def pictures_of(
    model: torch.nn.Module,
    ids: torch.Tensor,
    name: str,
    tokens: Mapping[str, int],
    start: int = 0,
) -> Sequence[Rectangle]:
    """The pictures of position ids, by their positions from `start`.

    Args:
        ids, name: the argument with the ids.
        tokens: the number of tokens of each argument that the ids are of.
        start: the first token that is of a picture.

    Raises:
        ValueError: as for `grid_of_ids`.
    """
    of_model = f"{name} of {type(model).__name__}"
    if ids.shape[-2] != sum(tokens.values()):
        has = " and ".join(f"{argument} has {count}" for argument, count in tokens.items())
        raise ValueError(
            f"{of_model} place {ids.shape[-2]} tokens, but {has}: the arguments contradict each"
            f" other; pass the position ids of each token"
        )
    pictures = rectangles(ids, of_model, joined=False, start=start)
    many = ids.shape[-2] - start
    return [_square(of_model, many)] if len(pictures) == many > 1 else pictures


def grid_of_pictures(target: Rectangle, pictures: Sequence[Rectangle]) -> TokenGrid:
    """The grid of a sequence of pictures, all but one of them references."""
    references = [picture for picture in pictures if picture is not target]
    end = max(picture.stop for picture in pictures)
    return TokenGrid(
        1,
        target.height,
        target.width,
        target.start,
        end - target.stop,
        references=tuple(
            Reference(
                picture.start,
                1,
                picture.height,
                picture.width,
                aligned=_in_one_place(picture, target),
            )
            for picture in references
        ),
    )


def _in_one_place(a: Rectangle, b: Rectangle) -> bool:
    """Whether the rows and columns of two pictures have the same numbers, as far as both go."""
    steps = zip(a.step, b.step, strict=True)
    return a.origin == b.origin and all(x == y or 0 in (x, y) for x, y in steps)


def _square(of_model: str, tokens: int) -> Rectangle:
    """The picture of tokens of whose places only their number is known."""
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(
            f"{of_model} place none of the {tokens} tokens beside another, and {tokens} tokens are"
            f" no square picture: height and width are unknown; pass the time, row and column of"
            f" each token, as the pipelines do"
        )
    warnings.warn(
        f"{of_model} place none of the {tokens} tokens beside another; their number makes a square"
        f" picture of {side} x {side} tokens. For another picture pass the time, row and column of"
        f" each token, as the pipelines do",
        stacklevel=2,
    )
    return Rectangle(0, 1, side, side, origin=(0, 0), step=(1, 1), times=(0,))
