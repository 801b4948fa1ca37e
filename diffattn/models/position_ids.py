"""Reading pictures and videos out of position ids: the numbers that say where each token is.

Flux, LTX and many other models say only by such numbers which tokens make a picture, and how many
rows and columns the picture has.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

# Ids that were read last, and what was found. Reading waits for the device; a pipeline passes the
# same ids in all its steps.
_MOST_KEPT = 64
_kept: OrderedDict[tuple[object, ...], _Kept] = OrderedDict()
_keeping = threading.Lock()

_TIME, _ROW, _COLUMN = 0, 1, 2


@dataclass(frozen=True)
class Rectangle:
    """A picture, or a video, among the tokens of position ids: frame by frame and row by row.

    Attributes:
        start: position of the first token.
        frames, height, width: tokens along each axis.
        origin: row and column of the first token, in the numbers of the ids.
        step: what the ids grow by from row to row and from column to column; 0 for one row or one
            column.
        times: the time of each frame, in the numbers of the ids.
    """

    start: int
    frames: int
    height: int
    width: int
    origin: tuple[float, float]
    step: tuple[float, float]
    times: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all frames."""
        return self.frames * self.height * self.width

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + self.tokens

    @property
    def last(self) -> tuple[float, float]:
        """Row and column of the last token, in the numbers of the ids."""
        (row, column), (down, right) = self.origin, self.step
        return row + down * (self.height - 1), column + right * (self.width - 1)


@dataclass(frozen=True)
class _Kept:
    ids: weakref.ref[torch.Tensor]
    version: int | None
    found: tuple[Rectangle, ...]


def first_sample(ids: torch.Tensor) -> torch.Tensor:
    """The ids (tokens, columns) of the first sample of ids with or without a batch in front."""
    return ids if ids.ndim == 2 else ids[0]


def rectangles(
    ids: torch.Tensor,
    name: str,
    *,
    joined: bool,
    start: int = 0,
    stop: int | None = None,
    of_tokens: Callable[[torch.Tensor], torch.Tensor] = first_sample,
) -> tuple[Rectangle, ...]:
    """The pictures, or videos, whose tokens follow one another.

    What was found is kept with the tensor `ids`, until the tensor changes. Several threads may
    read at once.

    Args:
        ids: the argument of the model's forward.
        name: what messages call the ids, such as "img_ids of FluxTransformer2DModel".
        joined: whether pictures of one size and place that follow one another, each later than the
            one before, are frames of a video. Otherwise each picture is a rectangle of its own.
        start, stop: the tokens to read; rectangles count their positions from `start`.
        of_tokens: function of `ids`, at the level of a module; gives (tokens, 3 or more): time,
            row and column of each token, and numbers that are equal for all tokens of a picture.

    Returns:
        The rectangles in the order of their tokens. Each token is in one of them. Ids that are
        equal for all tokens make a rectangle of each token.

    Raises:
        ValueError: if the parts of a picture do not stand row by row in even steps, or the ids are
            numbers that their dtype cannot tell apart.
    """
    key = (id(ids), joined, start, stop, of_tokens)
    version = None if ids.is_inference() else ids._version
    with _keeping:
        kept = _kept.get(key)
    if kept is not None and kept.ids() is ids and kept.version == version:
        return kept.found
    with torch.no_grad():
        found = _read(of_tokens(ids)[start:stop].detach(), name, joined)
    with _keeping:
        _kept[key] = _Kept(weakref.ref(ids), version, found)
        while len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
    return found


def _read(ids: torch.Tensor, name: str, joined: bool) -> tuple[Rectangle, ...]:
    if ids.ndim != 2 or ids.shape[1] < 3:
        raise ValueError(
            f"{name} are of shape {tuple(ids.shape)} for the tokens of a sample, but time, row and"
            f" column of each token are needed: (tokens, 3) or wider"
        )
    places = ids.to("cpu", torch.float64)
    _check_precision(places, ids.dtype, name)
    if not len(places):
        return ()
    frames = _frames(places, name)
    _check_whole(frames, name)
    groups = _videos(frames) if joined else ([frame] for frame in frames)
    return tuple(
        Rectangle(
            group[0].start,
            len(group),
            *group[0].size,
            group[0].origin,
            group[0].step,
            tuple(frame.time for frame in group),
        )
        for group in groups
    )


