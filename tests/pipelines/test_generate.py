"""Runs of ``diffattn generate`` on tiny pipelines, from the prompt to the files."""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from diffattn.pipelines import cli

PROMPT = "a red circle moving right"
# Without the warning that the default method saves nothing on so small a grid.
DENSE = ["--attn", "dense"]

# On these small grids the block rule keeps everything, and Equation 4 leaves something out from
# nine frames on.
# A mask that leaves something out on the smallest grids, so that no line warns of it.
NARROW = ["--attn", "gna", "--attn-arg", "window=1,1,1"]
SPARSE = [f"--attn-arg={part}" for part in ("rule=paper", "sink=false", "dense_steps=0")]


def mp4_frames(path: Path) -> np.ndarray:
    return iio.imread(path, plugin="FFMPEG")


def png_frames(folder: Path) -> np.ndarray:
    return np.stack([iio.imread(path) for path in sorted(folder.glob("frame_*.png"))])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def compared(tiny_wan, tmp_path_factory) -> tuple[Path, str, dict]:
    """A comparison's folder, what it printed, and its record."""
    folder = tmp_path_factory.mktemp("compared")
    size = ["--height", "32", "--width", "48", "--num-frames", "9", "--steps", "3"]
    files = ["--model", str(tiny_wan), "-o", str(folder / "out.mp4")]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.run(["generate", PROMPT, "--compare", *size, *SPARSE, *files])
    assert code == 0
    return folder, out.getvalue(), json.loads((folder / "out.mp4.json").read_text())


class TestOneVideo:
    def test_the_mp4_has_the_frames_and_rate_that_were_asked_for(self, generate, tmp_path):
        result = generate(PROMPT, "-o", "out.mp4", "--fps", 12, *DENSE)
        assert result.code == 0, result.err
        assert result.err == ""
        assert mp4_frames(tmp_path / "out.mp4").shape == (5, 32, 48, 3)
        assert iio.immeta(tmp_path / "out.mp4", plugin="FFMPEG")["fps"] == 12
        assert names(tmp_path) == ["out.mp4", "out.mp4.json"]

    def test_it_says_what_it_does_and_what_came_of_it(self, generate):
        lines = generate(PROMPT, "-o", "out.gif").out.splitlines()
        assert "tiny-wan: WanPipeline, float32 on cpu (" in lines[0]
        assert lines[0].endswith("5 frames 48x32, 2 steps, guidance 5, seed 0")
        assert lines[1].startswith("attention: radial attention: ")
        assert "steps stay dense" in lines[1]
        assert lines[2:4] == [
            line for line in lines if re.fullmatch(r"radial: step \d/2, .* s/step", line)
        ]
        assert re.fullmatch(
            r"out\.gif: 5 frames 48x32, \d+ KiB, \d+\.\d s \(\d+\.\d\d s/step\)", lines[-1]
        )
        assert len(lines) == 5

    def test_png_frames(self, generate, tmp_path):
        assert generate(PROMPT, "-o", "out.png").code == 0
        assert png_frames(tmp_path / "out").shape == (5, 32, 48, 3)
        assert names(tmp_path) == ["out", "out.png.json"]

    def test_dense_is_the_untouched_model(self, generate, tmp_path, tiny_wan):
        from diffusers import WanPipeline

        assert generate(PROMPT, "-o", "out.png", "--attn", "dense", "--seed", 3).code == 0
        pipe = WanPipeline.from_pretrained(tiny_wan)
        expected = pipe(
            PROMPT,
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=2,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(3),
        ).frames[0]
        assert (png_frames(tmp_path / "out") == (expected * 255).round()).all()

    def test_a_sparse_method_is_in_the_model_that_renders(self, generate, tmp_path):
        for name, options in (("dense", ["--attn", "dense"]), ("sparse", SPARSE)):
            assert generate(PROMPT, "-o", f"{name}.png", *options, "--num-frames", 9).code == 0
        assert (png_frames(tmp_path / "dense") != png_frames(tmp_path / "sparse")).any()

    def test_the_model_names_the_defaults(self, diffattn, tiny_wan, tmp_path, record):
        output = tmp_path / "out.png"
        size = ["--height", 32, "--width", 32, "--num-frames", 1, "--steps", 1]
        assert diffattn("generate", PROMPT, "--model", tiny_wan, *size, "-o", output).code == 0
        settings = record("out.json")["settings"]
        assert settings["fps"] == 8
        assert settings["guidance_scale"] == 5.0
        assert settings["seed"] == 0

    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_a_vae_that_keeps_every_frame_gives_the_frames_asked_for(
        self, generate, tiny_wan_every_frame, tmp_path, count
    ):
        options = ["--model", tiny_wan_every_frame, "--num-frames", count]
        assert generate(PROMPT, "-o", "out.png", *options).code == 0
        assert len(png_frames(tmp_path / "out")) == count

    def test_two_experts(self, generate, tiny_wan_two_experts, record):
        result = generate(PROMPT, "-o", "out.gif", "--model", tiny_wan_two_experts)
        assert result.code == 0, result.err
        assert record("out.json")["attention"]["sites"] == 4

    def test_bfloat16(self, generate, record):
        assert generate(PROMPT, "-o", "out.gif", "--dtype", "bfloat16").code == 0
        assert record("out.json")["settings"]["dtype"] == "bfloat16"

    def test_a_negative_prompt_changes_the_picture(self, generate, tmp_path):
        assert generate(PROMPT, "-o", "a.png").code == 0
        assert generate(PROMPT, "-o", "b.png", "--negative-prompt", "grey").code == 0
        assert (png_frames(tmp_path / "a") != png_frames(tmp_path / "b")).any()

    def test_strange_words_are_told_once(self, generate, tiny_wan_few_words):
        result = generate("a red, dog", "-o", "out.gif", "--model", tiny_wan_few_words, *DENSE)
        assert result.code == 0
        assert result.err == ("warning: the model does not know dog; its words are: a red circle\n")


