"""Runs of ``diffattn upscale`` on tiny pipelines that make pictures."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_complete import COMPLETE


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a tiny pipeline."""
    folder = tmp_path_factory.mktemp("pictures")

    def save(name: str) -> Path:
        if not (folder / name).is_dir():
            COMPLETE[name].build().save_pretrained(folder / name)
        return folder / name

    return save


@pytest.fixture
def upscale(diffattn, pictures, tmp_path: Path, monkeypatch) -> Callable:
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object):
        model = pictures(name)
        base = [] if "--input" in arguments else ["--base-steps", 1]
        return diffattn("upscale", "a cat", "--model", model, *base, "--steps", 4, *arguments)

    return run


@pytest.mark.parametrize("name", ["sd1.5", "sdxl"])
def test_from_a_prompt(upscale, tmp_path, record, name):
    result = upscale(name, "--height", 96, "--strengths", "0.5,0.25", "-o", "out.png")
    assert result.code == 0, result.err
    assert Image.open("out.png").size == (96, 96)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "out.png.json"]
    head, *lines = result.out.splitlines()
    assert head.endswith("; 24x24 to 48x48 to 96x96")
    assert lines[0].startswith("96x96 will take about 0.0")
    assert lines[1] == "24x24: made from the prompt, 1 steps"
    assert "48x48: strength 0.5, 2 of 4 steps" in lines
    assert "96x96: strength 0.25, 1 of 4 steps" in lines
    assert lines[-1].startswith("out.png: 96x96, ")
    written = record("out.json")
    assert written["base"]["height"] == 24
    assert written["sizes"][1] == {"height": 96, "width": 96, "strength": 0.25}


def test_from_a_picture_with_a_method(upscale, tmp_path, record):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("in.png")
    options = ["--input", "in.png", "--strengths", "0.5"]
    plain = upscale("sd1.5", *options, "-o", "plain.png")
    assert plain.code == 0, plain.err
    config = tmp_path / "config.png.json"
    config.write_text(json.dumps({"type": "agent", "ratio": 0.5, "last_dense_steps": 0}))
    result = upscale("sd1.5", *options, "-o", "agent.webp", "--attn-config", config)
    assert result.code == 0, result.err
    assert record("agent.json")["settings"]["attention"]["ratio"] == 0.5
    result = upscale("sd1.5", *options, "-o", "config.png", "--attn-config", config)
    assert result.error == "-o config.png would overwrite config.png.json, which is read here"
    assert (np.asarray(Image.open("plain.png")) != np.asarray(Image.open("agent.webp"))).any()
    assert Image.open("plain.png").size == (64, 48)


def test_pictures_are_read_as_they_are_shown(upscale, tmp_path):
    pixels = np.full((24, 32, 4), (200, 40, 40, 255), np.uint8)
    pixels[:, :16] = (0, 0, 255, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(pixels).save("in.png", exif=exif)
    options = ["--input", "in.png", "--strengths", "0.5"]
    result = upscale("sd1.5", *options, "-o", "shown.png")
    assert result.code == 0, result.err
    assert "note: in.png: transparent areas are shown on white" in result.out.splitlines()
    white = np.full((32, 24, 3), 255, np.uint8)
    white[16:] = (200, 40, 40)
    Image.fromarray(white).save("in.png")
    assert upscale("sd1.5", *options, "-o", "white.png").code == 0
    assert (np.asarray(Image.open("shown.png")) == np.asarray(Image.open("white.png"))).all()


def test_ones_own_json_file_stays(upscale, tmp_path):
    (tmp_path / "out.webp.json").write_text('{"mine": 1}')
    error = upscale("sd1.5", "-o", "out.webp").error
    assert error.startswith("-o out.webp would overwrite out.webp.json, which is no record of")
    assert (tmp_path / "out.webp.json").read_text() == '{"mine": 1}'


def test_the_same_seed_is_the_same_picture(upscale):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = upscale("sd1.5", "--strengths", "0.5", "--seed", seed, "-o", f"{name}.png")
        assert result.code == 0, result.err
    a, b, c = (np.asarray(Image.open(f"{name}.png")) for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_in_bfloat16_with_a_name_of_its_own(upscale):
    for name in ("a-cat.png", "a-cat-2.png"):
        result = upscale("sdxl", "--strengths", "0.5", "--dtype", "bfloat16", "--guidance-scale", 1)
        assert result.code == 0, result.err
        assert Path(name).is_file()


def test_flux(upscale):
    # Its own size is 128 latents of 2 pixels.
    result = upscale("flux", "--base-height", 16, "--base-width", 24, "-o", "out/")
    assert result.code == 0, result.err
    assert Image.open("out/a-cat-seed0.png").size == (48, 32)
    assert "48x32: strength 0.7" in result.out
    # Its steps are lines of this command, not a bar of diffusers'.
    assert "upscale: step 3/3" in result.out
    assert re.search(r"^first picture: step (\d+)/\1,", result.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sd1.5", ["--cache-steps", "2"], "--cache-steps cannot be given with a model of pictures"),
        ("sd1.5", ["--strength", "0.3"], "--strength cannot .* for pictures it is --strengths"),
        ("sd1.5", ["--strengths", "a"], "--strengths must be numbers with commas between, such as"),
        ("sd1.5", ["--strengths", "0"], "strength must be above 0 and at most 1, not 0"),
        ("sd1.5", ["--height", "24"], "the picture is to be 24x24, but it starts from 24x24"),
        ("sd1.5", ["--height", "97"], "height is 97, but this model needs a multiple of 2"),
        ("sd1.5", ["--height", "0"], "--height must be a whole number of at least 1, not 0"),
        ("sd1.5", ["--steps", "0"], "--steps must be a whole number of at least 1, not 0"),
        ("sd1.5", ["--input", __file__, "--base-width", "8"], "--base-width is of a first picture"),
        ("sd1.5", ["-o", "a.mp4"], "cannot write a.mp4: the extension must be .png, .jpg"),
        ("sd1.5", ["--input", "none.png"], "there is no picture file none.png"),
        ("sd1.5", ["--input", __file__], "cannot read .* as a picture: cannot identify image file"),
        ("sd1.5", ["--attn", "agent", "--attn-arg", "ratio=2"], "ratio is 2, but must be a share"),
        ("sd1.5", ["--attn-arg", "ratio=0.2"], "--attn-arg needs a method: give --attn too"),
        ("flux", ["--negative-prompt", "x"], "--negative-prompt has no effect on Flux"),
        ("flux", ["--strengths", "0.5,0.4"], "--strengths must be one number for Flux"),
    ],
)
def test_bad_input(upscale, tmp_path, name, options, message):
    import re

    error = upscale(name, *options).error
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


def test_the_picture_that_is_read_is_not_overwritten(upscale):
    Image.new("RGB", (8, 8)).save("in.png")
    assert (
        "would overwrite in.png, which is read"
        in upscale("sd1.5", "--input", "in.png", "-o", "in.png").error
    )


def test_options_for_pictures_are_refused_with_videos(diffattn, tiny_wan):
    error = diffattn("upscale", "a cat", "--model", tiny_wan, "--attn", "agent").error
    assert error.startswith("--attn cannot be given with a model of videos, whose two paths are Fr")