def _check_precision(places: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    if not places.isfinite().all():
        raise ValueError(f"{name} hold numbers that are not finite: such tokens have no place")
    if not dtype.is_floating_point or not len(places):
        return
    limit = 2 / torch.finfo(dtype).eps  # whole numbers above are rounded
    largest = places.abs().max().item()
    if largest >= limit:
        raise ValueError(
            f"{name} are {dtype} and reach {largest:g}, but {dtype} rounds whole numbers above"
            f" {limit:g}, and then neighbouring tokens have the same place: pass the ids as"
            f" torch.float32, or make smaller pictures"
        )


@dataclass(frozen=True)
class _Frame:
    """A picture: `height` rows of `width` tokens in even steps.

    Attributes:
        apart: the ids that are equal in the picture, but for the time.
    """

    start: int
    size: tuple[int, int]
    origin: tuple[float, float]
    step: tuple[float, float]
    time: float
    apart: tuple[float, ...]

    @property
    def stop(self) -> int:
        return self.start + self.size[0] * self.size[1]


def _frames(places: torch.Tensor, name: str) -> list[_Frame]:
    """The pictures of ids (tokens, columns)."""
    constant = [axis for axis in range(places.shape[1]) if axis != _COLUMN]
    by_token = places.diff(dim=0)
    grows = (by_token[:, constant] == 0).all(1) & (by_token[:, _COLUMN] > 0)
    first, width = _runs(grows)
    right = _even_steps(by_token[:, _COLUMN], grows, first, first, "columns", name)

    # One entry per row from here on.
    rows = places[first]
    last = places[first + width - 1, _COLUMN]
    by_row = rows.diff(dim=0)
    constant = [axis for axis in range(places.shape[1]) if axis != _ROW]
    alike = (by_row[:, constant] == 0).all(1) & (last.diff() == 0) & (width.diff() == 0)
    grows = alike & (by_row[:, _ROW] > 0)
    top, height = _runs(grows)
    down = _even_steps(by_row[:, _ROW], grows, top, first, "rows", name)

    # One entry per picture from here on.
    return [
        _Frame(start, (h, w), (place[_ROW], place[_COLUMN]), steps, place[_TIME], tuple(place[3:]))
        for start, h, w, place, steps in zip(
            first[top].tolist(),
            height.tolist(),
            width[top].tolist(),
            rows[top].tolist(),
            zip(down.tolist(), right[top].tolist(), strict=True),
            strict=True,
        )
    ]


def _runs(continues: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First entries and lengths of runs; entry i + 1 is in the run of entry i if `continues[i]`."""
    first = torch.cat([torch.zeros(1, dtype=torch.long), (~continues).nonzero().flatten() + 1])
    end = torch.tensor([len(continues) + 1])
    return first, torch.cat([first, end]).diff()


def _even_steps(
    steps: torch.Tensor,
    continues: torch.Tensor,
    first: torch.Tensor,
    token: torch.Tensor,
    axis: str,
    name: str,
) -> torch.Tensor:
    """The step of each run; 0 for a run of one entry.

    Args:
        steps: (entries - 1,), from each entry to the next.
        continues, first: the runs.
        token: position of the first token of each entry, or the entry's own for entries of tokens.

    Raises:
        ValueError: if the steps of a run differ.
    """
    run = torch.cat([torch.zeros(1, dtype=torch.long), (~continues).long().cumsum(0)])
    alone = torch.cat([continues, torch.zeros(1, dtype=torch.bool)])[first].logical_not()
    padded = torch.cat([steps, torch.zeros(1, dtype=steps.dtype)])
    step = padded[first].masked_fill(alone, 0)
    # Ids that were scaled are rounded; tokens out of order differ by whole steps.
    expected = step[run[1:]] if len(steps) else steps
    uneven = (continues & ((steps - expected).abs() > expected / 4)).nonzero().flatten()
    if len(uneven):
        at = int(uneven[0]) + 1
        position = int(token[at]) if axis == "rows" else at
        raise ValueError(
            f"{name} have uneven {axis}: token {position} is {steps[at - 1]:g} after the one"
            f" before, where the picture's step is {expected[at - 1]:g}. The tokens of a picture"
            f" must stand row by row, without gaps"
        )
    return step


def _check_whole(frames: list[_Frame], name: str) -> None:
    """Raise ValueError if frames are parts of one picture, whose tokens are out of order."""
    seen: dict[tuple[float, ...], dict[tuple[object, ...], _Frame]] = {}
    for frame in frames:
        others = seen.setdefault((frame.time, *frame.apart), {})
        bounds = (frame.size, frame.origin, frame.step)
        if bounds in others:
            continue  # the same picture once more, such as a key frame beside the video
        for other in others.values():
            if not _in_two_resolutions(frame, other):
                raise ValueError(
                    f"{name} put tokens {other.start} to {other.stop - 1} and tokens"
                    f" {frame.start} to {frame.stop - 1} into one picture, apart from each other."
                    f" The tokens of a picture must stand row by row, without gaps"
                )
        others[bounds] = frame


def _in_two_resolutions(a: _Frame, b: _Frame) -> bool:
    """Whether two frames of one time are pictures from one corner on, of pixels of other sizes."""
    steps_differ = False
    for axis in (0, 1):
        steps = a.step[axis], b.step[axis]
        if 0 in steps and a.origin[axis] != b.origin[axis]:
            return False
        corners = (frame.origin[axis] - frame.step[axis] / 2 for frame in (a, b))
        if 0 not in steps and abs(next(corners) - next(corners)) > min(steps) / 4:
            return False
        steps_differ |= 0 not in steps and abs(steps[0] - steps[1]) > min(steps) / 4
    return steps_differ


def _videos(frames: list[_Frame]) -> Iterator[list[_Frame]]:
    """Frames of one size and place that follow one another in time, together."""
    video: list[_Frame] = []
    for frame in frames:
        before = video[-1] if video else None
        if before is not None and not (frame.time > before.time and _same_place(frame, before)):
            yield video
            video = []
        video.append(frame)
    yield video


def _same_place(a: _Frame, b: _Frame) -> bool:
    return (a.size, a.origin, a.step, a.apart) == (b.size, b.origin, b.step, b.apart)