class TestRecord:
    def test_it_holds_settings_versions_timings_and_the_schedule(self, generate, record):
        arguments = ["--attn-arg", "decay_factor=0.5", "--seed", 7, "--steps", 4]
        assert generate(PROMPT, "-o", "out.gif", *arguments).code == 0
        data = record("out.json")
        settings = data["settings"]
        assert settings["prompt"] == PROMPT
        assert settings["seed"] == 7
        assert settings["attention"]["type"] == "radial"
        assert settings["attention"]["decay_factor"] == 0.5
        assert (settings["height"], settings["width"], settings["num_frames"]) == (32, 48, 5)
        assert None not in (settings["dtype"], settings["device"], settings["fps"])
        assert data["versions"]["torch"] == torch.__version__
        assert data["versions"]["diffattn"] == importlib.metadata.version("diffattn")
        assert data["versions"]["python"] == platform.python_version()
        assert data["device"]["name"]
        assert data["files"] == {"video": "out.gif"}
        attention = data["attention"]
        assert 0 < attention["density"] <= 1
        assert (attention["num_steps"], attention["dense_steps"]) == (4, 1)
        assert attention["method"]["block_size"] is not None
        timings = data["timings"]
        assert len(timings["step_seconds"]) == 4
        assert sum(timings["step_seconds"]) <= timings["loop_seconds"] + 0.01
        assert timings["loop_seconds"] < timings["total_seconds"]

    def test_repeating_it_gives_equal_frames(self, generate, diffattn, tmp_path):
        options = ["--seed", 5, "--num-frames", 9, *SPARSE]
        assert generate(PROMPT, "-o", "one.png", *options).code == 0
        result = diffattn("generate", "--from", "one.png.json", "-o", "two.png")
        assert result.code == 0, result.err
        one, two = png_frames(tmp_path / "one"), png_frames(tmp_path / "two")
        assert (one == two).all()

    def test_a_repetition_can_be_repeated(self, generate, diffattn, record):
        assert generate(PROMPT, "-o", "one.gif").code == 0
        assert diffattn("generate", "--from", "one.gif.json", "-o", "two.gif").code == 0
        assert record("one.json")["settings"] == record("two.json")["settings"]

    def test_options_beside_it_override(self, generate, diffattn, record):
        assert generate(PROMPT, "-o", "one.gif", "--attn-arg", "decay_factor=0.5").code == 0
        change = ["--seed", 9, "--attn-arg", "sink=false", "--steps", 1]
        assert diffattn("generate", "--from", "one.gif.json", "-o", "two.gif", *change).code == 0
        one, two = record("one.json")["settings"], record("two.json")["settings"]
        assert (two["seed"], two["steps"]) == (9, 1)
        assert two["attention"] == {**one["attention"], "sink": False}

    def test_another_method_starts_afresh(self, generate, diffattn, record):
        assert generate(PROMPT, "-o", "one.gif", "--attn-arg", "decay_factor=0.5").code == 0
        again = ["--from", "one.gif.json", "-o", "b.gif", "--attn", "radial"]
        assert diffattn("generate", *again).code == 0
        assert record("b.json")["settings"]["attention"]["decay_factor"] is None

    def test_a_comparison_is_repeated_unless_told_otherwise(self, generate, diffattn, tmp_path):
        assert generate(PROMPT, "-o", "one.gif", "--compare").code == 0
        again = ["generate", "--from", "one.gif.json", "-o"]
        assert diffattn(*again, "two.gif").code == 0
        assert diffattn(*again, "three.gif", "--no-compare").code == 0
        assert (tmp_path / "two.compare.gif").is_file()
        assert not (tmp_path / "three.compare.gif").exists()

    def test_other_versions_are_told(self, generate, diffattn, tmp_path):
        assert generate(PROMPT, "-o", "one.gif").code == 0
        path = tmp_path / "one.gif.json"
        path.write_text(path.read_text().replace(torch.__version__, "1.0"))
        result = diffattn("generate", "--from", path, "-o", "two.gif")
        assert result.out.startswith(
            f"note: recorded with torch 1.0, now {torch.__version__}: the frames may differ\n"
        )

    def test_paths_work_from_another_folder(
        self, generate, diffattn, tiny_lora, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tiny_lora.parent)
        output = tmp_path / "one.gif"
        assert generate(PROMPT, "-o", output, "--lora", tiny_lora.name).code == 0
        monkeypatch.chdir(tmp_path)
        assert diffattn("generate", "--from", "one.gif.json", "-o", "two.gif").code == 0


