"""Runs of ``diffattn generate`` from the prompt to the file."""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

PROMPT = "a red circle moving right"


def frames(path: Path) -> np.ndarray:
    return iio.imread(path, plugin="FFMPEG") if path.suffix == ".mp4" else iio.imread(path)


def png_frames(folder: Path) -> np.ndarray:
    return np.stack([iio.imread(path) for path in sorted(folder.glob("frame_*.png"))])


class TestFiles:
    def test_mp4_has_the_frames_and_rate_that_were_asked_for(self, generate, tmp_path):
        result = generate(PROMPT, "-o", "out.mp4", "--attn", "dense")
        assert result.code == 0, result.err
        assert result.err == ""
        assert frames(tmp_path / "out.mp4").shape == (5, 32, 48, 3)
        metadata = iio.immeta(tmp_path / "out.mp4", plugin="FFMPEG")
        assert metadata["fps"] == 8
        assert metadata["codec"] == "h264"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4"]
