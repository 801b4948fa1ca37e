"""VBench in an environment of its own: a stand-in that behaves as vbench 0.1.5 does."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffattn.pipelines.compare import vbench
from diffattn.pipelines.compare.vbench import DIMENSIONS

from .conftest import SIZE, Result

PROMPTS = ["a red circle", "a blue square"]
SCORED = ["--measure", "vbench_imaging_quality", "--measure", "vbench_dynamic_degree"]

# What `VBench.evaluate` does with mode="custom_input": the files of a folder by os.listdir, prompts
# by the names of the files, a mean and a list of scores by file. The imaging quality of a file is
# 100 times as large as the mean says, and the dynamic degree of a file is a bool.
PACKAGE = """
import json, os, sys
import clip
from pathlib import Path
from torch import cuda

assert clip.BY == "OpenAI", clip.__file__
assert "diffattn" not in sys.modules


class VBench(object):
    def __init__(self, device, full_info_dir, output_path):
        assert os.path.isfile(full_info_dir), full_info_dir
        self.device, self.full_info_dir, self.output_path = device, full_info_dir, output_path
        os.makedirs(self.output_path, exist_ok=True)

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False,
                 read_frame=False, mode="vbench_standard", **kwargs):
        print("Evaluation meta data saved")
        results = {}
        broken = Path(__file__).with_name("broken").read_text().split()
        for dimension in dimension_list:
            if dimension in broken:
                raise RuntimeError("Command '['wget', 'https://host/w.pth']' returned non-zero")
            assert mode == "custom_input"
            infos = []
            for filename in os.listdir(videos_path):
                if Path(filename).suffix.lower() not in [".mp4", ".gif", ".jpg", ".png"]:
                    continue
                path = os.path.join(videos_path, filename)
                infos.append({"prompt_en": filename, "video_list": [path]})
            if len(prompt_list) > 0:
                by_path = {os.path.join(videos_path, p): prompt_list[p] for p in prompt_list}
                assert len(by_path) >= len(infos)
                for info in infos:
                    info["prompt_en"] = by_path[info["video_list"][0]]
            found = []
            for info in infos:
                (path,) = info["video_list"]
                score = os.stat(path).st_size % 97 / 97 + len(info["prompt_en"])
                if dimension == "dynamic_degree":
                    score = os.stat(path).st_size % 2 == 0
                elif dimension == "imaging_quality":
                    score = 100 * score
                found.append({"video_path": path, "video_results": score})
            mean = sum(one["video_results"] for one in found) / len(found)
            whole = 100 if dimension == "imaging_quality" else 1
            results[dimension] = [mean / whole, found]
        output = os.path.join(self.output_path, name + "_eval_results.json")
        with open(output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=4)
