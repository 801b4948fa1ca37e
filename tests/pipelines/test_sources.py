"""Runs that start from pictures and videos, and runs that make pictures."""

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import imageio.v3 as iio
import numpy as np
import pytest
import tiny_complete
import tiny_wan
import torch
from PIL import Image

from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.pipeline_class import edits, makes_pictures, pipeline_class
from diffattn.pipelines.run.request import Request
from diffattn.pipelines.run.sources import fitted, fitting_size

from .test_generate import png_frames

PROMPT = "a red circle"
DENSE = ("--attn", "dense")
NARROW = ("--attn", "gna", "--attn-arg", "window=1,1,1")
VIDEO = ("--height", 64, "--width", 96, "--num-frames", 9, "--steps", 2)
PICTURE = ("--height", 64, "--width", 96, "--steps", 2)


@pytest.fixture(autouse=True)
def _ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of Wan's pipelines use the package without asking whether it is installed."""
    for name in ("pipeline_wan_i2v", "pipeline_wan_video2video", "pipeline_wan_vace"):
        module = importlib.import_module(f"diffusers.pipelines.wan.{name}")
        stub = SimpleNamespace(fix_text=lambda text: text)
        monkeypatch.setattr(module, "ftfy", stub, raising=False)


def _pipelines() -> dict[str, tuple[Callable[[], Any], dict[str, Any]]]:
    """Makers of pipelines, and what their `generation.json` says."""
    short = {"max_sequence_length": 16}

    def over(cls: str, pipe: Any, **changes: Any) -> Any:
        return getattr(diffusers, cls)(**{**pipe.components, **changes})

    def i2v() -> Any:
        parts = {"image_encoder": None, "image_processor": None}
        parts["transformer"] = tiny_wan.transformer(in_channels=36)
        return over("WanImageToVideoPipeline", tiny_complete.wan(), **parts)

    def vace() -> Any:
        parts = {"transformer": tiny_wan.vace_transformer(), "transformer_2": None}
        return over("WanVACEPipeline", tiny_complete.wan(), **parts)

    def condition() -> Any:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return over("LTXConditionPipeline", tiny_complete._ltx(), scheduler=scheduler)

    return {
        "wan": (tiny_complete.wan, short | {"fps": 8}),
        "wan-i2v": (i2v, short | {"fps": 8}),
        "cogvideox": (
            lambda: tiny_complete._cogvideox(diffusers.CogVideoXDDIMScheduler),
            {"max_sequence_length": 7},
        ),
        "wan-ti2v": (tiny_complete._wan_ti2v, short),
        "vace": (vace, short),
        "ltx": (tiny_complete._ltx, short),
        "ltx-condition": (condition, short),
        "flux": (tiny_complete._flux, short),
        "kontext": (
            lambda: over("FluxKontextPipeline", tiny_complete._flux()),
            short | {"_auto_resize": False},
        ),
        "sd": (tiny_complete._sd, {}),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pipeline, by its name."""
    home = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        path = home / name
        if not path.exists():
            build, defaults = _pipelines()[name]
            build().save_pretrained(path)
            (path / "generation.json").write_text(json.dumps(defaults))
        return path

    return folder


@pytest.fixture
def make(diffattn: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `diffattn generate` on a model, beside two pictures of 64 x 96 and one of 60 x 200."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("a.png", (64, 96)), ("b.png", (64, 96)), ("wide.png", (60, 200))):
        seed = sum(map(ord, name))
        noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)

    def run(name: str, *arguments: Any, prompt: tuple[str, ...] = (PROMPT,)) -> Any:
        return diffattn("generate", *prompt, "--model", model(name), *arguments)

    return run


def own(pipe: Any, frames: int | None = 9, **call: Any) -> np.ndarray:
    """What a pipeline itself makes of a call, as uint8 frames."""
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 96, "num_inference_steps": 2} | call
    call |= {} if frames is None else {"num_frames": frames}
    call = {name: value for name, value in call.items() if value is not None}
    out = pipe(prompt=PROMPT, **call, generator=torch.Generator().manual_seed(0), output_type="np")
    made = out.images if hasattr(out, "images") else out.frames[0]
    return (made * 255).round().clip(0, 255).astype(np.uint8)


def picture(name: str = "a.png") -> Image.Image:
    return Image.open(name).convert("RGB")


class TestVideosFromPictures:
    def test_the_first_and_the_last_frame(self, make, model, tmp_path):
        frames = ("--image", "a.png", "--last-image", "b.png")
        assert make("wan-i2v", *VIDEO, *frames, *DENSE, "-o", "out.png").code == 0
        pipe = diffusers.WanImageToVideoPipeline.from_pretrained(model("wan-i2v"))
        given = {"image": picture(), "last_image": picture("b.png")}
        want = own(pipe, **given, max_sequence_length=16)
        assert (png_frames(tmp_path / "out") == want).all()
        assert make("wan-i2v", *VIDEO, *frames, *NARROW, "-o", "sparse.png").code == 0
        assert (png_frames(tmp_path / "sparse") != want).any()

    def test_a_run_from_a_picture_is_repeated_from_its_record(self, make, tmp_path, diffattn):
        first = make("wan-i2v", *VIDEO, "--image", "a.png", *NARROW, "-o", "out.png")
        assert first.code == 0, first.err
        settings = json.loads((tmp_path / "out.png.json").read_text())["settings"]
        assert settings["image"] == [str(tmp_path / "a.png")]
        assert diffattn("generate", "--from", "out.png.json", "-o", "again.png").code == 0
        assert (png_frames(tmp_path / "again") == png_frames(tmp_path / "out")).all()

    def test_wans_small_model_takes_a_picture_or_none(self, make):
        size = ("--height", 32, "--width", 64, "--num-frames", 5, "--steps", 1, *DENSE)
        with_picture = make("wan-ti2v", "--image", "a.png", *size, "-o", "a.gif")
        assert ": WanImageToVideoPipeline, " in with_picture.out, with_picture.err
        assert ": WanPipeline, " in make("wan-ti2v", *size, "-o", "b.gif").out

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_ltx_starts_from_a_picture(self, make, model, tmp_path, dtype):
        arguments = ("--image", "a.png", "--dtype", dtype, *DENSE, "-o", "out.png")
        result = make("ltx", *VIDEO, *arguments)
        assert result.code == 0, result.err
        pipe = diffusers.LTXImageToVideoPipeline.from_pretrained(
            model("ltx"), torch_dtype=getattr(torch, dtype)
        )
        want = own(pipe, image=picture(), max_sequence_length=16)
        assert (png_frames(tmp_path / "out") == want).all()

    def test_ltx_has_conditions_on_both_ends(self, make, model, tmp_path):
        from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

        frames = ("--image", "a.png", "--last-image", "b.png")
        result = make("ltx-condition", *VIDEO, *frames, *DENSE, "-o", "out.png")
        assert result.code == 0, result.err
        pipe = diffusers.LTXConditionPipeline.from_pretrained(model("ltx-condition"))
        conditions = [
            LTXVideoCondition(image=picture(), frame_index=0),
            LTXVideoCondition(image=picture("b.png"), frame_index=8),
        ]
        want = own(pipe, conditions=conditions, max_sequence_length=16)
        assert (png_frames(tmp_path / "out") == want).all()
        assert make("ltx-condition", *VIDEO, *frames, *NARROW, "-o", "sparse.png").code == 0
        assert (png_frames(tmp_path / "sparse") != want).any()

    def test_reference_pictures_keep_their_size(self, make, model, tmp_path):
        pictures = ("--image", "wide.png", "--image", "b.png")
        assert make("vace", *VIDEO, *pictures, *DENSE, "-o", "out.png").code == 0
        pipe = diffusers.WanVACEPipeline.from_pretrained(model("vace"))
        references = [picture("wide.png"), picture("b.png")]
        want = own(pipe, reference_images=references, max_sequence_length=16)
        assert (png_frames(tmp_path / "out") == want).all()

    def test_the_size_follows_the_picture(self, make, tmp_path):
        arguments = ("--image", "wide.png", "--num-frames", 5, "--steps", 1, *DENSE)
        assert make("wan-i2v", *arguments, "--height", 32, "-o", "out.gif").code == 0
        settings = json.loads((tmp_path / "out.gif.json").read_text())["settings"]
        assert (settings["height"], settings["width"]) == (32, 112)

    def test_the_size_of_a_model_that_keeps_it_to_itself(self, make, tmp_path):
        arguments = ("--num-frames", 9, "--steps", 1, *DENSE, "-o", "out.gif")
        result = make("cogvideox", *arguments)
        assert result.code == 0, result.err
        settings = json.loads((tmp_path / "out.gif.json").read_text())["settings"]
        # Of the model's configuration: latents of 8 pixels.
        config = json.loads((tmp_path / settings["model"] / "transformer/config.json").read_text())
        want = (config["sample_height"] * 8, config["sample_width"] * 8)
        assert (settings["height"], settings["width"]) == want

    def test_a_size_that_the_model_changes_is_told(self, make, monkeypatch):
        call = diffusers.WanPipeline.__call__

        def smaller(self, *args, **kwargs):
            out = call(self, *args, **kwargs)
            out.frames = out.frames[:, :, :-16]
            return out

        monkeypatch.setattr(smaller, "__signature__", inspect.signature(call), raising=False)
        monkeypatch.setattr(diffusers.WanPipeline, "__call__", smaller)
        result = make("wan", *VIDEO, *DENSE, "-o", "out.gif")
        assert "warning: the model made 96x48 pixels, not 96x64" in result.err, result.err

    def test_a_package_that_a_pipeline_lacks_is_named(self, make, monkeypatch):
        module = importlib.import_module("diffusers.pipelines.wan.pipeline_wan_i2v")
        monkeypatch.delattr(module, "ftfy")
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name == "ftfy" else find(name, *a)
        )
        error = make("wan-i2v", *VIDEO, "--image", "a.png", *DENSE, "-o", "out.gif").error
        assert error == "WanImageToVideoPipeline needs the package ftfy: pip install ftfy"


class TestVideosFromVideos:
    @pytest.fixture
    def clip(self, make, tmp_path) -> list[Image.Image]:
        """The ten frames of in.gif, shown for 0.125 s each."""
        rng = np.random.default_rng(0)
        frames = [Image.fromarray(rng.integers(0, 2, (64, 96), dtype=np.uint8) * 255)]
        frames += [frames[0].rotate(36 * i) for i in range(1, 10)]
        delays = [120, 130] * 5  # in hundredths of a second
        frames[0].save(
            tmp_path / "in.gif", save_all=True, append_images=frames[1:], duration=delays
        )
        return [frame.convert("RGB") for frame in frames]

    def test_a_video_is_changed(self, make, model, clip, tmp_path):
        size = ("--height", 64, "--width", 96, "--steps", 4, "--strength", 0.5)
        result = make("wan", "--input", "in.gif", *size, *DENSE, "-o", "out.png")
        assert result.code == 0, result.err
        # Of ten frames nine: Wan makes 4 * k + 1.
        assert ": WanVideoToVideoPipeline, " in result.out
        assert "; 9 frames 96x64, " in result.out
        pipe = diffusers.WanVideoToVideoPipeline.from_pretrained(model("wan"))
        call = {"strength": 0.5, "num_inference_steps": 4, "max_sequence_length": 16}
        want = own(pipe, frames=None, video=clip[:9], **call)
        assert (png_frames(tmp_path / "out") == want).all()

    def test_the_number_of_frames_may_be_given(self, make, clip, tmp_path):
        size = ("--height", 32, "--width", 48, "--steps", 2, "--num-frames", 5)
        assert make("wan", "--input", "in.gif", *size, *DENSE, "-o", "out.png").code == 0
        assert len(png_frames(tmp_path / "out")) == 5
        again = make("wan", "--from", "out.png.json", "-o", "again.png", prompt=())
        assert again.code == 0, again.err
        assert (png_frames(tmp_path / "again") == png_frames(tmp_path / "out")).all()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ("--num-frames", 13),
                "--input .*in.gif has 10 frames at 8 frames a second, fewer than --num-frames 13",
            ),
            (("--num-frames", 6), "num_frames is 6, but this model needs 4 * k + 1: try 5 or 9"),
        ],
    )
    def test_numbers_of_frames_that_cannot_be(self, make, clip, arguments, message):
        size = ("--height", 32, "--width", 48)
        error = make("wan", "--input", "in.gif", *size, *arguments, "-o", "out.gif").error
        begin, _, end = message.partition(".*")
        assert error.startswith(begin)
        assert error.endswith(end)


class TestPictures:
    def test_a_picture_of_a_prompt(self, make, model, tmp_path):
        result = make("flux", *PICTURE, *DENSE, "-o", "out.png")
        assert result.code == 0, result.err
        assert "; 96x64, 2 steps, guidance 3.5, seed 0" in result.out
        assert result.out.splitlines()[-1].startswith("out.png: 96x64, ")
        pipe = diffusers.FluxPipeline.from_pretrained(model("flux"))
        want = own(pipe, frames=None, max_sequence_length=16)
        assert (iio.imread("out.png") == want[0]).all()
        record = json.loads((tmp_path / "out.png.json").read_text())
        assert record["files"] == {"picture": "out.png"}
        assert record["settings"]["num_frames"] == 1
        assert record["settings"]["fps"] is None

    def test_the_default_method_leaves_pairs_out(self, make, tmp_path):
        result = make("flux", *PICTURE, "-o", "out.png")
        assert (result.code, result.err) == (0, "")
        attention = json.loads((tmp_path / "out.png.json").read_text())["attention"]
        assert attention["method"]["type"] == "gna"
        assert attention["density"] < 0.5
        repeated = make("flux", "--from", "out.png.json", "-o", "again.png", prompt=())
        assert repeated.code == 0, repeated.err
        assert (iio.imread("again.png") == iio.imread("out.png")).all()

    @pytest.mark.parametrize("suffix", [".jpg", ".webp", ".JPEG"])
    def test_a_comparison_in_each_format(self, make, tmp_path, suffix):
        result = make("flux", *PICTURE, "--compare", "-o", f"out{suffix}")
        assert result.code == 0, result.err
        assert "gna against dense: PSNR " in result.out
        stems = ("out", "out.compare", "out.dense")
        names = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out"))
        assert names == sorted([*(f"{stem}{suffix}" for stem in stems), f"out{suffix}.json"])
        assert Image.open(f"out{suffix}").size == (96, 64)
        assert Image.open(f"out.compare{suffix}").width > 2 * 96

    def test_pictures_of_several_prompts_are_numbered(self, make, tmp_path):
        (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
        arguments = (*PICTURE, *DENSE, "--prompts-file", "prompts.txt", "-o", "made/")
        assert make("flux", *arguments, prompt=()).code == 0
        made = sorted(path.name for path in (tmp_path / "made").glob("*.png"))
        assert made == ["01-a-cat-seed0.png", "02-a-dog-seed0.png"]
        assert not list((tmp_path / "made").glob("*/"))

    def test_a_picture_is_changed(self, make, model, tmp_path):
        arguments = ("--image", "a.png", "--strength", 0.5, "--steps", 4, *DENSE)
        result = make("flux", "--height", 64, *arguments, "-o", "out.png")
        assert ": FluxImg2ImgPipeline, " in result.out, result.err
        pipe = diffusers.FluxImg2ImgPipeline.from_pretrained(model("flux"))
        call = {"strength": 0.5, "num_inference_steps": 4, "max_sequence_length": 16}
        want = own(pipe, frames=None, image=picture(), **call)
        assert (iio.imread("out.png") == want[0]).all()

    def test_a_pipeline_that_takes_the_size_of_its_picture(self, make, model):
        arguments = ("--image", "wide.png", "--height", 40, "--width", 64, "--steps", 5, *DENSE)
        result = make("sd", *arguments, "-o", "out.png")
        assert ": StableDiffusionImg2ImgPipeline, " in result.out, result.err
        pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(
            model("sd"), safety_checker=None
        )
        image = fitted(picture("wide.png"), 40, 64)
        call = {"height": None, "width": None, "num_inference_steps": 5}
        assert (iio.imread("out.png") == own(pipe, frames=None, image=image, **call)[0]).all()

    def test_an_editing_model_sees_the_whole_reference(self, make, model, tmp_path):
        arguments = ("--image", "wide.png", "--height", 64, "--steps", 2)
        assert make("kontext", *arguments, *DENSE, "-o", "out.png").code == 0
        pipe = diffusers.FluxKontextPipeline.from_pretrained(model("kontext"))
        width = Image.open("out.png").width
        assert width == 212  # nearest to 64 / 60 * 200
        call = {"width": width, "max_area": 64 * width, "_auto_resize": False}
        reference = picture("wide.png")
        want = own(pipe, frames=None, image=reference, max_sequence_length=16, **call)
        assert (iio.imread("out.png") == want[0]).all()
        assert make("kontext", *arguments, *NARROW[:2], "-o", "sparse.png").code == 0
        assert (iio.imread("sparse.png") != want[0]).any()

    def test_without_a_size_the_model_has_its_own(self, make):
        assert make("sd", "--steps", 1, *DENSE, "-o", "out.png").code == 0
        assert Image.open("out.png").size == (24, 24)

    def test_a_picture_of_the_same_name_is_kept(self, make, diffattn, model, tmp_path):
        for number in ("", "-2"):
            assert make("sd", "--steps", 1, *DENSE).code == 0
            assert (tmp_path / f"a-red-circle{number}.png").is_file()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("wan", ["--image", "a.png"], "WanPipeline takes no --image, and diffusers has no pipelin"),
        ("flux", ["--input", "a.png"], "FluxPipeline takes no --input, and diffusers has no pi"),
        (
            "flux",
            ["--image", "a.png", "--image", "b.png"],
            "FluxPipeline takes no second --image (as FluxImg2ImgPipeline), and diffusers has no",
        ),
        ("wan-i2v", ["--image", "a.png", "--strength", 1], "WanImageToVideoPipeline takes no --st"),
        ("wan-ti2v", ["--image", "a.png", "--image", "b.png"], "WanPipeline takes no second --im"),
        ("wan-i2v", [], "WanImageToVideoPipeline needs a picture to start from: give --image"),
        ("wan", ["--last-image", "a.png"], "--last-image needs the first frame too: give --image"),
        ("wan", ["--strength", 0.5], "--strength is of --image or --input, of which none is given"),
        ("wan", ["--image", "a.png", "--strength", 0], "--strength must be a number above 0 and"),
        ("wan-i2v", ["--image", "no.png"], "there is no picture file no.png"),
        ("wan-i2v", ["--image", "a.png", "--last-image", "no"], "there is no picture file no"),
        ("wan", ["--input", "no.mp4"], "there is no video file no.mp4"),
        ("wan-i2v", ["--image", "text.png"], "cannot read "),
        ("wan", ["--input", "text.png"], "cannot read "),
        ("wan-i2v", ["--image", " "], "--image must be names of files, not "),
        ("flux", ["--num-frames", 5], "FluxPipeline does not take --num-frames"),
        ("flux", ["--fps", 5], "FluxPipeline makes pictures: leave --fps out"),
        ("flux", ["-o", "a.mp4"], "cannot write a.mp4: the extension must be .png, .jpg, .jpeg or"),
        ("flux", ["-o", "a"], "-o a has no extension: use .png, .jpg, .jpeg, .webp, or end it"),
        ("kontext", ["--image", "a.png", "-o", "a.png"], "-o a.png would overwrite a.png, which"),
        ("wan", ["--input", "a.gif", "-o", "a.gif"], "-o a.gif would overwrite a.gif, which is"),
    ],
)
def test_bad_input(make, tmp_path, name, arguments, message):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif")
    before = sorted(tmp_path.iterdir())
    output = [] if "-o" in arguments else ["-o", "made.png"]
    assert make(name, *arguments, *output, "--steps", 1).error.startswith(message)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("shape", "usual", "asked", "size"),
    [
        # 480 x 832 pixels in the shape of the picture, to the nearest multiples of 16.
        ((1000, 1000), (480, 832), (None, None), (624, 624)),
        ((900, 1600), (480, 832), (None, None), (480, 848)),
        ((1600, 900), (480, 832), (None, None), (848, 480)),
        # Without a number of pixels of the model's, the picture's own, but not of a large photo.
        ((210, 300), (None, None), (None, None), (208, 304)),
        ((4000, 4000), (None, None), (None, None), (1024, 1024)),
        ((60, 200), (480, 832), (64, None), (64, 208)),
        ((60, 200), (480, 832), (None, 100), (32, 100)),
        ((1, 10000), (480, 832), (None, None), (16, 63200)),
    ],
)
def test_sizes_in_the_shape_of_a_picture(shape, usual, asked, size):
    assert fitting_size(shape, 16, usual, asked) == size


def test_a_frame_is_cropped_and_not_stretched():
    pixels = np.zeros((60, 200, 3), np.uint8)
    pixels[:, 70:130] = 255  # a white square in the middle of a strip
    frame = np.asarray(fitted(Image.fromarray(pixels), 120, 120))
    assert frame.shape == (120, 120, 3)
    assert frame.min() > 128


@pytest.mark.parametrize(
    ("named", "given", "cls"),
    [
        ("WanPipeline", {}, "WanPipeline"),
        ("WanPipeline", {"input": "v.mp4"}, "WanVideoToVideoPipeline"),
        ("LTXPipeline", {"image": ("a",)}, "LTXImageToVideoPipeline"),
        ("LTXPipeline", {"image": ("a",), "last_image": "b"}, "LTXConditionPipeline"),
        ("LTX2Pipeline", {"image": ("a",)}, "LTX2ImageToVideoPipeline"),
        ("LTX2Pipeline", {"image": ("a",), "last_image": "b"}, "LTX2ConditionPipeline"),
        ("CogVideoXPipeline", {"input": "v.mp4"}, "CogVideoXVideoToVideoPipeline"),
        ("FluxPipeline", {"image": ("a",)}, "FluxImg2ImgPipeline"),
        ("FluxKontextPipeline", {"image": ("a",)}, "FluxKontextPipeline"),
        ("Flux2Pipeline", {"image": ("a", "b")}, "Flux2Pipeline"),
        ("QwenImagePipeline", {"image": ("a",)}, "QwenImageImg2ImgPipeline"),
        ("QwenImageEditPlusPipeline", {"image": ("a", "b")}, "QwenImageEditPlusPipeline"),
        ("StableDiffusion3Pipeline", {"image": ("a",)}, "StableDiffusion3Img2ImgPipeline"),
        ("WanVACEPipeline", {"image": ("a", "b"), "input": "v.mp4"}, "WanVACEPipeline"),
    ],
)
def test_the_class_follows_what_is_given(named, given, cls):
    for name in (named, cls):
        if not hasattr(diffusers, name):
            pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    request = Request(prompt="a cat", **given)
    assert pipeline_class({"_class_name": named}, request).__name__ == cls


def test_a_class_that_diffusers_does_not_have():
    with pytest.raises(UserError, match="has no pipeline NoSuchPipeline"):
        pipeline_class({"_class_name": "NoSuchPipeline"}, Request(prompt="a cat"))


def test_what_pipelines_make_and_look_at():
    pictures = {
        name: makes_pictures(getattr(diffusers, name))
        for name in ("FluxPipeline", "StableDiffusionXLImg2ImgPipeline", "QwenImageEditPipeline")
    }
    assert set(pictures.values()) == {True}
    for name in ("WanVideoToVideoPipeline", "AnimateDiffPipeline", "ChronoEditPipeline"):
        assert not makes_pictures(getattr(diffusers, name))
    assert edits(diffusers.FluxKontextPipeline)
    assert edits(diffusers.WanVACEPipeline)
    assert not edits(diffusers.FluxImg2ImgPipeline)
    assert not edits(diffusers.WanImageToVideoPipeline)
