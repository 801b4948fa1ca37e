"""The bundled model through the command line, with no option but the prompt."""

from pathlib import Path

import imageio.v3 as iio
import pytest

from diffattn.samples.moving_shapes.clips import FRAMES, SIZE
from diffattn.samples.moving_shapes.evaluate import Sampling

PROMPT = "a red circle moving right on a blue background"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # Nothing may be asked of the hub.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_its_own_settings_are_the_defaults(diffattn, here, record):
    result = diffattn("generate", PROMPT, "-o", "out.mp4", "--steps", 2)
    assert result.code == 0, result.err
    assert result.err == ""
    assert iio.imread(here / "out.mp4", plugin="FFMPEG").shape == (FRAMES, SIZE, SIZE, 3)
    settings = record("out.json")["settings"]
    assert settings["model"] == "moving-shapes"
    assert settings["guidance_scale"] == Sampling.guidance
    assert record("out.json")["attention"]["density"] < 1


def test_the_number_of_steps_is_its_own(diffattn, here, record):
    assert diffattn("generate", PROMPT, "-o", "out.gif", "--num-frames", 1).code == 0
    assert record("out.json")["settings"]["steps"] == Sampling.steps


def test_words_it_does_not_know_are_told_with_those_it_does(diffattn, here):
    options = ["--steps", 1, "--num-frames", 1, "--attn", "dense"]
    result = diffattn("generate", "a pink dog moving up", "-o", "out.gif", *options)
    assert result.code == 0
    assert result.err.startswith("warning: the model does not know pink, dog; its words are: a ")
    assert "triangle" in result.err
    assert result.err.count("\n") == 1


def test_sizes_it_cannot_make_are_refused_with_the_nearest(diffattn, here):
    error = diffattn("generate", PROMPT, "-o", "out.gif", "--height", 90).error
    assert error == "height is 90, but this model needs a multiple of 16: try 80 or 96"