class TestComparison:
    def test_it_writes_both_and_a_side_by_side(self, compared):
        folder, _, record = compared
        assert names(folder) == ["out.compare.mp4", "out.dense.mp4", "out.mp4", "out.mp4.json"]
        assert mp4_frames(folder / "out.mp4").shape == (9, 32, 48, 3)
        assert mp4_frames(folder / "out.dense.mp4").shape == (9, 32, 48, 3)
        assert mp4_frames(folder / "out.compare.mp4").shape == (9, 28 + 6 * 32, 2 * 6 * 48 + 4, 3)
        assert record["files"] == {
            "video": "out.mp4",
            "dense": "out.dense.mp4",
            "compare": "out.compare.mp4",
        }

    def test_it_prints_figures_and_says_how_they_were_taken(self, compared):
        _, out, record = compared
        comparison = record["comparison"]
        assert f"PSNR {comparison['psnr_db']:.2f} dB, SSIM {comparison['ssim']:.4f}" in out
        assert f"{comparison['speedup_loop']:.2f}x denoising" in out
        assert "(timed after one untimed step of each)" in out
        assert out.splitlines()[-1].endswith(f"{comparison['speedup_total']:.2f}x as fast as dense")
        assert re.search(r"^dense +denoising \d+\.\d\d s, total \d+\.\d\d s$", out, re.MULTILINE)
        assert re.search(r"^radial +denoising \d+\.\d\d s, total \d+\.\d\d s$", out, re.MULTILINE)

    def test_the_attention_is_stated_before_anything_is_rendered(self, compared):
        lines = compared[1].splitlines()
        assert lines[1].startswith("attention: radial attention")

    def test_speed_ups_are_the_ratios_of_the_recorded_times(self, compared):
        record = compared[2]
        dense, sparse = record["comparison"]["dense"], record["timings"]
        for kind in ("loop", "total"):
            ratio = dense[f"{kind}_seconds"] / sparse[f"{kind}_seconds"]
            assert record["comparison"][f"speedup_{kind}"] == pytest.approx(ratio, rel=0.02)

    def test_equal_frames(self, generate, record):
        result = generate(PROMPT, "-o", "out.gif", "--compare", "--attn-arg", "dense_steps=1.0")
        assert "radial against dense: equal frames, SSIM 1.0000" in result.out
        assert record("out.json")["comparison"]["psnr_db"] is None

    def test_the_dense_one_is_dense(self, generate, tmp_path):
        assert generate(PROMPT, "-o", "a.png", "--compare").code == 0
        assert generate(PROMPT, "-o", "b.png", "--attn", "dense").code == 0
        assert (png_frames(tmp_path / "a.dense") == png_frames(tmp_path / "b")).all()


