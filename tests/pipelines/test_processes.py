"""``diffattn generate --context-parallel``: what it refuses, and a run of two processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from diffattn import TokenGrid
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run import processes
from diffattn.pipelines.run.request import Request

PROMPT = "a red circle"
SPARSE = [f"--attn-arg={part}" for part in ("rule=paper", "sink=false", "dense_steps=1")]
SIZE = ["--height", "32", "--width", "48", "--num-frames", "13", "--steps", "2"]
GRID = TokenGrid(2, 2, 3)  # of 5 frames of 32 x 48 pixels
DEADLINE = 180  # far more than it takes on idle processors


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")


def complete(**changes) -> Request:
    settings = {"height": 32, "width": 48, "num_frames": 5, "context_parallel": "ulysses"}
    return Request("x", **settings | changes)


class TestRefused:
    def test_an_unknown_way(self, generate):
        assert generate(PROMPT, "-o", "out.mp4", "--context-parallel", "ulises").error == (
            "--context-parallel must be one of none, ulysses, ring, not 'ulises'; "
            "did you mean 'ulysses'?"
        )

    @pytest.mark.parametrize("way", ["ulysses", "ring"])
    def test_without_torchrun(self, generate, way):
        assert generate(PROMPT, "-o", "out.mp4", "--context-parallel", way).error == (
            f"--context-parallel {way} needs several processes, started with torchrun "
            "--nproc-per-node 2 --no-python diffattn generate ..."
        )

    @pytest.mark.usefixtures("two_processes")
    def test_processes_that_would_all_do_the_same(self, generate):
        assert generate(PROMPT, "-o", "out.mp4").error == (
            "torchrun started 2 processes, each of which would make the same video: give "
            "--context-parallel ulysses or ring"
        )

    @pytest.mark.usefixtures("two_processes")
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["ring", "--compare"], "goes with sparse methods, not with --compare"),
            (["ring", "--attn", "dense"], "goes with sparse methods, not with --attn dense"),
            (["ulysses", "--offload", "model"], "give --context-parallel or --offload, not both"),
        ],
    )
    def test_options_that_do_not_go_together(self, generate, options, message):
        assert message in generate(PROMPT, "-o", "out.mp4", "--context-parallel", *options).error

    @pytest.mark.usefixtures("two_processes")
    def test_a_machine_without_accelerators(self, generate, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
        assert generate(PROMPT, "-o", "out.mp4", "--context-parallel", "ring").error == (
            "--context-parallel ring needs an accelerator: diffusers finds none here"
        )

    @pytest.mark.parametrize(
        ("count", "changes", "message"),
        [
            (3, {}, "the 2 attention heads of WanTransformer3DModel cannot be divided among 3 "),
            (5, {"context_parallel": "ring"}, "5 frames 48x32 are 12 tokens, which cannot be"),
        ],
    )
    def test_what_cannot_be_divided(self, tiny_wan, monkeypatch, count, changes, message):
        from diffusers import WanPipeline

        monkeypatch.setenv("WORLD_SIZE", str(count))
        pipe = WanPipeline.from_pretrained(tiny_wan)
        with pytest.raises(UserError, match=message):
            processes.spread(pipe, complete(**changes), GRID)

    @pytest.mark.usefixtures("two_processes")
    def test_a_model_without_a_plan(self, tiny_wan, monkeypatch):
        from diffusers import WanPipeline, WanTransformer3DModel

        monkeypatch.setattr(WanTransformer3DModel, "_cp_plan", None)
        with pytest.raises(UserError, match="WanTransformer3DModel cannot be spread over proc"):
            processes.spread(WanPipeline.from_pretrained(tiny_wan), complete(), GRID)

    def test_what_a_method_cannot_do(self, generate, monkeypatch):
        from diffattn import GNAAttn

        def attend(*call, **options):
            raise NotImplementedError("not on\nSundays")

        monkeypatch.setattr(GNAAttn, "attend", attend)
        options = ["--attn=gna", "--attn-arg=window=1", "--attn-arg=dense_steps=0"]
        assert generate(PROMPT, "-o", "out.mp4", *options).error == "not on Sundays"


class TestDevice:
    @pytest.fixture(autouse=True)
    def _two_gpus(self, monkeypatch):
        self.chosen: list[int] = []
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda **options: torch.device("cuda")
        )
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.setattr(torch.accelerator, "set_device_index", self.chosen.append)

    def test_each_process_has_its_own(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        for asked in (None, "cuda"):
            request = complete(device=asked)
            device = processes.own_device(torch.device("cuda"), request)
            assert device == torch.device("cuda:1")
        assert self.chosen == [1, 1]

    def test_more_processes_than_devices(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(UserError, match="there are 2 cuda devices for more processes"):
            processes.own_device(torch.device("cuda"), complete())

    @pytest.mark.parametrize("asked", ["cpu", "cuda:0"])
    def test_a_device_for_all(self, asked):
        with pytest.raises(UserError, match=f"of its own: leave --device {asked} out"):
            processes.own_device(torch.device(asked), complete(device=asked))

    def test_one_process_keeps_what_it_was_given(self):
        device = torch.device("cpu")
        assert processes.own_device(device, complete(context_parallel="none")) == device


def run_two(folder: Path, arguments: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each process."""
    script = Path(__file__).with_name("parallel_cli.py")
    started = [
        subprocess.Popen(
            [sys.executable, script, folder, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        for rank in range(2)
    ]
    end = time.monotonic() + DEADLINE
    try:
        texts = [process.communicate(timeout=end - time.monotonic()) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_two_processes_make_the_video_of_one(diffattn, tiny_wan, tmp_path, way):
    alone, both = tmp_path / "alone.png", tmp_path / "both.png"
    options = [PROMPT, "--model", str(tiny_wan), *SIZE, *SPARSE]
    assert diffattn("generate", *options, "-o", alone).code == 0
    shared = ["--context-parallel", way, "-o", str(both)]
    first, second = run_two(tmp_path, ["generate", *options, *shared])
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert f", {way} over 2 processes; " in first[1]
    assert second[1] == second[2] == ""
    expected, frames = (
        np.stack([iio.imread(path) for path in sorted(file.with_suffix("").glob("*.png"))])
        for file in (alone, both)
    )
    # Rounding may turn at one half.
    assert np.abs(frames.astype(int) - expected).max() <= 1
    record = json.loads((tmp_path / "both.png.json").read_text())
    assert record["settings"]["context_parallel"] == way
    assert record["processes"] == 2
