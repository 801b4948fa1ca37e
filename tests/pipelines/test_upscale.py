"""Runs of ``diffattn upscale`` on a tiny pipeline."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest

from diffattn.pipelines.freeswim.pipeline import NEGATIVE_PROMPT
from diffattn.pipelines.run import upscale_video as upscale_module
from diffattn.pipelines.run.loading import read_defaults
from diffattn.pipelines.run.request import BUNDLED_MODEL
from diffattn.pipelines.run.video import write_video
from diffattn.samples.moving_shapes import MODEL_DIR

SIZE = ["--base-height", "32", "--base-width", "48"]
BASE = [*SIZE, "--num-frames", "5", "--base-steps", "1"]


@pytest.fixture
def upscale(diffattn, tiny_wan: Path, tmp_path: Path, monkeypatch) -> Callable:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object):
        base = SIZE if "--input" in arguments else BASE
        return diffattn("upscale", "a circle", "--model", tiny_wan, *base, "--steps", 3, *arguments)

    return run


def test_from_a_prompt(upscale, tmp_path, record):
    result = upscale("-o", "out.mp4", "--height", 60)
    assert result.code == 0, result.err
    assert iio.imread(tmp_path / "out.mp4", plugin="FFMPEG").shape == (5, 64, 96, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.mp4.json"]
    lines = result.out.splitlines()
    assert lines[0] == "48x32 to 96x64 (asked for 90x60), 5 frames"
    assert lines[1].startswith("2 steps, 1 of them guided by all tokens; 0.0 MiB (device)")
    assert lines[-1].startswith("out.mp4: 5 frames 96x64, ")
    steps = [line.partition(",")[0] for line in lines if ": step " in line]
    assert steps == ["base video: step 1/1", "upscale: step 1/2", "upscale: step 2/2"]
    written = record("out.json")
    assert written["settings"]["height"] == 60
    assert written["frames"] == [5, 64, 96]
    assert (written["steps"], written["guide_steps"]) == (2, 1)
    assert written["store_bytes"] == 2 * 48 * 32 * 4


def test_from_a_video_with_its_rate(upscale, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (7, 32, 48, 3), np.uint8)
    write_video(tmp_path / "in.mp4", frames, 12)
    result = upscale("--input", "in.mp4", "-o", "out.mp4")
    assert result.code == 0, result.err
    # Four frames a latent and one: two are left out.
    assert result.out.splitlines()[0] == "48x32 to 96x64, 5 of 7 frames"
    assert "base video: step" not in result.out
    assert iio.imread(tmp_path / "out.mp4", plugin="FFMPEG").shape == (5, 64, 96, 3)
    assert iio.immeta(tmp_path / "out.mp4", plugin="FFMPEG")["fps"] == 12


@pytest.mark.parametrize(("name", "fps"), [("in.gif", 12.5), ("in.png", 8)])
def test_from_every_format_that_diffattn_writes(upscale, tmp_path, name, fps):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    write_video(tmp_path / name, frames, 12.5)
    result = upscale("--input", name.removesuffix(".png"), "-o", "out.mp4")
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == "48x32 to 96x64, 5 frames"
    # Frames in a folder have no rate: the model's is taken.
    assert iio.immeta(tmp_path / "out.mp4", plugin="FFMPEG")["fps"] == fps


def test_from_a_video_as_it_is_shown(upscale, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 48, 32, 3), np.uint8)
    write_video(tmp_path / "tall.mp4", frames, 12)
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-display_rotation", "90", "-i", "tall.mp4"]
    subprocess.run([*program, "-c", "copy", "in.mp4"], check=True, capture_output=True)
    result = upscale("--input", "in.mp4", "-o", "out.mp4")
    assert result.out.splitlines()[0] == "48x32 to 96x64, 5 frames"


def test_a_failed_ffmpeg_is_told_and_the_former_files_stay(upscale, tmp_path, fake_ffmpeg):
    assert upscale("-o", "out.mp4").code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fake_ffmpeg('case "$*" in *"-f null"*) exec "$real" "$@" ;; *) kill -9 $$ ;; esac')
    error = upscale("-o", "out.mp4", "--seed", 5).error
    assert error == "cannot write out.mp4: ffmpeg failed: ended by SIGKILL"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_to_avoid_is_the_papers_the_models_or_ones_own(upscale, tmp_path, record):
    small = ["--strength", "0.4", "--guidance-scale", "3"]
    assert upscale("-o", "a.mp4", *small).code == 0
    assert upscale("-o", "b.mp4", *small, "--negative-prompt", "a square").code == 0
    assert record("a.json")["settings"]["negative_prompt"] == NEGATIVE_PROMPT
    assert record("b.json")["settings"]["negative_prompt"] == "a square"
    assert read_defaults(BUNDLED_MODEL, MODEL_DIR)["negative_prompt"] == ""


def test_words_that_the_model_does_not_know(diffattn, tiny_wan_few_words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model", tiny_wan_few_words, *BASE, "--steps", 2, "-o", "out.png"]
    result = diffattn("upscale", "a blue circle", *options)
    assert result.code == 0, result.err
    warning = "warning: the model does not know blue; its words are: a red circle"
    assert warning in result.err.splitlines()


@pytest.mark.parametrize(("cache_steps", "guided"), [("1", [4, 2]), ("none", [4, 4])])
def test_guidance_in_every_step(upscale, monkeypatch, record, cache_steps, guided):
    from diffusers import WanTransformer3DModel

    rows: list[int] = []
    forward = WanTransformer3DModel.forward

    def counted(model, hidden_states, *args, **kwargs):
        rows.append(2 * len(hidden_states))
        return forward(model, hidden_states, *args, **kwargs)

    monkeypatch.setattr(WanTransformer3DModel, "forward", counted)
    assert upscale("-o", "a.png", "--cache-steps", cache_steps).code == 0
    # After the base video's one step with the prompt and without it.
    assert rows == [2, 2, *guided, *guided]
    written = record("a.json")
    assert written["settings"]["cache_steps"] == {"1": 1, "none": None}[cache_steps]
    assert (written["guide_steps"], written["store_bytes"]) == (2, 0)


def test_ltx_is_told_the_rate_of_the_video(diffattn, tiny_ltx, tmp_path, monkeypatch, record):
    from diffusers import LTXVideoTransformer3DModel

    monkeypatch.chdir(tmp_path)
    told = set()
    forward = LTXVideoTransformer3DModel.forward

    def noted(*args, **kwargs):
        told.add(kwargs["rope_interpolation_scale"][0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(LTXVideoTransformer3DModel, "forward", noted)
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), np.uint8)
    write_video(tmp_path / "in.mp4", frames, 16)
    options = ["--base-height", 64, "--base-width", 96, "--steps", 3]
    result = diffattn(
        "upscale", "a circle", "--model", tiny_ltx, "--input", "in.mp4", "-o", "out.mp4", *options
    )
    assert result.code == 0, result.err
    assert told == {8 / 16}
    assert iio.imread(tmp_path / "out.mp4", plugin="FFMPEG").shape == (9, 128, 192, 3)
    assert record("out.json")["frames"] == [9, 128, 192]


def test_the_seed_decides(upscale, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert upscale("-o", f"{name}.png", "--seed", seed).code == 0
    a, b, c = (iio.imread(tmp_path / name / "frame_0002.png") for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none.mp4"], "there is no video file none.mp4"),
        (["--input", "text.mp4"], "cannot read text.mp4 as a video: "),
        (["--input", "text.txt"], "cannot read text.txt as a video: the extension must be one of "),
        (["--input", "empty"], "there are no frames frame_0000.png and so on in the folder empty"),
        (["--input", "out.mp4"], "-o out.mp4 would overwrite out.mp4, which is read here"),
        (
            ["--input", "in.mp4", "--num-frames", "5"],
            "--num-frames is of a base video, but --input ",
        ),
        (
            ["--input", "in.mp4", "--base-steps", "5"],
            "--base-steps is of a base video, but --input ",
        ),
        (["--cache-steps", "0"], "--cache-steps must be a whole number of at least 1, or none to"),
        (["--cache-steps", "all"], "--cache-steps must be a whole number of at least 1, or none "),
        (["--steps", "0"], "--steps must be a whole number of at least 1, not 0"),
        (["--base-steps", "0"], "--base-steps must be a whole number of at least 1, not 0"),
        (["--base-width", "-16"], "--base-width must be a whole number of at least 1, not -16"),
        (["--base-height", "30"], "height is 30, but this model needs a multiple of 16"),
    ],
)
def test_bad_input_is_one_line(upscale, tmp_path, arguments, message):
    for name in ("text.mp4", "text.txt"):
        (tmp_path / name).write_text("no video")
    (tmp_path / "empty").mkdir()
    error = upscale("-o", "out.mp4", *arguments).error
    assert message in error
    assert len(error) < 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "text.mp4", "text.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "8k"], "preset is '8k', but must be one of 1080p, 1440p, 2160p"),
        (["--preset", "1080p", "--width", "64"], "give a preset, or height and width, not both"),
        (["--height", "0"], "height is 0, but must be at least 1"),
        (["--strength", "2"], "strength is 2.0, but must be above 0 and up to 1"),
        (["--store", "disk"], "store is 'disk', but must be one of device, cpu, pinned"),
        (["--interpolation", "x"], "interpolation is 'x', but must be one of nearest, bilinear"),
        (["--flow-shift", "inf"], "flow_shift is inf, but must be a number above 0"),
    ],
)
def test_what_is_wrong_for_every_model_is_refused_before_one_is_loaded(
    upscale, monkeypatch, arguments, message
):
    def load(request):
        pytest.fail("loaded a model first")

    monkeypatch.setattr(upscale_module, "load_model", load)
    assert message in upscale("-o", "out.mp4", *arguments).error
