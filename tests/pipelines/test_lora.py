"""``diffattn lora train``, and ``diffattn generate --lora`` with what it made."""

import dataclasses
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffattn._locks import lock_existing
from diffattn.lora.checkpoint import alone_in
from diffattn.lora.trainer import Trainer
from diffattn.pipelines.train import run as run_module

from .conftest import SIZE, Result

PROMPTS = "a cat\na dog\n"
# Felt on a grid of 2 x 2 x 3 tokens; its cells are trained too.
CELLS = ["--attn", "clear", "--attn-arg", "radius=1", "--attn-arg", "frame_radius=1"]
CELLS += ["--attn-arg", "down_factor=2", "--attn-arg", "first_frame=false"]
QUICK = ["--steps", "2", "--rank", "2", "--learning-rate", "0.05"]
OUT = "run"
# Far more than it takes on idle processors.
SECONDS_TO_WAIT = 240


@pytest.fixture
def train(
    diffattn: Callable[..., Result], tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run ``diffattn lora train`` on the tiny model, inside ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)

    def run(*arguments: object) -> Result:
        size = SIZE[: SIZE.index("--steps")]
        given = ["--model", tiny_wan, *size, *QUICK, "-o", OUT]
        # A config file may name the prompts, too.
        given += ["--teacher-steps", "1"] if {"--prompts", "train.toml"} & set(arguments) else []
        return diffattn("lora", "train", *given, *arguments)

    return run


@pytest.fixture
def trained(train: Callable[..., Result]) -> Path:
    """A LoRA of cells, trained from the dense model's own videos."""
    result = train("--prompts", "prompts.txt", *CELLS)
    assert result.code == 0, result.err
    return Path(OUT)


def frames(folder: str) -> np.ndarray:
    return np.stack([imageio.imread(path) for path in sorted(Path(folder).glob("*.png"))])