class TestSeveralPrompts:
    def test_each_gets_a_numbered_file(self, generate, tmp_path):
        (tmp_path / "prompts.txt").write_text("one\n\nthe second!\n")
        result = generate("--prompts-file", "prompts.txt", "-o", "all/", "--steps", 1, *DENSE)
        assert result.code == 0, result.err
        assert result.err == ""
        assert result.out.startswith("note: skipped blank lines of prompts.txt: 2\n")
        assert names(tmp_path / "all") == [
            "01-one-seed0.mp4",
            "01-one-seed0.mp4.json",
            "02-the-second-seed0.mp4",
            "02-the-second-seed0.mp4.json",
        ]
        assert "[2/2] the second!" in result.out

    def test_a_prompt_looks_the_same_alone(self, generate, tmp_path):
        (tmp_path / "prompts.txt").write_text("one\ntwo\n")
        assert generate("--prompts-file", "prompts.txt", "-o", "out.png").code == 0
        assert generate("two", "-o", "alone.png").code == 0
        assert (png_frames(tmp_path / "out-02") == png_frames(tmp_path / "alone")).all()

    def test_each_record_repeats_its_own(self, generate, diffattn, tmp_path):
        (tmp_path / "prompts.txt").write_text("one\ntwo\n")
        assert generate("--prompts-file", "prompts.txt", "-o", "out.png").code == 0
        assert diffattn("generate", "--from", "out-02.png.json", "-o", "again.png").code == 0
        assert (png_frames(tmp_path / "out-02") == png_frames(tmp_path / "again")).all()


class TestLora:
    def test_it_changes_the_picture(self, generate, tiny_lora, tmp_path):
        assert generate(PROMPT, "-o", "without.png").code == 0
        assert generate(PROMPT, "-o", "file.png", "--lora", tiny_lora).code == 0
        assert generate(PROMPT, "-o", "folder.png", "--lora", tiny_lora.parent).code == 0
        without = png_frames(tmp_path / "without")
        assert (png_frames(tmp_path / "file") != without).any()
        assert (png_frames(tmp_path / "file") == png_frames(tmp_path / "folder")).all()

    def test_both_experts_get_it(self, generate, tiny_lora, tiny_wan_two_experts):
        from diffattn.pipelines.run.loading import load_model
        from diffattn.pipelines.run.request import Request

        request = Request("x", model=str(tiny_wan_two_experts), lora=str(tiny_lora), device="cpu")
        pipe = load_model(request).pipe
        for expert in (pipe.transformer, pipe.transformer_2):
            assert any("lora_A" in name for name, _ in expert.named_parameters())


