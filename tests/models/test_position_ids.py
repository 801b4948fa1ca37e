"""Rectangles come back out of the position ids that were written for them."""

import threading

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from diffattn.models.position_ids import Rectangle, rectangles

NAME = "img_ids of FluxTransformer2DModel"


def written(
    times: tuple[float, ...],
    height: int,
    width: int,
    origin: tuple[float, float] = (0, 0),
    step: tuple[float, float] = (1, 1),
    more: tuple[float, ...] = (),
) -> torch.Tensor:
    """Ids (tokens, 3 or more) of a picture or a video, as pipelines write them."""
    axes = [
        torch.tensor(times, dtype=torch.float64),
        origin[0] + step[0] * torch.arange(height, dtype=torch.float64),
        origin[1] + step[1] * torch.arange(width, dtype=torch.float64),
        *(torch.tensor([number], dtype=torch.float64) for number in more),
    ]
    return torch.cartesian_prod(*axes)


side = st.integers(1, 7)
picture = st.tuples(side, side, st.sampled_from([0.0, 3.0, 512.0]), st.sampled_from([1.0, 0.5, 32]))


@given(st.lists(picture, min_size=1, max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_pictures_come_back(pictures: list, dtype: torch.dtype) -> None:
    parts = [
        written((10.0 * n,), h, w, (at, at + 1), (step, 2 * step))
        for n, (h, w, at, step) in enumerate(pictures)
    ]
    found = rectangles(torch.cat(parts).to(dtype), NAME, joined=False)
    start = 0
    for n, (rectangle, (h, w, at, step)) in enumerate(zip(found, pictures, strict=True)):
        steps = (step * (h > 1), 2 * step * (w > 1))
        assert rectangle == Rectangle(start, 1, h, w, (at, at + 1), steps, (10.0 * n,))
        start += h * w
        assert rectangle.stop == start


@given(st.integers(1, 5), side, side, st.integers(0, 3))
def test_frames_are_joined_to_a_video_on_demand(f: int, h: int, w: int, references: int) -> None:
    times = tuple(0.04 * n * n for n in range(f))
    videos = [written((5.0,), h + 1, w, step=(64, 64))] * references
    ids = torch.cat([*videos, written(times, h, w, (16, 16), (32, 32))])
    *before, last = rectangles(ids, NAME, joined=True)
    assert [(r.frames, r.height, r.width) for r in before] == [(1, h + 1, w)] * references
    assert (last.frames, last.height, last.width, last.times) == (f, h, w, times)
    assert last.last == (16 + 32 * (h - 1), 16 + 32 * (w - 1))
    apart = rectangles(ids, NAME, joined=False)
    assert [r.times for r in apart[references:]] == [(time,) for time in times]


@given(st.data())
def test_a_swapped_pair_is_refused(data: st.DataObject) -> None:
    joined = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    assume(all(h * w > 1 for h, w in sizes))
    frames = data.draw(st.integers(1, 3)) if joined else 1
    parts = [
        written(tuple(10.0 * n + frame for frame in range(frames)), h, w)
        for n, (h, w) in enumerate(sizes)
    ]
    ids = torch.cat(parts)
    a, b = data.draw(
        st.lists(st.integers(0, len(ids) - 1), min_size=2, max_size=2, unique=True).map(sorted)
    )
    ids[[a, b]] = ids[[b, a]]
    with pytest.raises(ValueError, match=r"^img_ids of Flux.*row by row, without gaps$"):
        rectangles(ids, NAME, joined=joined)


@given(st.integers(2, 6), st.integers(2, 6), st.data())
def test_a_missing_token_is_refused(h: int, w: int, data: st.DataObject) -> None:
    missing = data.draw(st.integers(0, h * w - 1))
    ids = written((0,), h, w)
    with pytest.raises(ValueError, match="row by row, without gaps"):
        rectangles(ids[torch.arange(h * w) != missing], NAME, joined=False)


def test_messages_name_the_tokens() -> None:
    ids = written((0,), 2, 4)
    ids[:4] = ids[:4].flip(0)
    with pytest.raises(ValueError, match="put tokens 0 to 0 and tokens 1 to 1 into one picture"):
        rectangles(ids, NAME, joined=False)
    with pytest.raises(
        ValueError,
        match="uneven columns: token 6 is 2 after the one before, where the picture's step is 1",
    ):
        rectangles(written((0,), 2, 4)[[0, 1, 2, 3, 4, 5, 7]], NAME, joined=False)
    with pytest.raises(ValueError, match="uneven rows: token 8 is 3 after the one"):
        rectangles(torch.cat([written((0,), 2, 4), written((0,), 1, 4, (4, 0))]), NAME, joined=True)


def test_key_frames_and_references_of_another_step_share_the_time_of_the_video() -> None:
    video = written((0, 8, 16), 4, 6, (16, 16), (32, 32))
    key_frame = written((8,), 4, 6, (16, 16), (32, 32))
    half = written((0, 8, 16), 2, 3, (32, 32), (64, 64))
    found = rectangles(torch.cat([video, key_frame, half]), NAME, joined=True)
    sizes = [(r.start, r.frames, r.height, r.width) for r in found]
    assert sizes == [(0, 3, 4, 6), (72, 1, 4, 6), (96, 3, 2, 3)]


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 256), (torch.float16, 2048)], ids=str
)
def test_numbers_that_the_dtype_rounds_are_refused_by_name(dtype: torch.dtype, limit: int) -> None:
    fits = written((0,), 1, limit).to(dtype)
    (row,) = rectangles(fits, NAME, joined=False)
    assert row.width == limit
    with pytest.raises(
        ValueError,
        match=rf"Flux.* are {dtype} and reach {limit}, but .* above {limit},.* pass the ids as",
    ):
        rectangles(written((0,), 1, limit + 2).to(dtype), NAME, joined=False)


