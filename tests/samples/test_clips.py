import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn.samples.moving_shapes.captions import COLOURS, DIRECTIONS, SHAPES, Scene, all_scenes
from diffattn.samples.moving_shapes.clips import (
    FRAMES,
    RADIUS_RANGE,
    SIZE,
    Geometry,
    draw_geometry,
    render,
    render_clips,
)


def geometry(radius: float = 0.17, along: float = 0.0, across: float = 0.0) -> Geometry:
    return Geometry(torch.tensor([radius]), torch.tensor([along]), torch.tensor([across]))


def coverage(scene: Scene, frame: int, size: int = SIZE, **place: float) -> torch.Tensor:
    """Coverage (size, size) of the shape in one frame, from a white shape on black."""
    white = Scene("white", scene.shape, scene.direction, "black")
    clip = render([white], geometry(**place), torch.tensor([[frame]]), size)[0, 0, 0]
    return (clip - clip.min()) / (clip.max() - clip.min())


def centre(cover: torch.Tensor) -> tuple[float, float]:
    """Centre of mass (x, y) as fractions of the width."""
    axis = (torch.arange(len(cover)) + 0.5) / len(cover)
    return float((cover.sum(0) @ axis) / cover.sum()), float((cover.sum(1) @ axis) / cover.sum())


def test_shape_range_and_determinism() -> None:
    scenes = all_scenes()[:3]
    clips = render_clips(scenes, seed=5)
    assert clips.shape == (3, 3, FRAMES, SIZE, SIZE)
    assert clips.min() >= -1
    assert clips.max() <= 1
    assert torch.equal(clips, render_clips(scenes, seed=5))
    assert not torch.equal(clips, render_clips(scenes, seed=6))


def test_chosen_frames_are_the_frames_of_the_whole_clip() -> None:
    scenes = all_scenes()[::100]
    places = draw_geometry(len(scenes), torch.Generator().manual_seed(1))
    every = render(scenes, places, torch.arange(FRAMES).expand(len(scenes), -1), 48)
    some = torch.tensor([[0, 3, 15], [1, 2, 3], [7, 8, 15], [0, 14, 15]])
    chosen = render(scenes, places, some, 48)
    for index, frames in enumerate(some):
        assert torch.equal(chosen[index], every[index][:, frames])


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_exact_inside_and_outside(colour: str) -> None:
    background = "black" if colour == "white" else "white"
    scene = Scene(colour, "square", "up", background)
    frame = render([scene], geometry(), torch.tensor([[0]]))[0, :, 0]
    rgb = ((frame + 1) * 127.5).round()
    assert rgb[:, 0, 0].tolist() == list(COLOURS[background])
    # An object that moves up starts below the centre.
    assert rgb[:, round(0.75 * SIZE), SIZE // 2].tolist() == list(COLOURS[colour])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_objects_cross_the_centre_in_their_direction(shape: str, direction: str) -> None:
    scene = Scene("red", shape, direction, "blue")
    start, end = centre(coverage(scene, 0)), centre(coverage(scene, FRAMES - 1))
    step = DIRECTIONS[direction]
    for axis in range(2):
        assert end[axis] - start[axis] == pytest.approx(0.5 * step[axis], abs=0.01)
        assert (end[axis] + start[axis]) / 2 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_have_the_area_of_the_circle(shape: str) -> None:
    area = coverage(Scene("red", shape, "up", "blue"), 0, size=256, radius=0.15).mean()
    assert float(area) == pytest.approx(math.pi * 0.15**2, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(
    scene=st.sampled_from(all_scenes()),
    seed=st.integers(0, 2**31),
    frame=st.integers(0, FRAMES - 1),
)
def test_objects_stay_in_sight(scene: Scene, seed: int, frame: int) -> None:
    # A corner of a large triangle may be cut off at the border, but hardly more than that.
    place = draw_geometry(1, torch.Generator().manual_seed(seed))
    radius = float(place.radius)
    assert RADIUS_RANGE[0] <= radius <= RADIUS_RANGE[1]
    clip = render([scene], place, torch.tensor([[frame]]), 96)[0, :, 0]
    background, colour = (
        torch.tensor(COLOURS[name]).view(3, 1, 1) / 127.5 - 1
        for name in (scene.background, scene.colour)
    )
    # How far each pixel is on the way from the background's colour to the object's.
    way = colour - background
    cover = ((clip - background) * way).sum(0) / way.square().sum()
    assert float(cover.mean()) > 0.95 * math.pi * radius**2


def test_edges_are_anti_aliased() -> None:
    cover = coverage(Scene("red", "circle", "left", "blue"), 4)
    partial = (cover > 0.01) & (cover < 0.99)
    assert 30 < int(partial.sum()) < 200