"""
TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)


def device(name):
    return name
"""


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the stand-in; returns its site-packages."""
    folder = tmp_path_factory.mktemp("environment of vbench")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "vbench").mkdir()
    (site / "vbench/__init__.py").write_text(PACKAGE)
    (site / "vbench/VBench_full_info.json").write_text("[]")
    (site / "vbench/broken").write_text("")
    (site / "torch.py").write_text(TORCH)
    (site / "clip.py").write_text('BY = "OpenAI"\n')
    command = folder / "bin/vbench"
    command.write_text(f"#!{folder}/bin/python\nfrom vbench.cli.vbench import main\n")
    command.chmod(0o755)
    vbench._check_import.cache_clear()
    return site


@pytest.fixture
def compare(
    diffattn: Callable[..., Result],
    tiny_wan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: Path,
) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFATTN_VBENCH", str(environment.parents[2] / "bin/python"))

    def run(*arguments: object) -> Result:
        gna = ["--attn", "gna window=1,3,3 dense_steps=0"]
        return diffattn("compare", "--model", tiny_wan, *SIZE, *PROMPTS, *gna, "-o", "out",
                        *arguments)  # fmt: skip

    return run


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "samples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def expected(row: dict[str, str], folder: Path) -> dict[str, float]:
    size = (folder / row["file"]).stat().st_size
    return {
        "vbench_imaging_quality": size % 97 / 97 + len(row["prompt"]),
        "vbench_dynamic_degree": float(size % 2 == 0),
    }


def test_every_video_has_the_score_of_its_file_and_prompt(compare: Any, tmp_path: Path) -> None:
    result = compare(*SCORED)
    assert result.code == 0, result.err
    assert "VBench imaging quality: 8 videos" in result.out
    rows = table(tmp_path / "out")
    assert len(rows) == 8
    for row in rows:
        for name, value in expected(row, tmp_path / "out").items():
            assert float(row[name]) == pytest.approx(value)
    assert "| VBench imaging quality | " in result.out
    before = (tmp_path / "out/samples.csv").read_bytes()
    again = compare(*SCORED)
    assert "VBench imaging quality: " not in again.out
    assert (tmp_path / "out/samples.csv").read_bytes() == before


def test_what_failed_or_came_later_is_scored_by_the_next_run(
    compare: Any, environment: Path, tmp_path: Path
) -> None:
    (environment / "vbench/broken").write_text("dynamic_degree")
    result = compare(*SCORED, "--only", "dense")
    assert result.code == 0, result.err
    reason = (
        "VBench cannot score dynamic_degree (RuntimeError: Command '['wget',"
        " 'https://host/w.pth']' returned non-zero); VBench keeps its networks in ~/.cache/vbench"
    )
    assert f"left out: {reason}" in result.out
    for row in table(tmp_path / "out"):
        assert row["vbench_dynamic_degree"].startswith(reason)
        assert float(row["vbench_imaging_quality"]) > 0
    (environment / "vbench/broken").write_text("")
    result = compare(*SCORED)
    assert "VBench dynamic degree: 8 videos" in result.out
    assert "VBench imaging quality: 6 videos" in result.out
    for row in table(tmp_path / "out"):
        for name, value in expected(row, tmp_path / "out").items():
            assert float(row[name]) == pytest.approx(value)


def test_a_video_that_was_removed_has_no_score(compare: Any, tmp_path: Path) -> None:
    assert compare("--measure", "psnr", "--measure", "vbench_motion_smoothness").code == 0
    rows = table(tmp_path / "out")
    (tmp_path / "out" / rows[0]["file"]).unlink()
    text = (tmp_path / "out/samples.csv").read_text()
    (tmp_path / "out/samples.csv").write_text(
        text.replace(rows[0]["vbench_motion_smoothness"], "x")
    )
    assert compare("--measure", "psnr", "--measure", "vbench_motion_smoothness").code == 0
    after = table(tmp_path / "out")
    assert after[0]["vbench_motion_smoothness"] == "VBench gave no motion_smoothness"


def test_the_command_on_the_path_names_the_environment(
    environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DIFFATTN_VBENCH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vbench.python() is None
    assert vbench.lacking() == "not installed: vbench"
    own = environment.parents[2] / "bin"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{own}")
    # pipx puts a link to the command on the PATH.
    (tmp_path / "vbench").symlink_to(own / "vbench")
    assert vbench.python() == own / "python"
    vbench.prepare()
    (own / "vbench").write_text("#!/bin/sh\nexec something\n")
    assert vbench.python() is None


class TestNotThere:
    def test_no_environment(self, compare: Any, monkeypatch: Any, tmp_path: Path) -> None:
        monkeypatch.delenv("DIFFATTN_VBENCH")
        monkeypatch.setenv("PATH", os.defpath)
        assert compare(*SCORED).error == (
            "--measure vbench_imaging_quality: there is no command vbench, or not of a Python:"
            " install it in an environment of its own (pipx install vbench), or name the Python of"
            " that environment by DIFFATTN_VBENCH"
        )
        assert not (tmp_path / "out").exists()

    def test_a_variable_that_names_nothing(
        self, compare: Any, monkeypatch: Any, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("DIFFATTN_VBENCH", "nowhere/python")
        message = (
            "DIFFATTN_VBENCH is 'nowhere/python', but must be the Python of an environment with the"
            " package vbench, such as /path/to/env/bin/python"
        )
        assert compare(*SCORED).error == f"--measure vbench_imaging_quality: {message}"
        assert vbench.lacking() == message

    def test_an_environment_without_the_package(
        self, compare: Any, environment: Path, tmp_path: Path
    ) -> None:
        (environment / "clip.py").unlink()
        error = compare(*SCORED).error
        python = environment.parents[2] / "bin/python"
        assert error == (
            f"--measure vbench_imaging_quality: {python} cannot import vbench (ModuleNotFoundError:"
            " No module named 'clip')"
        )


def test_the_script_needs_no_file_of_this_project(environment: Path, tmp_path: Path) -> None:
    """As a user would run it; a folder named as VBench's own modules stands in the way."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"12345")
    request = {
        "videos": str(tmp_path / "videos"), "output": str(tmp_path / "output"),
        "prompts": {"a.mp4": "a cat"}, "dimension": "aesthetic_quality",
    }  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps(request))
    subprocess.run(
        [environment.parents[2] / "bin/python", "-I", vbench._SCRIPT, tmp_path / "request.json"],
        check=True,
        capture_output=True,
    )
    scores = json.loads((tmp_path / "output/scores.json").read_text())
    assert scores == {"a.mp4": pytest.approx(5 / 97 + 5)}


def test_dimensions_are_those_that_take_any_prompt() -> None:
    # VBench.check_dimension_requires_extra_info refuses these for custom input.
    refused = {
        "object_class", "multiple_objects", "scene", "appearance_style", "color",
        "spatial_relationship",
    }  # fmt: skip
    assert not refused & {*DIMENSIONS}