class TestInterrupt:
    """A real Ctrl-C, sent to a real process."""

    def start(self, tiny_wan: Path, folder: Path, *options: str) -> subprocess.Popen:
        size = ["--height", "64", "--width", "64", "--num-frames", "5"]
        command = [sys.executable, "-m", "diffattn.pipelines", "generate"]
        return subprocess.Popen(
            [*command, "--model", str(tiny_wan), *size, *options],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # A shell's background jobs, and so perhaps these tests, are started ignoring Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, process: subprocess.Popen, line: str) -> None:
        assert process.stdout is not None
        for printed in process.stdout:
            if line in printed:
                return
        raise AssertionError(f"{line!r} was never printed")

    def test_finished_prompts_stay_and_nothing_half_does(self, tiny_wan, tmp_path):
        (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
        process = self.start(
            tiny_wan, tmp_path, "--prompts-file", "prompts.txt", "-o", "out.mp4", "--steps", "40",
            *DENSE,
        )  # fmt: skip
        self.wait_for(process, "[2/3] two")
        self.wait_for(process, "dense: step 10/40")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err == "diffattn: interrupted: kept out-01.mp4\n"
        assert names(tmp_path) == ["out-01.mp4", "out-01.mp4.json", "prompts.txt"]
        assert mp4_frames(tmp_path / "out-01.mp4").shape == (5, 64, 64, 3)

    def test_before_the_first_is_done_there_is_nothing(self, tiny_wan, tmp_path):
        process = self.start(tiny_wan, tmp_path, "one", "-o", "out.mp4", "--steps", "2000", *DENSE)
        self.wait_for(process, "attention:")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err == "diffattn: interrupted: nothing was written\n"
        assert names(tmp_path) == []

    def test_while_the_file_is_written(self, generate, tmp_path, monkeypatch):
        import diffattn.pipelines.run.generate as module

        write = module.write_video

        def write_half(path: Path, frames: np.ndarray, fps: float) -> None:
            write(path, frames[:2], fps)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "write_video", write_half)
        result = generate("one", "-o", "out.mp4", *DENSE)
        assert result.code == 130
        assert result.err == "diffattn: interrupted: nothing was written\n"
        assert names(tmp_path) == []


class TestFailedWriting:
    """The check before the run finds nothing, but the writing at its end fails."""

    LATE = 'case "$*" in *"-f null"*) exec "$real" "$@" ;; *) {} ;; esac'

    @pytest.mark.parametrize(
        ("way", "reason"),
        [
            ("kill -9 $$", "ffmpeg failed: ended by SIGKILL"),
            ("cat > /dev/null; echo no room >&2; exit 1", "ffmpeg failed: no room (exit code 1)"),
            ("cat > /dev/null", "ffmpeg made 0 frames "),
        ],
    )
    @pytest.mark.parametrize("options", [[], ["--compare"]])
    def test_it_is_told_and_the_former_files_stay(
        self, generate, tmp_path, fake_ffmpeg, way, reason, options
    ):
        assert generate("one", "-o", "out.mp4", *NARROW, *options).code == 0
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        fake_ffmpeg(self.LATE.format(way))
        error = generate("two", "-o", "out.mp4", *NARROW, *options).error
        assert error.startswith("cannot write out.mp4: ")
        assert reason in error
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_comparison_of_which_one_video_fails(self, generate, tmp_path, fake_ffmpeg):
        way = 'case "$*" in *compare.mp4*) exit 4 ;; *) exec "$real" "$@" ;; esac'
        fake_ffmpeg(way)
        error = generate("one", "-o", "out.mp4", "--compare", *NARROW).error
        assert error == "cannot write out.compare.mp4: ffmpeg failed: exit code 4"
        assert names(tmp_path) == []

    def test_frames_that_come_out_cut(self, generate, tmp_path, monkeypatch):
        from PIL import Image

        assert generate("one", "-o", "out.png").code == 0
        before = png_frames(tmp_path / "out")
        save = Image.Image.save

        def cut(image: Image.Image, file: Path, **options: object) -> None:
            save(image, file, **options)
            file.write_bytes(file.read_bytes()[:40])

        monkeypatch.setattr(Image.Image, "save", cut)
        error = generate("two", "-o", "out.png", *NARROW).error
        assert error.startswith("cannot write frame_0000.png: it cannot be read back: ")
        assert (png_frames(tmp_path / "out") == before).all()
        assert names(tmp_path) == ["out", "out.png.json"]


class TestOwnFiles:
    def test_ones_own_json_file_stays(self, generate, tmp_path):
        (tmp_path / "config.json").write_text('{"mine":1}')
        assert generate("one", "-o", "config.mp4").code == 0
        assert (tmp_path / "config.json").read_text() == '{"mine":1}'
        (tmp_path / "config.gif.json").write_text('{"mine":2}')
        error = generate("one", "-o", "config.gif").error
        assert error.startswith("-o config.gif would overwrite config.gif.json, which is no record")
        assert names(tmp_path) == [
            "config.gif.json",
            "config.json",
            "config.mp4",
            "config.mp4.json",
        ]

    def test_each_format_has_a_record(self, generate, tmp_path):
        for name, seed in (("x.mp4", 1), ("x.gif", 2), ("x.png", 3)):
            assert generate("one", "-o", name, "--seed", seed).code == 0
            record = json.loads((tmp_path / f"{name}.json").read_text())
            assert (record["files"]["video"], record["settings"]["seed"]) == (name, seed)
        assert json.loads((tmp_path / "x.mp4.json").read_text())["settings"]["seed"] == 1

    def test_a_record_of_an_earlier_version_is_read(self, generate, diffattn, tmp_path):
        assert generate("one", "-o", "x.png", "--seed", 5).code == 0
        (tmp_path / "x.png.json").rename(tmp_path / "x.json")
        assert diffattn("generate", "--from", "x.json", "-o", "again.png").code == 0
        assert (png_frames(tmp_path / "x") == png_frames(tmp_path / "again")).all()

    def test_seeds_in_a_folder(self, generate, tmp_path):
        for seed in (1, 2):
            assert generate("one", "-o", "sd/", "--seed", seed).code == 0
        assert names(tmp_path / "sd") == [
            "one-seed1.mp4",
            "one-seed1.mp4.json",
            "one-seed2.mp4",
            "one-seed2.mp4.json",
        ]