class TestTrain:
    def test_from_prompts_to_a_video_under_the_same_method(
        self, trained: Path, generate: Callable[..., Result], record: Callable[[str], Any]
    ) -> None:
        result = generate("a cat", "-o", "own.png", "--lora", trained)
        assert result.code == 0, result.err
        assert "the LoRA was trained under clear (" in result.out
        assert "), which is attached (--attn overrides)" in result.out
        method = record("own.json")["attention"]["method"]
        assert (method["type"], method["radius"], method["down_factor"]) == ("clear", 1, 2)
        assert generate("a cat", "-o", "dense.png", "--lora", trained, "--attn", "dense").code == 0
        assert (frames("own") != frames("dense")).any()
        # The cells' weights are in it: without their file they are means.
        (trained / "diffattn_method_weights.safetensors").unlink()
        assert generate("a cat", "-o", "mean.png", "--lora", trained).code == 0
        assert (frames("own") != frames("mean")).any()

    def test_another_method_may_be_asked_for(
        self, trained: Path, generate: Callable[..., Result], record: Callable[[str], Any]
    ) -> None:
        result = generate("a cat", "-o", "other.png", "--lora", trained, "--attn", "radial")
        assert result.code == 0, result.err
        assert "note: the LoRA was trained under clear (" in result.out
        assert "), not radial\n" in result.out
        assert record("other.json")["attention"]["method"]["type"] == "radial"
        argument = ["--attn-arg", "radius=2"]
        assert generate("a cat", "-o", "arg.png", "--lora", trained, *argument).code == 0
        method = record("arg.json")["attention"]["method"]
        assert (method["type"], method["radius"], method["down_factor"]) == ("clear", 2, 2)

    def test_it_is_off_in_dense_steps(
        self, trained: Path, generate: Callable[..., Result], record: Callable[[str], Any]
    ) -> None:
        assert generate("a cat", "-o", "stock.png", "--attn", "dense").code == 0
        dense = ["--lora", trained, "--attn-arg", "dense_steps=2"]
        result = generate("a cat", "-o", "off.png", *dense)
        assert result.code == 0, result.err
        assert (
            "the LoRA is off in the 2 dense steps: it was trained under clear (--lora-everywhere"
            " keeps it on)\n" in result.out
        )
        assert (frames("off") == frames("stock")).all()
        result = generate("a cat", "-o", "on.png", *dense, "--lora-everywhere")
        assert (
            "the LoRA is on in the 2 dense steps, although it was trained under clear\n"
            in result.out
        )
        assert (frames("on") != frames("stock")).any()
        assert record("on.json")["settings"]["lora_everywhere"] is True
        assert record("off.json")["settings"]["lora_everywhere"] is False

    def test_it_is_off_under_other_methods_and_in_the_dense_video(
        self, trained: Path, generate: Callable[..., Result]
    ) -> None:
        assert generate("a cat", "-o", "stock.png", "--attn", "dense").code == 0
        result = generate("a cat", "-o", "dense.png", "--attn", "dense", "--lora", trained)
        assert (
            "the LoRA is off in this run, which attends by dense: it was trained under clear"
            " (--lora-everywhere keeps it on)\n" in result.out
        )
        assert (frames("dense") == frames("stock")).all()
        gna = ["--attn", "gna", "--attn-arg", "window=2,2,2"]
        assert generate("a cat", "-o", "gna.png", *gna).code == 0
        assert generate("a cat", "-o", "both.png", *gna, "--lora", trained).code == 0
        assert (frames("gna") == frames("both")).all()
        assert generate("a cat", "-o", "own.png", "--lora", trained, "--compare").code == 0
        assert (frames("own.dense") == frames("stock")).all()

    def test_a_recorded_run_repeats_its_own_method(
        self, trained: Path, generate: Callable[..., Result], diffattn: Callable[..., Result]
    ) -> None:
        assert generate("a cat", "-o", "own.png", "--lora", trained).code == 0
        assert diffattn("generate", "--from", "own.png.json", "-o", "again.png").code == 0
        assert (frames("own") == frames("again")).all()

    def test_what_a_run_is_made_of_is_settled_once(
        self, trained: Path, generate: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffattn import models
        from diffattn.lora import adapter

        asked: list[str] = []
        for module, name in ((adapter, "read_record"), (models, "pipeline_grid")):
            answer = getattr(module, name)

            def ask(*arguments: Any, name: str = name, answer: Any = answer) -> Any:
                asked.append(name)
                return answer(*arguments)

            monkeypatch.setattr(module, name, ask)
        assert generate("a cat", "-o", "own.png", "--lora", trained, "--compare").code == 0
        assert asked == ["read_record", "pipeline_grid"]

    def test_stock_diffusers_loads_it(self, trained: Path, tiny_wan: Path) -> None:
        from diffusers import WanPipeline

        pipe = WanPipeline.from_pretrained(tiny_wan)
        pipe.load_lora_weights(trained)
        loaded = [p for name, p in pipe.transformer.named_parameters() if "lora_B" in name]
        assert len(loaded) == 2 * 4
        assert all(p.abs().max() > 0 for p in loaded)

    def test_clips_with_captions(self, train: Callable[..., Result], tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        rng = np.random.default_rng(0)
        for number in range(2):
            video = rng.integers(0, 256, (6, 40, 50, 3), dtype=np.uint8)
            imageio.imwrite(data / f"{number}.gif", video)
            (data / f"{number}.txt").write_text(f"noise {number}")
        (data / "broken.gif").write_bytes(b"GIF89a, or not")
        (data / "broken.txt").write_text("a broken file")
        (data / "3.heic").write_bytes(b"of a kind that is not read")
        (data / "3.txt").write_text("its caption")
        result = train("--data", data, *CELLS)
        assert result.code == 0, result.err
        assert "2 clips, 5 frames 48x32" in result.out
        assert "noise levels: logit-normal, shift " in result.out
        assert "broken.gif" in result.err
        assert (
            f"warning: 2 files in {data} are left out, since by their names they are neither clips"
            " nor captions of clips, such as 3.heic\n" in result.err
        )
        lines = (tmp_path / OUT / "losses.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
        assert "step 2/2  loss " in result.out
        assert " it/s" in result.out
        assert " GiB" in result.out

    def test_a_config_file_and_going_on(self, train: Callable[..., Result], tmp_path: Path) -> None:
        (tmp_path / "train.toml").write_text(
            'prompts = "prompts.txt"\nrank = 3\ndora = true\ntargets = ["to_q"]\n'
            '[attention]\ntype = "gna"\nwindow = [2, 2, 2]\n'
        )
        assert train("--config", "train.toml").code == 0
        settings = json.loads((tmp_path / OUT / "settings.json").read_text())
        assert (settings["rank"], settings["dora"], settings["targets"]) == (2, True, ["to_q"])
        assert settings["attention"]["window"] == [2, 2, 2]
        assert train("--config", "train.toml").error == (
            "run holds a run with a checkpoint, step-000002: resume it, or give another output"
            " folder"
        )
        result = train("--config", "train.toml", "--resume", "--steps", "3")
        assert result.code == 0, result.err
        assert "gna attention, from step 2 on, in 1 process\n" in result.out
        assert "run: trained for 3 steps" in result.out

    @pytest.mark.parametrize("validated", [False, True])
    def test_other_parts_are_kept_for_validation_videos_only(
        self, validated: bool, train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffusers import AutoencoderKLWan

        kept: list[set[str]] = []
        step = Trainer._make_step

        def make_step(trainer: Trainer) -> Any:
            parts = trainer.pipe.components
            kept.append({name for name, part in parts.items() if isinstance(part, torch.nn.Module)})
            return step(trainer)

        monkeypatch.setattr(Trainer, "_make_step", make_step)
        tiled: list[bool] = []
        decode = AutoencoderKLWan.decode

        def decoded(vae: Any, *args: Any, **kwargs: Any) -> Any:
            tiled.append(vae.use_tiling)
            return decode(vae, *args, **kwargs)

        monkeypatch.setattr(AutoencoderKLWan, "decode", decoded)
        validation = ["--validate-every", 2, "--validation-prompt", "a cow"]
        validation += ["--validation-steps", 1]
        for number, tiling in enumerate(([], ["--no-vae-tiling"])[: 1 + validated]):
            kept.clear()
            tiled.clear()
            more = [*validation, *tiling] if validated else []
            result = train("--prompts", "prompts.txt", *CELLS, *more, "-o", f"run-{number}")
            assert result.code == 0, result.err
            others = {"text_encoder", "vae"} if validated else set()
            assert kept == [{"transformer", *others}] * 2
            # Dense, sparse, and sparse with the LoRA.
            assert tiled == ([not tiling] * 3 if validated else [])

    def test_the_second_expert_and_how_it_is_used(
        self,
        train: Callable[..., Result],
        generate: Callable[..., Result],
        tiny_wan_two_experts: Path,
        tmp_path: Path,
    ) -> None:
        second = ["--model", tiny_wan_two_experts, "--denoiser", "transformer_2"]
        result = train("--prompts", "prompts.txt", *CELLS, *second)
        assert result.code == 0, result.err
        assert result.out.splitlines()[-2:] == [
            "run: trained for 2 steps; use it by diffattn generate --lora run",
            "in stock diffusers: pipe.load_lora_weights('run/transformer_2',"
            " load_into_transformer_2=True)",
        ]
        assert not (tmp_path / OUT / "pytorch_lora_weights.safetensors").exists()
        model = ["--model", tiny_wan_two_experts]
        for name, lora in (("own", OUT), ("sub", f"{OUT}/transformer_2")):
            result = generate("a cat", "-o", f"{name}.png", "--lora", lora, *model)
            assert result.code == 0, result.err
        assert generate("a cat", "-o", "stock.png", "--attn", "dense", *model).code == 0
        assert (frames("own") == frames("sub")).all()
        assert (frames("own") != frames("stock")).any()

    def test_a_guided_model_that_makes_its_own_clips_is_told_their_scale(
        self, diffattn: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tiny_complete import COMPLETE

        monkeypatch.chdir(tmp_path)
        COMPLETE["flux"].build().save_pretrained("flux")
        (tmp_path / "prompts.txt").write_text("a cat")
        given = ["--model", "flux", "--height", 32, "--width", 32, *QUICK, "--attn", "gna"]
        given += ["--attn-arg", "window=3,3", "--prompts", "prompts.txt", "--teacher-steps", 1]
        for folder, more, expected in (("own", [], 3.5), ("one", ["--guidance", 1], 1)):
            result = diffattn("lora", "train", *given, "-o", folder, *more)
            assert result.code == 0, result.err
            settings = json.loads((tmp_path / folder / "settings.json").read_text())
            assert settings["guidance"] == expected

    def test_pairs_of_pictures_for_a_model_that_edits(
        self, diffattn: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tiny_complete import COMPLETE, EDITING

        # Where torchvision is missing, transformers has no processor that could be loaded.
        pipe = EDITING["qwen-image-edit-plus"].build()
        stock = run_module.load_model

        def load(*arguments: Any, **more: Any) -> Any:
            return dataclasses.replace(stock(*arguments, **more), pipe=pipe)

        monkeypatch.setattr(run_module, "load_model", load)
        monkeypatch.chdir(tmp_path)
        COMPLETE["qwen-image"].build().save_pretrained("model")
        noise = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
        for folder in ("data", "data/sources"):
            Path(folder).mkdir()
            for number, picture in enumerate(noise):
                imageio.imwrite(f"{folder}/{number}.png", picture)
                Path(f"data/{number}.txt").write_text("make it red")
        Path("data/2.png").unlink()
        Path("data/2.txt").unlink()
        given = ["--model", "model", "--height", 32, "--width", 48, *QUICK, "--attn", "gna"]
        given += ["--attn-arg", "window=3,3", "--data", "data", "-o", OUT]
        looks = ["--validate-every", 1, "--validation-prompt", "a cow"]
        refused = diffattn("lora", "train", *given, *looks)
        assert refused.code == 2
        assert "QwenImageEditPlusPipeline edits pictures: leave it out" in refused.err
        result = diffattn("lora", "train", *given)
        assert result.code == 0, result.err
        assert "1 sources belong to no clip, such as 2.png" in result.err
        assert "2 clips, 1 frames 48x32" in result.out
        assert (tmp_path / OUT / "pytorch_lora_weights.safetensors").is_file()

    def test_validation_videos(self, train: Callable[..., Result], tmp_path: Path) -> None:
        validation = ["--validate-every", 1, "--validation-prompt", "a cow"]
        validation += ["--validation-steps", 2]
        arguments = ["--prompts", "prompts.txt", *CELLS, "--learning-rate", 1]
        result = train(*arguments, *validation)
        assert result.code == 0, result.err
        folder = tmp_path / OUT / "validation"
        for step in (1, 2):
            video = imageio.imread(folder / f"step-{step:06d}" / "00-a-cow.mp4")
            assert video.shape[2] > 2.5 * video.shape[1]  # three of them
        lines = [
            json.loads(line)
            for line in (folder / "validation.jsonl").read_text().split("\n")
            if line
        ]
        assert [line["step"] for line in lines] == [1, 2]
        # What is untrained is made once.
        assert lines[0]["psnr_untrained_db"] == lines[1]["psnr_untrained_db"]
        assert lines[0]["psnr_db"] != lines[1]["psnr_db"]
        assert "step 2: PSNR to dense " in result.out
        # And looking at it changes nothing.
        alone = train(*arguments, "-o", "alone")
        assert alone.code == 0, alone.err
        logs = [(tmp_path / run / "losses.jsonl").read_text() for run in (OUT, "alone")]
        assert logs[0] == logs[1]

    def test_validation_prompts_from_a_file(
        self, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        (tmp_path / "watch.txt").write_text("a cow\n\na red ball\n")
        validation = ["--validate-every", 2, "--validation-prompts-file", "watch.txt"]
        validation += ["--validation-steps", 1, "--validation-prompt", "a horse"]
        result = train("--prompts", "prompts.txt", *CELLS, *validation)
        assert result.code == 0, result.err
        videos = sorted(path.name for path in (tmp_path / OUT / "validation").rglob("*.mp4"))
        assert videos == ["00-a-horse.mp4", "01-a-cow.mp4", "02-a-red-ball.mp4"]
        assert "| PSNR to dense, dB | " in (tmp_path / OUT / "README.md").read_text()
        missing = ["--validate-every", 2, "--validation-prompts-file", "none.txt"]
        error = train("--prompts", "prompts.txt", "-o", "other", *missing).error
        assert error == "cannot read prompt file none.txt: No such file or directory"

    def test_what_is_left_beside_the_lora(
        self, train: Callable[..., Result], generate: Callable[..., Result], tmp_path: Path
    ) -> None:
        result = train("--prompts", "prompts.txt", *CELLS, "--ema", 0.9, "--held-out", 1)
        assert result.code == 0, result.err
        files = {path.name for path in (tmp_path / OUT).iterdir()}
        assert {"README.md", "losses.png", "held-out.jsonl", "ema"} <= files
        card = (tmp_path / OUT / "README.md").read_text()
        assert "| density | " in card
        assert "| loss on held-out clips | " in card
        assert generate("a cat", "-o", "ema.png", "--lora", f"{OUT}/ema").code == 0
        more = ["--init-lora", OUT, "-o", "more"]
        result = train("--prompts", "prompts.txt", *CELLS, *more)
        assert result.code == 0, result.err
        assert f"| started from | {OUT} |" in (tmp_path / "more" / "README.md").read_text()

    def test_validation_leaves_it_off_in_dense_steps(
        self, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        validation = ["--validate-every", 2, "--validation-prompt", "a cow"]
        validation += ["--validation-steps", 2, "--attn-arg", "dense_steps=2"]
        arguments = ["--prompts", "prompts.txt", *CELLS, "--learning-rate", 1, *validation]
        ratios = []
        for more in ([], ["--lora-everywhere"]):
            folder = f"run-{len(ratios)}"
            result = train(*arguments, "-o", folder, *more)
            assert result.code == 0, result.err
            text = (tmp_path / folder / "validation" / "validation.jsonl").read_text()
            ratios.append(json.loads(text)["psnr_db"])
        # Equal frames have no ratio.
        assert ratios[0] is None
        assert ratios[1] is not None


class TestOneRunInAFolder:
    ARGUMENTS = ("--prompts", "prompts.txt", *CELLS)

    def test_a_second_run_is_refused_and_the_first_goes_on(
        self, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        folder = tmp_path / OUT
        folder.mkdir()
        with alone_in(folder):
            before = sorted(folder.rglob("*"))
            error = train(*self.ARGUMENTS).error
            assert sorted(folder.rglob("*")) == before
        assert error == (
            f"run is in use: process {os.getpid()} on {socket.gethostname()} trains there; wait for"
            " its end, or give another output folder"
        )
        assert train(*self.ARGUMENTS).code == 0
        assert not (folder / ".diffattn.lock").exists()

    def test_what_a_killed_run_left_is_removed(
        self, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        left = [".diffattn.tmp", "checkpoints/.step-000009.tmp"]
        for name in left:
            (tmp_path / OUT / name / "deep").mkdir(parents=True)
        (tmp_path / OUT / "validation").mkdir()
        (tmp_path / OUT / "validation/00-untrained.tmp.npz").touch()
        (tmp_path / OUT / ".diffattn.lock").write_text("process 1 on a machine that is off")
        (tmp_path / OUT / "notes.tmp").touch()
        assert train(*self.ARGUMENTS).code == 0
        assert (tmp_path / OUT / "notes.tmp").exists()
        for name in [*left, "validation/00-untrained.tmp.npz", ".diffattn.lock"]:
            assert not (tmp_path / OUT / name).exists(), name

    def test_runs_that_share_a_folder_of_clips_prepare_in_turn(self, tmp_path: Path) -> None:
        holder = lock_existing(tmp_path)
        assert holder is not None
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            holder.release()

        with run_module._preparing(tmp_path, say):
            assert lock_existing(tmp_path) is None
        assert said == [f"waiting for another run, which prepares clips in {tmp_path}"]

    def test_a_refused_run_leaves_no_folder(
        self, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        assert train(*self.ARGUMENTS, "--device", "tpu").code == 2
        assert train(*self.ARGUMENTS, "--num-frames", "6").code == 2
        assert not (tmp_path / OUT).exists()


class TestInterrupt:
    ARGUMENTS = ("--prompts", "prompts.txt", *CELLS, "--steps", 5)

    @pytest.fixture
    def press(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        """Press Ctrl-C so many times during the third step."""

        def presses(times: int) -> None:
            step = Trainer._make_step

            def pressed(trainer: Trainer) -> Any:
                for _ in range(times if trainer.step == 2 else 0):
                    os.kill(os.getpid(), signal.SIGINT)
                return step(trainer)

            monkeypatch.setattr(Trainer, "_make_step", pressed)

        return presses

    def test_it_writes_a_checkpoint_and_the_run_goes_on_as_if_nothing_had_happened(
        self,
        train: Callable[..., Result],
        tmp_path: Path,
        press: Callable[[int], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        whole = train(*self.ARGUMENTS, "-o", "whole")
        assert whole.code == 0, whole.err
        said, write = [], os.write

        def noted(descriptor: int, data: bytes) -> int:
            said.append(data)
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", noted)
        press(1)
        result = train(*self.ARGUMENTS)
        assert result.code == 130
        assert b"stopping after this step with a checkpoint; Ctrl-C again stops at once\n" in said
        assert result.err.splitlines()[-1] == (
            "diffattn: interrupted: kept run/checkpoints/step-000003; go on from there with"
            " --resume"
        )
        assert not (tmp_path / OUT / "pytorch_lora_weights.safetensors").exists()
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        again = train(*self.ARGUMENTS, "--resume")
        assert again.code == 0, again.err
        assert "attention, from step 3 on" in again.out
        name = "pytorch_lora_weights.safetensors"
        one, other = (load_file(tmp_path / folder / name) for folder in ("whole", OUT))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)

    def test_the_second_one_stops_at_once(
        self, train: Callable[..., Result], tmp_path: Path, press: Callable[[int], None]
    ) -> None:
        press(2)
        result = train(*self.ARGUMENTS)
        assert result.code == 130
        assert result.err.splitlines()[-1] == "diffattn: interrupted: kept run/clips"
        assert not (tmp_path / OUT / "checkpoints").exists()

    def test_a_reader_of_the_progress_that_leaves_costs_no_step(
        self, train: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = []

        def print_line(report: Any, smooth: Any) -> None:
            made.append(report.step)
            if report.step == 3:
                raise BrokenPipeError

        monkeypatch.setattr("diffattn.lora.progress._print_line", print_line)
        assert train(*self.ARGUMENTS).code == 1
        assert made == [1, 2, 3]
        assert [p.name for p in (tmp_path / OUT / "checkpoints").iterdir()] == ["step-000003"]

    @pytest.mark.parametrize(("processes", "warned"), [(1, False), (2, True)])
    def test_a_launcher_that_starts_one_process_instead_of_several(
        self,
        processes: int,
        warned: bool,
        train: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser
        from accelerate.utils.launch import prepare_simple_launcher_cmd_env

        options = ["--cpu", "--num_processes", str(processes), "--num_machines", "1"]
        options += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
        parsed = launch_command_parser().parse_args([*options, "diffattn.pipelines"])
        _, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(parsed)[0])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        result = train("--prompts", "prompts.txt", *CELLS)
        assert result.code == 0, result.err
        assert "attention, 2 steps, in 1 process\n" in result.out
        assert (
            "warning: accelerate launch has started one process only: on the CPU it starts several"
            " by MPI alone (--mpirun_hostfile); this does without: torchrun --nproc-per-node 2 -m"
            " diffattn.pipelines lora train ... --device cpu\n" in result.err
        ) == warned

    def test_all_processes_of_a_launcher_stop_at_one_step(
        self, tiny_wan: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "prompts.txt").write_text(PROMPTS)
        command = [
            sys.executable, "-P", "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", "2", "-m", "diffattn.pipelines", "lora", "train",
            "--model", tiny_wan, *SIZE[: SIZE.index("--steps")], "--rank", "2", "--attn", "vmoba",
            "--prompts", "prompts.txt", "--teacher-steps", "1", "--steps", "1000000",
            "--checkpoint-every", "1000000", "--device", "cpu", "-o", OUT,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        log = tmp_path / OUT / "losses.jsonl"
        # A launcher hands its Ctrl-C on to its processes, which have sessions of their own.
        with subprocess.Popen(
            list(map(str, command)), cwd=tmp_path, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as launcher:  # fmt: skip
            try:
                end = time.monotonic() + SECONDS_TO_WAIT
                while not (log.is_file() and log.read_text().count("\n") >= 2):
                    assert time.monotonic() < end
                    assert launcher.poll() is None, launcher.communicate()
                    time.sleep(0.1)
                launcher.send_signal(signal.SIGINT)
                out, err = launcher.communicate(timeout=SECONDS_TO_WAIT)
            except BaseException:
                launcher.terminate()  # which ends its processes, too
                raise
        (checkpoint,) = (tmp_path / OUT / "checkpoints").iterdir()
        steps = int(checkpoint.name.removeprefix("step-"))
        assert steps == log.read_text().count("\n")
        assert len(list(checkpoint.glob("random_states_*.pkl"))) == 2
        progress = json.loads((checkpoint / "progress.json").read_text())
        assert (progress["step"], progress["identity"]["processes"]) == (steps, 2)
        assert "attention, 1000000 steps, in 2 processes\n" in out
        assert err.count("stopping after this step with a checkpoint") == 1
        assert f"interrupted: kept run/checkpoints/{checkpoint.name}; go on from there" in err

    def test_a_validation_video_that_fails_does_not_end_the_training(
        self, train: Callable[..., Result], tmp_path: Path, fake_ffmpeg: Callable[[str], None]
    ) -> None:
        fake_ffmpeg('case "$*" in *"-f null"*) exec "$real" "$@" ;; *) exit 5 ;; esac')
        options = ["--validate-every", 2, "--validation-prompt", "a cow", "--validation-steps", 1]
        result = train("--prompts", "prompts.txt", *CELLS, *options)
        assert result.code == 0, result.err
        assert "warning: step 2: no validation video: cannot write 00-a-cow.mp4: " in result.err
        assert list((tmp_path / OUT / "validation").rglob("*.mp4")) == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                [],
                "give either --data, a folder of clips, or --prompts, a file of prompts of which"
                " the dense model makes them",
            ),
            (
                ["--prompts", "prompts.txt", "--captions", "a.csv"],
                "--captions are those of the clips of --data, which is not given",
            ),
            (
                ["--prompts", "prompts.txt", "--validate-every", "2"],
                "--validate-every and --validation-prompt go together",
            ),
            (
                ["--prompts", "prompts.txt", "--rank", "0"],
                "rank is 0, but must be a whole number from 1 to 65536",
            ),
            (
                ["--prompts", "prompts.txt", "--target", "qkv"],
                "target 'qkv' matches no layer of the 2 attention sites of WanTransformer3DModel:"
                " those of blocks.0.attn1 are to_q, to_k, to_v, to_out.0",
            ),
            (
                ["--prompts", "prompts.txt", "--attn", "dense"],
                "the method is dense, which needs no adapting: choose a sparse one, such as radial",
            ),
            (["--data", "nothing"], "nothing is not there; the data are a folder of clips"),
            (
                ["--data", "empty"],
                "there are no clips in empty: none of its files ends in",
            ),
            (
                ["--prompts", "prompts.txt", "--guidance", "2"],
                "guidance is 2, but this wan model has no guidance scale among its inputs",
            ),
            (
                ["--prompts", "prompts.txt", "--denoiser", "transformer_2"],
                "denoiser is 'transformer_2', but WanPipeline has transformer",
            ),
            (["--config", "none.toml"], "cannot read --config none.toml: No such file"),
            (["--config", "prompts.txt"], "--config prompts.txt is not TOML: "),
            (
                ["--config", "wrong.json"],
                "--config wrong.json: unknown setting 'lernrate'",
            ),
            (["--prompts", "prompts.txt", "--num-frames", "6"], "num_frames is 6, but this model"),
            (["--config", "path.json"], "--data must be text, not 3"),
            (
                ["--config", "everywhere.json"],
                "--lora-everywhere must be true or false, not 'yes'",
            ),
            (
                ["--prompts", "prompts.txt", "--lora-everywhere"],
                "--lora-everywhere is about the videos of --validate-every, which is not given",
            ),
            (
                ["--prompts", "prompts.txt", "--device", "tpu"],
                "--device 'tpu' is no device; try cpu, cuda or cuda:1",
            ),
        ],
    )  # fmt: skip
    def test_one_line(
        self, arguments: list[str], message: str, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "wrong.json").write_text('{"lernrate": 1}')
        (tmp_path / "path.json").write_text('{"data": 3}')
        (tmp_path / "everywhere.json").write_text('{"data": ".", "lora_everywhere": "yes"}')
        assert train(*arguments).error.startswith(message)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rank", 10**8], "rank is 100000000, but must be a whole number from 1 to 65536"),
            (
                ["--rank", 33],
                "rank is 33, but the 8 layers of WanTransformer3DModel that get a LoRA have a rank"
                " of 32 at most themselves: give a rank from 1 to 32",
            ),
            (
                ["--rank", 33, "--target", "to_v"],
                "rank is 33, but the 2 layers of WanTransformer3DModel that get a LoRA have a rank"
                " of 32 at most themselves: give a rank from 1 to 32",
            ),
            (["--alpha", 1e300], "alpha is 1e+300, but must be a number above 0 and at most 1e+06"),
            (
                ["--learning-rate", 1e300],
                "learning_rate is 1e+300, but must be a number above 0 and at most 1e+06",
            ),
            (
                ["--objective", 1e39],
                "objective is 1e+39, but must be a number of at least 0 and at most 1e+06",
            ),
            (["--shift", 1e300], "shift is 1e+300, but must be a number above 0 and at most 1e+06"),
            (
                ["--batch-size", 10**25],
                f"batch_size is {10**25}, but must be a whole number from 1 to 65536",
            ),
            (["--seed", 2**64], f"seed is {2**64}, but must be a whole number from 0 to"),
            (
                ["--samples", 10**12],
                "--samples must be a whole number from 1 to 1000000, not 1000000000000",
            ),
            (["--samples", 0], "--samples must be a whole number from 1 to 1000000, not 0"),
            (
                ["--teacher-steps", 0],
                "--teacher-steps must be a whole number of at least 1, not 0",
            ),
            (["--warmup-steps", 3], "warmup_steps is 3, but the run has 2 steps: give at most as"),
        ],
    )
    def test_numbers_that_no_training_can_have(
        self, arguments: list[Any], message: str, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        assert train("--prompts", "prompts.txt", *CELLS, *arguments).error.startswith(message)
        # Nothing was encoded before.
        assert not (tmp_path / OUT).exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["--data", "data", "--samples", 2],
                "--samples is about the videos that the dense model makes of --prompts, which is"
                " not given",
            ),
            (
                ["--data", "data", "--teacher-steps", 1],
                "--teacher-steps is about the videos that the dense model makes of --prompts, which"
                " is not given",
            ),
            (
                ["--prompts", "prompts.txt", "--fps", 8],
                "--fps is the rate at which the clips of --data are read: WanPipeline makes the"
                " videos of --prompts without one",
            ),
            (
                ["--prompts", "prompts.txt", "--no-vae-tiling"],
                "--vae-tiling is about the clips of --data and the videos of --validate-every,"
                " neither of which is given: the videos of --prompts are not encoded",
            ),
            (
                ["--prompts", "prompts.txt", "--validation-steps", 2],
                "--validation-steps is about the videos of --validate-every, which is not given",
            ),
            (
                ["--prompts", "prompts.txt", "--resume"],
                "--resume: there is no run in run, which does not exist; leave --resume out to"
                " start one",
            ),
        ],
    )
    def test_options_that_would_do_nothing(
        self, arguments: list[Any], message: str, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        assert train(*arguments, *CELLS).error == message
        assert not (tmp_path / OUT).exists()

    def test_a_method_that_does_not_fit_the_clips_is_refused_before_they_are_made(
        self, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        gna = ["--attn", "gna", "--attn-arg", "window=3,3"]
        error = train("--prompts", "prompts.txt", *gna).error
        assert error.startswith("window is (3, 3), for height and width, but the grid 2x2x3")
        assert not (tmp_path / OUT).exists()

    def test_resuming_a_run_that_was_stopped_before_its_first_checkpoint_is_said(
        self, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        (tmp_path / OUT).mkdir()
        result = train("--prompts", "prompts.txt", *CELLS, "--resume")
        assert result.code == 0, result.err
        assert result.out.splitlines()[0] == (
            "run has no checkpoint to go on from: the training starts at its first step"
        )

    @pytest.mark.parametrize(
        "option", ["--output", "--data", "--captions", "--prompts", "--cache", "--config"]
    )
    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("", "must be text, not ''"),
            (" ", "must be text, not ' '"),
            ("sur\udcff", "must be text in UTF-8, not 'sur\\udcff'"),
        ],
    )
    def test_names_that_are_no_names(
        self, option: str, name: str, problem: str, train: Callable[..., Result]
    ) -> None:
        source = [] if option in ("--data", "--prompts") else ["--data", "data"]
        assert train(*source, option, name).error == f"{option} {problem}"

    def test_a_name_that_no_folder_can_have(self, train: Callable[..., Result]) -> None:
        error = train("--prompts", "prompts.txt", "-o", "x" * 300).error
        assert error.startswith("--output: the name xxxx")
        assert error.endswith(".. has 300 bytes, but files have at most 255")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("deep.json", "[" * 100_000, "--config deep.json is not JSON: "),
            ("deep.toml", "a = " + "[" * 100_000, "--config deep.toml is not TOML: "),
            ("bytes.toml", b"a = '\xff'", "--config bytes.toml is not TOML: "),
            ("a.toml", 'samples = "2"', "--samples must be a whole number from 1 to"),
            ("a.toml", "samples = true", "--samples must be a whole number from 1 to"),
            ("a.toml", "validation_steps = 1.5", "--validation-steps must be a whole number of"),
            ("a.toml", 'fps = "8"', "--fps must be a number of at least 0.01 and at most 1000"),
            (
                "a.toml",
                'validate_every = "x"\nvalidation_prompts = ["x"]',
                "--validate-every must be a whole number of at least 1, not 'x'",
            ),
            (
                "a.toml",
                'validate_every = 1\nvalidation_prompts = "a cow"',
                "--validation-prompts must be a list of prompts, not 'a cow'",
            ),
            (
                "a.toml",
                "validate_every = 1\nvalidation_prompts = [3]",
                "--validation-prompts must be a list of prompts, not (3,)",
            ),
            ("a.toml", "device = 3", "--device must be text, not 3"),
            (
                "a.toml",
                "attention = 3",
                "--config a.toml: attention is 3, but must be a method's name or a table with its"
                " type",
            ),
        ],
    )
    def test_config_files(
        self,
        name: str,
        content: str | bytes,
        message: str,
        train: Callable[..., Result],
        tmp_path: Path,
    ) -> None:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        assert train("--prompts", "prompts.txt", "--config", name).error.startswith(message)

    def test_a_lack_of_memory(
        self, train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(trainer: Trainer) -> None:
            raise RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 1 byte")

        monkeypatch.setattr(Trainer, "_make_step", fails)
        assert train("--prompts", "prompts.txt", *CELLS).error == (
            "out of memory: try --gradient-checkpointing, --offload-activations, --base-dtype int8,"
            " --swap-blocks, fewer frames, a smaller size, a smaller --batch-size or --rank, or"
            " --dtype bfloat16; `diffattn lora plan --vram` says what fits"
        )

    def test_values_of_any_length_make_short_lines(self, train: Callable[..., Result]) -> None:
        error = train("--prompts", "prompts.txt", "--target", "x" * 100_000).error
        assert error.startswith("target 'xxxx")
        assert error.endswith("those of blocks.0.attn1 are to_q, to_k, to_v, to_out.0")
        assert len(error) < 1500

    def test_a_model_without_a_scheduler(
        self, train: Callable[..., Result], tiny_wan: Path, tmp_path: Path
    ) -> None:
        from diffusers import WanPipeline

        folder = tmp_path / "model"
        WanPipeline.from_pretrained(tiny_wan).save_pretrained(folder)
        (folder / "scheduler" / "scheduler_config.json").unlink()
        error = train("--prompts", "prompts.txt", "--model", folder).error
        assert error.startswith(f"cannot load {folder}: ")
        assert "scheduler_config.json" in error

    def test_an_earlier_checkpoint_outlives_a_loss_that_is_no_number(
        self, train: Callable[..., Result], tmp_path: Path
    ) -> None:
        arguments = ["--prompts", "prompts.txt", *CELLS]
        assert train(*arguments, "--checkpoint-every", 1).code == 0
        cache = tmp_path / OUT / "clips"
        torch.manual_seed(0)
        from safetensors.torch import load_file, save_file

        for path in cache.glob("*.safetensors"):
            tensors = load_file(path)
            save_file({name: x * float("nan") for name, x in tensors.items()}, path)
        error = train(*arguments, "--checkpoint-every", 1, "--resume", "--steps", 4).error
        assert error.startswith("the loss is nan at step 3: try a smaller learning_rate than 0.05")
        names = [path.name for path in sorted((tmp_path / OUT / "checkpoints").iterdir())]
        assert names == ["step-000001", "step-000002"]


class TestFitting:
    """Trainings in little memory, and what is said about memory beforehand."""

    def test_int8_stops_goes_on_and_makes_a_video(
        self, train: Callable[..., Result], diffattn: Callable[..., Result], tiny_wan: Path
    ) -> None:
        options = ("--prompts", "prompts.txt", "--attn", "gna", "--base-dtype", "int8")
        options += ("--gradient-checkpointing", "--checkpoint-every", "1", "--dtype", "bfloat16")
        whole = train(*options)
        assert whole.code == 0, whole.err
        (line,) = [line for line in whole.out.splitlines() if line.startswith("memory: about ")]
        assert re.search(
            r"\d MiB \(frozen weights .*MiB, activations .*MiB, trained weights .*"
            r" are free; a step: .*FLOP outside of attention, .*% of a dense step's\), at least"
            r" [\d.e-]+ s here",
            line,
        )
        weights = load_file(Path(OUT, "pytorch_lora_weights.safetensors"))
        half = ("--cache", f"{OUT}/clips", "-o", "half")
        assert train(*options, *half, "--steps", "1").code == 0
        assert train(*options, *half, "--resume").code == 0
        again = load_file("half/pytorch_lora_weights.safetensors")
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        plain = train(*options[:4], *half, "--resume", "--dtype", "bfloat16")
        assert "cannot go on from" in plain.error
        result = diffattn("generate", "a cat", "--model", tiny_wan, *SIZE, "--lora", OUT)
        assert result.code == 0, result.err

    def test_nf4_by_bitsandbytes(
        self, train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # diffusers wants an accelerator; bitsandbytes itself computes on the CPU, too.
        from bitsandbytes.nn import Linear4bit
        from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

        import diffattn.lora.frozen as frozen

        monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: 0)
        monkeypatch.setattr(
            BnB4BitDiffusersQuantizer, "update_device_map", lambda *_: {"": torch.device("cpu")}
        )
        monkeypatch.setattr(frozen, "check_available", lambda *_: None)
        seen: list[list[str]] = []
        real = Trainer.train

        def look(trainer: Trainer, **given: Any) -> None:
            parts = trainer.model.named_modules()
            seen.append([name for name, part in parts if isinstance(part, Linear4bit)])
            real(trainer, **given)

        monkeypatch.setattr(Trainer, "train", look)
        # Its kernel wants wider layers than those of the tiny model.
        options = ("--model", "moving-shapes", "--prompts", "prompts.txt", "--attn", "gna")
        options += ("--base-dtype", "nf4", "--gradient-checkpointing", "--dtype", "bfloat16")
        result = train(*options, "--height", "32", "--width", "32", "--num-frames", "4")
        assert result.code == 0, result.err
        assert seen
        assert seen[0]
        assert all(name.startswith("blocks.") for name in seen[0])

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            (["--base-dtype", "int4"], "--base-dtype must be one of fp8, int8, nf4, not 'int4'"),
            (["--base-dtype", "nf4"], "base_dtype is nf4, but diffusers loads weights of bits"),
            (["--base-dtype", "int8", "--dora"], "dora reads frozen weights in full, but base_"),
            (
                ["--swap-blocks", "1", "--gradient-checkpointing"],
                "--swap-blocks moves what waits to main memory, but the device is cpu",
            ),
            (["--swap-blocks", "1"], "swap_blocks is 1, but gradient_checkpointing is off"),
            (["--optimizer", "adam"], "optimizer is 'adam', but must be LIBRARY.CLASS"),
            (["--optimizer", "torch.LBFGS"], "torch has no optimiser 'LBFGS' that trains a LoRA"),
            (["--optimizer", "torch.AdmW"], "'AdmW' that trains a LoRA; did you mean 'AdamW'"),
            (["--optimizer-arg", "betas"], "--optimizer-arg takes name=value, not 'betas'"),
            (["--optimizer-arg", "beta=1"], "optimizer_args has 'beta', but torch.AdamW takes"),
            (["--optimizer-arg", "lr=1"], "learning_rate and weight_decay are settings of their"),
            (["--optimizer-arg", "eps=-1"], "torch.AdamW refuses its arguments: Invalid epsilon"),
            (
                ["--optimizer", "schedulefree.AdamWScheduleFree", "--schedule", "cosine"],
                "which needs no schedule",
            ),
            (["--optimizer", "schedulefree.SGDScheduleFree", "--ema", "0.9"], "leave ema out"),
        ],
    )
    def test_what_is_refused(
        self, train: Callable[..., Result], options: list[str], error: str
    ) -> None:
        assert error in train("--prompts", "prompts.txt", "--attn", "gna", *options).error
        assert not Path(OUT).exists()

    @pytest.mark.parametrize(
        ("package", "options"),
        [
            ("torchao", ["--base-dtype", "int8"]),
            ("schedulefree", ["--optimizer", "schedulefree.AdamWScheduleFree"]),
        ],
    )
    def test_missing_packages_are_named(
        self,
        train: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
        package: str,
        options: list[str],
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *a: None if name == package else real(name, *a),
        )
        result = train("--prompts", "prompts.txt", "--attn", "gna", *options)
        assert f"needs {package}: pip install diffattn[{package}]" in result.error


class TestPlan:
    def test_as_a_table_and_as_json(self, diffattn: Callable[..., Result], tiny_wan: Path) -> None:
        given = ("lora", "plan", "--model", tiny_wan, *SIZE[:6], "--attn", "gna", "--rank", "2")
        table = diffattn(*given, "--vram", "2")
        assert table.code == 0, table.err
        assert table.err == ""
        assert "gna, rank 2" in table.out
        assert "frozen weights" in table.out
        assert "the fastest that fits 2 GiB" in table.out
        made = json.loads(diffattn(*given, "--vram", "2", "--json").out)
        memory = made["memory"]
        parts = ("weights", "adapter", "gradients", "optimizer", "activations", "unpacked")
        assert memory["total"] == sum(memory[part] for part in (*parts, "overhead"))
        assert [one["choice"]["base_dtype"] for one in made["fitting"]] == [
            None, "fp8", "int8", "nf4",
        ]  # fmt: skip
        assert all(one["fits"] for one in made["fitting"])
        assert 0 < made["work"]["attention"] <= made["work"]["dense_attention"]
        # Three blocks do not fit beside a driver in a GiB, in whatever way.
        small = json.loads(diffattn(*given, "--vram", "1", "--json").out)
        assert not any(one["fits"] for one in small["fitting"])
        assert all(one["choice"]["swap_blocks"] > 0 for one in small["fitting"])

    def test_it_says_what_training_says(
        self, diffattn: Callable[..., Result], train: Callable[..., Result], tiny_wan: Path
    ) -> None:
        said = train("--prompts", "prompts.txt", "--attn", "gna", "--dtype", "bfloat16").out
        given = ("--model", tiny_wan, *SIZE[:6], "--attn", "gna", "--rank", "2", "--json")
        memory = json.loads(diffattn("lora", "plan", *given).out)["memory"]
        total = memory["total"] - memory["overhead"]
        assert f"memory: about {total / 2**20:.2f} MiB" in said

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            (["--model", "Wan-AI/Wan9"], "'Wan-AI/Wan9' is neither a pipeline's folder here nor"),
            (["--vram", "0"], "--vram must be a number above 0"),
            (["--tflops", "-1"], "--tflops must be a number above 0"),
            (["--base-dtype", "int4"], "--base-dtype must be one of fp8, int8, nf4"),
            (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16"),
            (["--height", "33"], "height is 33"),
            (["--num-frames", "0"], "--num-frames must be a whole number of at least 1"),
            (["--rank", "0"], "rank is 0, but must be"),
            (["--rank", "9999"], "rank is 9999, but the"),
            (["--attn", "dense"], "the method is dense, which needs no adapting"),
            (["--swap-blocks", "2"], "but gradient_checkpointing is off"),
            (
                ["--swap-blocks", "99", "--gradient-checkpointing"],
                "swap_blocks is 99, but moving-shapes has 4 blocks: give at most as many",
            ),
        ],
    )
    def test_what_is_refused(
        self, diffattn: Callable[..., Result], options: list[str], error: str
    ) -> None:
        given = () if "--attn" in options else ("--attn", "gna")
        assert error in diffattn("lora", "plan", *given, *options).error