def test_a_batch_a_range_and_another_layout() -> None:
    ids = torch.cat([torch.zeros(5, 3, dtype=torch.float64), written((0,), 3, 4)])
    found = rectangles(ids, NAME, joined=False, start=5)
    assert [(r.start, r.height, r.width) for r in found] == [(0, 3, 4)]
    assert rectangles(ids[None].expand(2, -1, -1), NAME, joined=False, start=5) == found
    assert len(rectangles(ids, NAME, joined=False, stop=5)) == 5
    axes_first = ids.T.contiguous()
    turned = rectangles(axes_first, NAME, joined=False, start=5, of_tokens=torch.t)
    assert turned == found


def test_what_was_read_is_kept_until_the_tensor_changes() -> None:
    ids = written((0,), 3, 4)
    first = rectangles(ids, NAME, joined=False)
    assert rectangles(ids, NAME, joined=False) is first
    assert rectangles(ids.clone(), NAME, joined=False) is not first
    ids[:, 1] *= 2
    (changed,) = rectangles(ids, NAME, joined=False)
    assert changed.step == (2, 1)
    with torch.inference_mode():
        ids = written((0,), 4, 3)
        assert rectangles(ids, NAME, joined=False)[0].height == 4
        assert rectangles(ids, NAME, joined=False) is rectangles(ids, NAME, joined=False)


def test_threads_read_their_own_ids() -> None:
    wrong: list[object] = []
    shared = written((0,), 3, 5)

    def read(size: int) -> None:
        for _ in range(200):
            own = written((0,), size, 2)
            found = rectangles(own, NAME, joined=False) + rectangles(shared, NAME, joined=False)
            if [(r.height, r.width) for r in found] != [(size, 2), (3, 5)]:
                wrong.append(found)

    threads = [threading.Thread(target=read, args=(size,)) for size in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_ids_without_places_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of shape \(6, 2\) .* \(tokens, 3\) or wider"):
        rectangles(torch.zeros(6, 2), NAME, joined=False)
    with pytest.raises(ValueError, match="not finite"):
        rectangles(torch.full((6, 3), float("nan")), NAME, joined=False)
    assert rectangles(torch.zeros(0, 3), NAME, joined=False) == ()
