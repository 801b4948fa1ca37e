"""Token grids, and places in a grid, as the command line writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from diffattn import TokenGrid

_NUMBER = r"\d{1,9}"
_GRID = re.compile(
    rf"(?:(?P<before>{_NUMBER})\+)?"
    rf"(?:(?P<frames>{_NUMBER})x)?(?P<height>{_NUMBER})x(?P<width>{_NUMBER})"
    rf"(?:\+(?P<after>{_NUMBER}))?"
)
_REFERENCE = re.compile(
    rf"(?:(?P<frames>{_NUMBER})x)?(?P<height>{_NUMBER})x(?P<width>{_NUMBER})"
    rf"(?:@(?P<start>{_NUMBER}))?"
)
_PLACE = re.compile(rf"({_NUMBER}),({_NUMBER}),({_NUMBER})")


def read_grid(text: str) -> TokenGrid:
    """Read `21x30x52`, `64x64` (one frame), `21x30x52+256` or `512+64x64` (with text).

    Raises:
        UserError: if `text` is no grid.
    """
    from diffattn import TokenGrid

    match = _GRID.fullmatch(re.sub(r"\s", "", text).lower())
    if match is None:
        raise UserError(
            f"--grid must be frames x height x width in tokens, such as 21x30x52, with text tokens "
            f"before or after it as in 512+64x64 and 21x30x52+256, not {text!r}"
        )
    sizes = {name: int(value) for name, value in match.groupdict(default="0").items()}
    try:
        return TokenGrid(
            frames=1 if match["frames"] is None else sizes["frames"],
            height=sizes["height"],
            width=sizes["width"],
            text_before=sizes["before"],
            text_after=sizes["after"],
        )
    except ValueError as error:
        raise UserError(f"--grid {text}: {error}") from None


def with_references(grid: TokenGrid, texts: Sequence[str]) -> TokenGrid:
    """Read `64x64`, `37x15x26` or `37x15x26@200`, and put these references into a sequence.

    Without a start the references stand after the video, one after another, and make the sequence
    longer. With a start they are some of the tokens that the grid has beside its video.

    Raises:
        UserError: if a text is no reference, or there is no room for the reference.
    """
    from diffattn.grid import Reference

    after: list[Reference] = []
    placed: list[Reference] = []
    end = grid.video.stop
    for text in texts:
        match = _REFERENCE.fullmatch(re.sub(r"\s", "", text).lower())
        if match is None:
            raise UserError(
                f"--reference must be frames x height x width in tokens, such as 1x64x64 or 64x64,"
                f" with the position of its first token as in 37x15x26@200, not {text!r}"
            )
        frames, *plane = (int(match[name] or 1) for name in ("frames", "height", "width"))
        given = match["start"]
        try:
            reference = Reference(end if given is None else int(given), frames, plane[0], plane[1])
        except ValueError as error:
            raise UserError(f"--reference {text}: {error}") from None
        if given is None:
            after.append(reference)
            end = reference.stop
        else:
            placed.append(reference)
    added = end - grid.video.stop
    # Positions are those in the sequence that --grid writes.
    moved = [replace(r, start=r.start + added * (r.start >= grid.video.stop)) for r in placed]
    references = tuple(sorted([*after, *moved], key=lambda reference: reference.start))
    try:
        return replace(grid, text_after=grid.text_after + added, references=references)
    except ValueError as error:
        raise UserError(f"--reference {', '.join(texts)}: {error}") from None


def read_place(text: str) -> tuple[int, int, int]:
    """Read the frame, row and column of a token, such as `10,15,26`.

    Raises:
        UserError: if `text` is no such place.
    """
    match = _PLACE.fullmatch(re.sub(r"\s", "", text))
    if match is None:
        raise UserError(
            f"--query must be a token's frame, row and column, such as 10,15,26, not {text!r}"
        )
    frame, row, column = (int(place) for place in match.groups())
    return frame, row, column
