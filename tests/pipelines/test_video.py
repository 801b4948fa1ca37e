"""The three formats, read back."""

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from diffattn.pipelines.run.video import write_video


@pytest.fixture
def clip() -> np.ndarray:
    """Seven frames in which a light square moves right, (7, 32, 48, 3)."""
    frames = np.full((7, 32, 48, 3), (20, 40, 160), np.uint8)
    for index, frame in enumerate(frames):
        frame[8:24, 4 * index : 4 * index + 16] = (240, 200, 40)
    return frames


def test_mp4_keeps_frames_size_and_rate(tmp_path, clip):
    path = tmp_path / "out.mp4"
    write_video(path, clip, 12)
    read = iio.imread(path, plugin="FFMPEG")
    assert read.shape == clip.shape
    assert np.abs(read.astype(int) - clip).mean() < 6
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == 12


def test_mp4_of_odd_sides_is_padded_not_scaled(tmp_path, clip):
    path = tmp_path / "out.mp4"
    write_video(path, clip[:, :31, :47], 12)
    assert iio.imread(path, plugin="FFMPEG").shape == clip.shape


def test_gif_keeps_frames_size_and_rate(tmp_path, clip):
    path = tmp_path / "out.gif"
    write_video(path, clip, 10)
    with Image.open(path) as image:
        assert image.n_frames == 7
        assert image.size == (48, 32)
        assert image.info["duration"] == 100
        assert image.info["loop"] == 0


def test_png_frames_are_exact_and_in_order(tmp_path, clip):
    write_video(tmp_path / "out.png", clip, 10)
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == [f"frame_{i:04d}.png" for i in range(7)]
    assert (np.stack([iio.imread(path) for path in files]) == clip).all()


def test_capitals_in_the_extension_do_not_matter(tmp_path, clip):
    write_video(tmp_path / "OUT.MP4", clip, 10)
    assert iio.imread(tmp_path / "OUT.MP4", plugin="FFMPEG").shape == clip.shape


def test_one_frame_is_a_video(tmp_path, clip):
    for name in ("out.mp4", "out.gif", "out.png"):
        write_video(tmp_path / name, clip[:1], 10)
    assert iio.imread(tmp_path / "out.mp4", plugin="FFMPEG").shape == (1, 32, 48, 3)
