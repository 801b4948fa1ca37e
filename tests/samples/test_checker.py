import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional as F

from diffattn.samples.moving_shapes.captions import COLOURS, Scene, all_scenes, parse_caption
from diffattn.samples.moving_shapes.checker import Reading, read_clip
from diffattn.samples.moving_shapes.clips import FRAMES, render_clips

SCENES = all_scenes()
RED_CIRCLE = parse_caption("a red circle moving right on a blue background")


def as_frames(clip: torch.Tensor) -> NDArray[np.float32]:
    """Turn (3, frames, height, width) in [-1, 1] into (frames, height, width, 3) in [0, 1]."""
    return ((clip.permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1).numpy()


def clip_of(scene: Scene, seed: int = 0) -> NDArray[np.float32]:
    return as_frames(render_clips([scene], seed)[0])


def all_right(reading: Reading, scene: Scene) -> bool:
    return reading.agreement(scene)["all"]


def blurred(clip: torch.Tensor, width: int) -> torch.Tensor:
    return F.avg_pool3d(clip, (1, width, width), 1, (0, width // 2, width // 2))


# 7 and 360 have no common factor: all shapes, directions and colours occur.
@pytest.mark.parametrize("scene", SCENES[::7], ids=lambda scene: scene.caption)
def test_rendered_clips_are_read_exactly(scene: Scene) -> None:
    reading = read_clip(clip_of(scene, seed=3))
    assert all_right(reading, scene), reading
    assert reading.overlap > 0.98
    assert reading.purity == 1


def test_bytes_and_floats_read_alike() -> None:
    frames = clip_of(RED_CIRCLE)
    from_bytes = read_clip((frames * 255).round().astype(np.uint8))
    assert from_bytes.agreement(RED_CIRCLE) == read_clip(frames).agreement(RED_CIRCLE)


@settings(max_examples=20, deadline=None)
@given(
    scene=st.sampled_from(SCENES),
    seed=st.integers(0, 1000),
    width=st.sampled_from([3, 5, 7]),
    noise=st.floats(0, 0.2),
)
def test_blur_and_noise_do_not_matter(scene: Scene, seed: int, width: int, noise: float) -> None:
    clip = blurred(render_clips([scene], seed), width)
    clip = clip + noise * torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    # The frame's padding darkens its rim; a generated clip has no such rim.
    inner = as_frames(clip[0])[:, 4:-4, 4:-4]
    reading = read_clip(inner)
    assert all_right(reading, scene), reading


@pytest.mark.parametrize("scene", SCENES[::37], ids=lambda scene: scene.caption)
def test_coarse_pixels_still_tell_everything(scene: Scene) -> None:
    clip = render_clips([scene], seed=2)
    coarse = F.interpolate(F.avg_pool3d(clip, (1, 4, 4)), scale_factor=(1, 4, 4))
    reading = read_clip(as_frames(coarse[0]))
    assert all_right(reading, scene), reading


def test_a_few_stray_specks_do_not_matter() -> None:
    frames = clip_of(RED_CIRCLE).copy()
    frames[:, 5:9, 5:9] = np.array(COLOURS["red"]) / 255
    reading = read_clip(frames)
    assert all_right(reading, RED_CIRCLE)
    assert 0.9 < reading.purity < 1


def test_a_few_frames_without_object_do_not_matter() -> None:
    frames = clip_of(RED_CIRCLE).copy()
    frames[[2, 9, 10]] = np.array(COLOURS["blue"]) / 255
    assert all_right(read_clip(frames), RED_CIRCLE)


def test_a_reversed_clip_moves_the_other_way() -> None:
    assert read_clip(clip_of(RED_CIRCLE)[::-1].copy()).direction == "left"


def test_an_object_at_rest_has_no_direction() -> None:
    frames = clip_of(RED_CIRCLE)
    still = np.repeat(frames[7:8], FRAMES, axis=0)
    reading = read_clip(still)
    assert reading.direction is None
    assert (reading.colour, reading.shape) == ("red", "circle")


def test_an_object_that_jumps_about_has_no_direction() -> None:
    order = np.random.default_rng(0).permutation(FRAMES)
    assert read_clip(clip_of(RED_CIRCLE)[order]).direction is None


def test_a_diagonal_motion_has_no_direction() -> None:
    frames = clip_of(RED_CIRCLE)
    sheared = np.stack([np.roll(frame, 3 * t - 24, axis=0) for t, frame in enumerate(frames)])
    assert read_clip(sheared).direction is None


def test_a_flat_clip_shows_only_a_background() -> None:
    flat = np.broadcast_to(np.array(COLOURS["green"]) / 255, (FRAMES, 96, 96, 3))
    assert read_clip(flat) == Reading(None, "green", None, None, 0.0, 0.0)


def test_noise_shows_no_object() -> None:
    noise = np.random.default_rng(0).random((FRAMES, 64, 64, 3))
    reading = read_clip(noise)
    assert (reading.direction, reading.shape) == (None, None)


def test_a_colour_between_two_names_has_no_name() -> None:
    frames = clip_of(RED_CIRCLE).copy()
    between = (np.array(COLOURS["blue"]) + np.array(COLOURS["black"])) / 510
    frames[(frames[..., 2] > frames[..., 0])] = between
    assert read_clip(frames).background is None


def test_a_bar_is_no_known_shape() -> None:
    frames = np.zeros((FRAMES, 96, 96, 3))
    for t in range(FRAMES):
        frames[t, 10:86, 10 + 4 * t : 16 + 4 * t] = 1
    reading = read_clip(frames)
    assert reading.shape is None
    assert reading.direction == "right"


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (np.zeros((16, 8, 8)), ValueError),
        (np.zeros((16, 8, 8, 4)), ValueError),
        (np.zeros((16, 8, 8, 3), dtype=np.int32), TypeError),
        (np.full((16, 8, 8, 3), 2.0), ValueError),
        (np.full((16, 8, 8, 3), np.nan), ValueError),
    ],
)
def test_impossible_frames_are_refused(frames: NDArray[np.generic], error: type) -> None:
    with pytest.raises(error, match="frames must"):
        read_clip(frames)
