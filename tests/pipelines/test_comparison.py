"""`diffattn compare`: the table, resuming, and bad input."""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffattn import GNAAttn, TokenGrid
from diffattn.pipelines.compare import run as comparing
from diffattn.pipelines.compare.case import Case, cases_of_file
from diffattn.pipelines.compare.sample_table import Row, SampleTable
from diffattn.pipelines.compare.table import against_floors, between, lines, shown
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run import generate as generating

from .conftest import SIZE, Result

PROMPTS = ["a red circle", "a blue square"]
GNA = ["--attn", "gna window=1,3,3 dense_steps=0"]
MEASURES = ["--measure", "psnr", "--measure", "motion"]
# Of these, times and memory differ from run to run.
EVERY_TIME = ("case", "prompt", "seed", "density", "file", "psnr", "motion")


@pytest.fixture
def compare(
    diffattn: Callable[..., Result], tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run `diffattn compare` on the tiny model, inside `tmp_path`, into the folder out."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        return diffattn("compare", "--model", tiny_wan, *SIZE, "-o", "out", *arguments)

    return run


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "samples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def lasting(folder: Path) -> list[dict[str, str]]:
    """What two runs have in common, sorted."""
    rows = [{name: row[name] for name in EVERY_TIME} for row in table(folder)]
    return sorted(rows, key=lambda row: (row["case"], row["prompt"], row["seed"]))


class TestRun:
    def test_every_case_has_every_sample(self, compare: Any, tmp_path: Path) -> None:
        result = compare(*PROMPTS, "--seed", 1, "--seed", 7, *GNA, "--attn", "radial")
        assert result.code == 0, result.err
        rows = table(tmp_path / "out")
        cases = ["dense", "floor: precision", "floor: kernel", GNA[1], "radial"]
        keys = {(row["case"], row["prompt"], row["seed"]) for row in rows}
        assert keys == {(case, prompt, seed) for case in cases for prompt in PROMPTS
                        for seed in ("1", "7")}  # fmt: skip
        assert len(rows) == len(keys)
        for row in rows:
            assert (tmp_path / "out" / row["file"]).is_file()
            assert float(row["seconds"]) >= float(row["loop_seconds"]) > 0
            assert float(row["memory_gib"]) > 0
            assert (row["psnr"] == "") == (row["case"] == "dense")
            assert row["ms_ssim"].startswith("too small") or row["case"] == "dense"
            assert row["right"] == "no checker for this model"
        assert "| floor: kernel | 4 |" in result.out
        assert "LPIPS: not installed: lpips." in result.out or "LPIPS" in result.out
        record = json.loads((tmp_path / "out/comparison.json").read_text())
        assert record["seeds"] == [1, 7]
        assert record["cases"][GNA[1]]["attention"]["window"] == [1, 3, 3]
        assert record["cases"]["floor: precision"]["dtype"] == "bfloat16"

    def test_the_numbers_are_those_of_the_frames(
        self, compare: Any, diffattn: Any, tiny_wan: Path, tmp_path: Path
    ) -> None:
        """PSNR of the CSV against frames that two runs of `generate` write without loss."""
        assert compare(PROMPTS[0], "--seed", 5, *GNA, *MEASURES).code == 0
        run = ["generate", PROMPTS[0], "--model", tiny_wan, *SIZE, "--seed", 5]
        sparse = ["--attn", "gna", "--attn-arg", "window=1,3,3", "--attn-arg", "dense_steps=0"]
        assert diffattn(*run, "--attn", "dense", "-o", "dense.png").code == 0
        assert diffattn(*run, *sparse, "-o", "sparse.png").code == 0
        dense, other = (
            np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / n).iterdir())])
            for n in ("dense", "sparse")
        )
        error = ((dense.astype(float) - other.astype(float)) ** 2).mean()
        row = next(row for row in table(tmp_path / "out") if row["case"] == GNA[1])
        assert float(row["psnr"]) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)
        density = GNAAttn(window=(1, 3, 3)).mask(TokenGrid(2, 2, 3)).density
        assert float(row["density"]) == pytest.approx(density)

    def test_the_kernel_floor_uses_another_kernel(
        self, compare: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        used = []
        render = comparing.render

        def seen(request: Any, loaded: Any, label: str, *args: Any, **rest: Any) -> Any:
            used.append((label, torch.backends.cuda.flash_sdp_enabled()))
            return render(request, loaded, label, *args, **rest)

        monkeypatch.setattr(comparing, "render", seen)
        assert compare(PROMPTS[0], *GNA, *MEASURES).code == 0
        assert set(used) == {
            ("dense", True), (GNA[1], True), ("floor: precision", True), ("floor: kernel", False)
        }  # fmt: skip

    def test_cases_of_a_file(self, compare: Any, tmp_path: Path) -> None:
        cases = {
            "name alone": "gna",
            "with parameters": {"type": "gna", "window": [1, 2, 2]},
            "cached": {"attention": "dense", "cache": "first-block"},
        }
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        (tmp_path / "policy.json").write_text(json.dumps(GNAAttn(window=(1, 1, 1)).to_dict()))
        options = ["--cases", "cases.json", "--attn-config", "policy.json"]
        assert compare(PROMPTS[0], *options, *MEASURES).code == 0
        found = {row["case"] for row in table(tmp_path / "out")}
        assert {*cases, "policy"} <= found

    def test_wanted_densities(self, compare: Any, tmp_path: Path) -> None:
        options = ["--attn", "gna dense_steps=0", "--attn", "block-topk block=16 dense_steps=0"]
        size = ["--height", 128, "--width", 128, "--num-frames", 21]
        result = compare(
            PROMPTS[0], *options, "--density", 0.5, "--density", 0.25, *MEASURES, *size
        )
        assert result.code == 0, result.err
        found = {row["case"]: float(row["density"]) for row in table(tmp_path / "out")}
        for name, density in found.items():
            if " at " in name:
                assert density == pytest.approx(float(name.split()[-1]), rel=0.2), name
        assert len(found) == 3 + 4
        # A second run takes what the first has found.
        again = compare(PROMPTS[0], *options, "--density", 0.5, "--density", 0.25, *MEASURES, *size)
        assert again.code == 0
        assert "of the token pairs for" not in again.out

    def test_an_interrupted_search_goes_on(
        self, compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Shares that the content decides about are measured by runs."""
        from diffattn.pipelines.compare import densities

        render, left = densities.render, [3]

        def interrupted(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return render(*arguments, **options)

        monkeypatch.setattr(densities, "render", interrupted)
        options = [
            PROMPTS[0],
            "--attn",
            "gna dense_steps=0",
            "--attn",
            "sol block=16 dense_steps=0",
        ]
        options += ["--density", 0.5, "--only", "dense", *MEASURES]
        options += ["--height", 128, "--width", 128, "--num-frames", 21]
        result = compare(*options)
        assert result.code == 130
        assert "kept out/densities.json; the same command goes on from there" in result.err
        result = compare(*options)
        assert result.code == 0, result.err
        assert "sol block=16 dense_steps=0: " in result.out
        assert "gna dense_steps=0: " not in result.out
        again = compare(*options)
        assert again.code == 0
        assert "of the token pairs for" not in again.out

    def test_several_loras_with_scales(self, compare: Any, tmp_path: Path, tiny_lora: Path) -> None:
        two = ["--lora", f"{tiny_lora}:0.5", "--lora", f"{tiny_lora}:0.5"]
        cases = {"once": {"attention": "dense", "lora": str(tiny_lora)}}
        cases["off"] = {"attention": "dense", "lora": [f"{tiny_lora}:0", f"{tiny_lora}:0"]}
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        result = compare(PROMPTS[0], "--cases", "cases.json", *MEASURES, *two)
        assert result.code == 0, result.err
        assert f" with the LoRA {tiny_lora} and {tiny_lora}: " in result.out
        rows = table(tmp_path / "out")
        psnr = {row["case"]: float(row["psnr"]) for row in rows if row["psnr"]}
        # The dense model has both, which make the one: equal but for rounding.
        assert psnr.get("once", math.inf) > 60
        assert psnr["off"] < 50

    def test_loras_of_all_cases_and_of_one(
        self, compare: Any, tmp_path: Path, tiny_lora: Path
    ) -> None:
        assert compare(PROMPTS[0], *GNA, *MEASURES, "--lora", tiny_lora).code == 0
        cases = {"with": {"attention": "dense", "lora": str(tiny_lora)}}
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        (tmp_path / "out").rename(tmp_path / "all")
        assert compare(PROMPTS[0], "--cases", "cases.json", *MEASURES).code == 0
        with np.load(tmp_path / "all/dense/001.npz") as one:
            with_lora = one["frames"]
        with np.load(tmp_path / "out/dense/001.npz") as one:
            without = one["frames"]
        error = ((with_lora.astype(float) - without.astype(float)) ** 2).mean()
        row = next(row for row in table(tmp_path / "out") if row["case"] == "with")
        assert float(row["psnr"]) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)
        error_line = compare(PROMPTS[0], *GNA, "--lora", "nowhere", "-o", "new").error
        assert "nowhere" in error_line
        assert not (tmp_path / "new").exists()

    def test_a_model_of_pictures(
        self, diffattn: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import tiny_complete

        monkeypatch.chdir(tmp_path)
        tiny_complete._flux().save_pretrained("flux")
        size = ["--height", 64, "--width", 64, "--steps", 2]
        attn = ["--attn", "gna window=1,3,3 dense_steps=0"]
        result = diffattn("compare", "a cat", "--model", "flux", *size, *attn, "-o", "out")
        assert result.code == 0, result.err
        rows = table(tmp_path / "out")
        assert len(rows) == 4
        for row in rows:
            with Image.open(tmp_path / "out" / row["file"]) as image:
                assert image.size == (64, 64)
            assert row["frozen"] == "a picture"
        assert '"picture": true' in (tmp_path / "out/index.html").read_text("utf-8")

    def test_sound(self, compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        render = comparing.render

        def sounding(request: Any, loaded: Any, label: str, *args: Any, **rest: Any) -> Any:
            made = render(request, loaded, label, *args, **rest)
            sound = np.full((2, 100), 0.5 if label == "radial" else 1.0, np.float32)
            return dataclasses.replace(made, audio=sound)

        monkeypatch.setattr(comparing, "render", sounding)
        assert compare(PROMPTS[0], "--attn", "radial", "--measure", "audio_nmse").code == 0
        found = {row["case"]: row["audio_nmse"] for row in table(tmp_path / "out")}
        assert found["radial"] == "0.25"
        assert found["floor: kernel"] == "0"

    def test_the_sound_of_a_pipeline(self) -> None:
        import torch

        sound = torch.ones(1, 2, 7, dtype=torch.bfloat16)
        found = generating._sound(sound)
        assert found is not None
        assert (found.shape, found.dtype) == ((2, 7), np.float32)
        assert generating._sound([np.zeros(7)]).shape == (1, 7)
        assert generating._sound(None) is None


class TestFlexAttention:
    """The floor of a mask: another kernel computes it."""

    FLOOR = f"floor: FlexAttention, {GNA[1]}"

    def test_it_is_compared_with_its_own_case(
        self, compare: Any, diffattn: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: Any
    ) -> None:
        result = compare(PROMPTS[0], *GNA, *MEASURES, "--flex", GNA[1])
        assert result.code == 0, result.err
        rows = {row["case"]: row for row in table(tmp_path / "out")}
        assert len(rows) == 5
        # The kernels round differently, far less than the method differs from dense attention.
        assert float(rows[self.FLOOR]["psnr"]) > float(rows[GNA[1]]["psnr"])
        assert rows[self.FLOOR]["density"] == rows[GNA[1]]["density"]
        assert rows[self.FLOOR]["motion"] != rows["dense"]["motion"]
        assert "DIFFATTN_BACKEND" not in os.environ
        page = (tmp_path / "out/index.html").read_text("utf-8")
        assert "whose mask torch's FlexAttention computes" in page
        # Against frames that two runs of `generate` write without loss.
        run = ["generate", PROMPTS[0], "--model", tiny_wan, *SIZE, "--attn", "gna"]
        run += ["--attn-arg", "window=1,3,3", "--attn-arg", "dense_steps=0"]
        assert diffattn(*run, "-o", "own.png").code == 0
        monkeypatch.setenv("DIFFATTN_BACKEND", "flex")
        assert diffattn(*run, "-o", "flex.png").code == 0
        own, flex = (
            np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / n).iterdir())])
            for n in ("own", "flex")
        )
        error = ((own.astype(float) - flex.astype(float)) ** 2).mean()
        want = math.inf if error == 0 else 10 * math.log10(255**2 / error)
        assert float(rows[self.FLOOR]["psnr"]) == pytest.approx(want, abs=1e-4)

    @pytest.fixture
    def backends(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
        """The backend that is asked for in each render; none is compiled."""
        used: list[tuple[str, str | None]] = []
        render = comparing.render

        def seen(request: Any, loaded: Any, label: str, *args: Any, **rest: Any) -> Any:
            used.append((label, os.environ.get("DIFFATTN_BACKEND")))
            with monkeypatch.context() as own:
                own.delenv("DIFFATTN_BACKEND", raising=False)
                return render(request, loaded, label, *args, **rest)

        monkeypatch.setattr(comparing, "render", seen)
        return used

    def test_only_its_own_case_is_rendered_by_it(self, compare: Any, backends: Any) -> None:
        radial = ["--attn", "radial"]
        assert compare(PROMPTS[0], *GNA, *radial, *MEASURES, "--flex", GNA[1]).code == 0
        assert {label for label, backend in backends if backend == "flex"} == {self.FLOOR}
        assert {label for label, backend in backends if backend is None} == {
            "dense", "floor: precision", "floor: kernel", GNA[1], "radial"
        }  # fmt: skip

    @pytest.mark.usefixtures("backends")
    def test_made_alone_or_later_it_has_its_own_case(self, compare: Any, tmp_path: Path) -> None:
        options = [PROMPTS[0], *GNA, *MEASURES, "--flex", GNA[1]]
        assert compare(*options, "--only", self.FLOOR).code == 0
        assert [row["case"] for row in table(tmp_path / "out")] == ["dense", GNA[1], self.FLOOR]
        (exact,) = (tmp_path / "out/dense").glob("*gna*.npz")
        exact.unlink()
        # Nothing is to be compared with these frames any more.
        assert "made again" not in compare(*options).out
        lines = (tmp_path / "out/samples.csv").read_text().splitlines(keepends=True)
        rest = [line for line in lines if self.FLOOR not in line]
        (tmp_path / "out/samples.csv").write_text("".join(rest))
        result = compare(*options)
        assert f"{GNA[1]}, sample 1: its frames were made again" in result.out
        assert len(table(tmp_path / "out")) == 5

    def test_where_it_cannot_be_compiled_the_floor_is_left_out(
        self, compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "diffattn.flex_backend._compiled_flex", lambda: _raise(RuntimeError("no compiler"))
        )
        result = compare(*PROMPTS, *GNA, *MEASURES, "--flex", GNA[1])
        assert result.code == 0, result.err
        assert (
            f"left out: case {self.FLOOR!r}, sample 1: torch's FlexAttention does not work here"
            f" (no compiler)"
        ) in result.err
        assert result.err.count("no compiler") == 1
        assert len(table(tmp_path / "out")) == 2 * 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--flex", "gnaa"], "--flex 'gnaa' is no case of this run; did you mean 'gna'?"),
            (["--flex", "gna", "--flex", "gna"], "--flex 'gna' is given twice"),
            (
                ["--attn", "vmoba", "--flex", "vmoba"],
                "--flex 'vmoba': FlexAttention computes methods that are a mask and nothing else,"
                " such as gna and radial, not vmoba with these parameters",
            ),
            (
                ["--attn", "clear down_factor=8", "--flex", "clear down_factor=8"],
                "--flex 'clear down_factor=8': FlexAttention computes methods that are a mask and"
                " nothing else, such as gna and radial, not clear with these parameters",
            ),
        ],
    )
    def test_cases_that_it_does_not_compute(
        self, compare: Any, tmp_path: Path, options: list[str], message: str
    ) -> None:
        assert compare(PROMPTS[0], "--attn", "gna", *options).error == message
        assert not (tmp_path / "out").exists()

    def test_where_it_computes_everything(
        self, compare: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DIFFATTN_BACKEND", "flex")
        assert compare(PROMPTS[0], "--attn", "gna", "--flex", "gna").error == (
            "--flex 'gna': DIFFATTN_BACKEND is 'flex', so that the case itself is computed by"
            " FlexAttention: unset the variable"
        )


def _raise(error: Exception) -> None:
    raise error


class TestResuming:
    def test_a_finished_run_is_not_made_again(self, compare: Any, tmp_path: Path) -> None:
        assert compare(PROMPTS[0], *GNA, *MEASURES).code == 0
        before = (tmp_path / "out/samples.csv").read_bytes()
        summary = (tmp_path / "out/summary.md").read_bytes()
        again = compare(PROMPTS[0], *GNA, *MEASURES)
        assert again.code == 0
        assert (tmp_path / "out/samples.csv").read_bytes() == before
        assert (tmp_path / "out/summary.md").read_bytes() == summary
        assert "sample 1" not in again.out

    def test_ctrl_c_at_any_sample(
        self, compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = [*PROMPTS, *GNA, *MEASURES]
        assert compare(*options).code == 0
        whole = lasting(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        render, left = comparing.render, [0]

        def interrupted(request: Any, *args: Any, **rest: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return render(request, *args, **rest)

        ends = 0
        monkeypatch.setattr(comparing, "render", interrupted)
        for count in (0, 2, 3, 4, 5, 30):
            left[0] = count
            result = compare(*options)
            if result.code == 0:
                break
            ends += 1
            assert result.code == 130
            rows = table(tmp_path / "out") if (tmp_path / "out/samples.csv").exists() else []
            kept = "kept out/samples.csv; the same command goes on from there"
            assert (kept if rows else "nothing was written") in result.err
        assert ends >= 3
        assert lasting(tmp_path / "out") == whole

    def test_killed_without_a_word(self, compare: Any, tmp_path: Path, tiny_wan: Path) -> None:
        options = [*PROMPTS, "--seed", "0", "--seed", "1", *GNA, *MEASURES]
        command = [sys.executable, "-P", "-m", "diffattn.pipelines", "compare", "-o", "out"]
        command += ["--model", str(tiny_wan), *SIZE, *options]
        samples = tmp_path / "out/samples.csv"
        killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        for _ in range(2400):
            if samples.exists() and len(samples.read_text().splitlines()) > 3:
                break
            assert killed.poll() is None
            time.sleep(0.05)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        made = len(table(tmp_path / "out"))
        assert made >= 3
        result = compare(*options)
        assert result.code == 0, result.err
        assert not list((tmp_path / "out").glob("**/*part*"))
        shutil.move(tmp_path / "out", tmp_path / "resumed")
        assert compare(*options).code == 0
        assert lasting(tmp_path / "resumed") == lasting(tmp_path / "out")

    def test_lost_frames_of_the_dense_model_are_made_again(
        self, compare: Any, tmp_path: Path
    ) -> None:
        other = ["--attn", "gna window=1,1,1 dense_steps=0"]
        assert compare(PROMPTS[0], *GNA, *other, *MEASURES, "--only", GNA[1]).code == 0
        (tmp_path / "out/dense/001.npz").unlink()
        before = table(tmp_path / "out")
        result = compare(PROMPTS[0], *GNA, *other, *MEASURES)
        assert result.code == 0
        assert "dense, sample 1: its frames were made again" in result.out
        assert table(tmp_path / "out")[: len(before)] == before

    def test_damaged_frames_of_the_dense_model(self, compare: Any, tmp_path: Path) -> None:
        options = [PROMPTS[0], *GNA, *MEASURES]
        assert compare(*options, "--only", "floor: kernel").code == 0
        (tmp_path / "out/dense/001.npz").write_bytes(b"PK\x03\x04 and nothing more")
        error = compare(*options).error
        assert error.startswith("cannot read out/dense/001.npz: ")
        assert error.endswith("remove it to have it made anew")
        (tmp_path / "out/dense/001.npz").unlink()
        assert compare(*options).code == 0

    def test_only_some_cases(self, compare: Any, tmp_path: Path) -> None:
        options = [PROMPTS[0], *GNA, "--attn", "radial", *MEASURES]
        assert compare(*options, "--only", "radial").code == 0
        assert {row["case"] for row in table(tmp_path / "out")} == {"dense", "radial"}
        assert compare(*options).code == 0
        assert len(table(tmp_path / "out")) == 5
        error = compare(*options, "--only", "radail").error
        assert error == "--only 'radail' is no case of this run; did you mean 'radial'?"

    def test_another_setting_in_the_same_folder(self, compare: Any, tmp_path: Path) -> None:
        assert compare(PROMPTS[0], *GNA, *MEASURES).code == 0
        before = (tmp_path / "out/samples.csv").read_bytes()
        end = ": repeat the same options to go on, or choose another folder"
        for options, difference in [
            ([PROMPTS[0], *GNA, *MEASURES, "--steps", 3], "steps 2, not 3"),
            ([PROMPTS[1], *GNA, *MEASURES], f"other prompts, {PROMPTS[0]}, not {PROMPTS[1]}"),
            ([*PROMPTS, *GNA, *MEASURES], "other prompts, 1, not 2"),
            ([PROMPTS[0], *GNA, *MEASURES, "--attn", "radial"], "no case 'radial'"),
            ([PROMPTS[0], "--attn", "radial", *MEASURES],
             f"the case {GNA[1]!r}, which is missing here"),
            ([PROMPTS[0], *GNA, "--measure", "psnr"], "other measures, 2, not 1"),
        ]:  # fmt: skip
            assert compare(*options).error == f"out holds a comparison with {difference}{end}"
        assert (tmp_path / "out/samples.csv").read_bytes() == before

    def test_two_runs_at_once(self, compare: Any, tmp_path: Path) -> None:
        from diffattn._locks import lock_file

        (tmp_path / "out").mkdir()
        lock = lock_file(tmp_path / "out/.lock")
        assert lock is not None
        error = compare(PROMPTS[0], *GNA).error
        assert error == "another run is at work in out: wait for its end, or end it"
        lock.remove()


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "give prompts or --prompts-file: one of the two"),
            ([PROMPTS[0]], "nothing to compare: give --attn, --attn-config or --cases"),
            ([PROMPTS[0], *GNA, *GNA], f"the case {GNA[1]!r} is given twice: leave one out"),
            (
                [PROMPTS[0], "--attn", "gna", "--attn", "gna dilation=1"],
                "the cases 'gna' and 'gna dilation=1' have the same settings: leave one out",
            ),
            (
                [PROMPTS[0], "--attn", "dense"],
                "'dense' is in every comparison: leave the case out, or rename it",
            ),
            (
                [PROMPTS[0], "--attn", "gna window"],
                "--attn 'gna' takes name=value, not 'window'",
            ),
            (
                [PROMPTS[0], "--attn", "gna 'window"],
                "--attn takes a method and its parameters, such as 'gna window=5,7,7', not"
                ' "gna \'window"',
            ),
            ([PROMPTS[0], *GNA, "--seed", 3, "--seed", 3], "--seed 3 is given twice"),
            (
                [PROMPTS[0], *GNA, "--density", 1.5],
                "--density must be a number above 0 and at most 1, not 1.5",
            ),
            (
                [PROMPTS[0], "--attn", "linfusion", "--density", 0.5],
                "--density: no parameter of linfusion sets its share of the token pairs; compare"
                " it by --cases or --attn-config, which --density leaves alone",
            ),
            ([PROMPTS[0], *GNA, "--height", 33], None),
        ],
    )
    def test_one_line_and_no_folder(
        self, compare: Any, tmp_path: Path, options: list[Any], message: str | None
    ) -> None:
        error = compare(*options).error
        assert message is None or error == message
        assert not (tmp_path / "out").exists()

    def test_repeated_prompts_are_named(self, compare: Any, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n{PROMPTS[0]}\n")
        result = compare("--prompts-file", "prompts.txt", *GNA, *MEASURES)
        assert result.code == 0
        assert "note: skipped blank lines of prompts.txt: 2" in result.out
        assert "skipped prompts of prompts.txt that repeat an earlier one: 3" in result.out
        assert len(table(tmp_path / "out")) == 2 * 4

    def test_a_model_that_does_not_fit(
        self, compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("diffattn.pipelines.run.memory.free_memory", lambda device: 1000)
        assert "tokens need at least" in compare(PROMPTS[0], *GNA).error
        assert not (tmp_path / "out").exists()

    def test_a_method_that_the_model_refuses(self, compare: Any, tmp_path: Path) -> None:
        error = compare(PROMPTS[0], "--attn", "freeswim native=99,99,99").error
        assert "native" in error
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[]", "must hold an object of names and methods"),
            ('{"a": 3}', "'a' must be a method: its name, or an object with a \"type\", not 3"),
            ('{"a": "gna", "a": "radial"}', "'a' stands there twice"),
            ('{"a": {"type": "gnaa"}}', "did you mean 'gna'?"),
            ('{"a": {"attention": "gna", "lora": 3}}', "'lora' must be text, not 3"),
            (
                '{"a": {"attention": "gna", "lorra": "x"}}',
                "the entry 'lorra'; did you mean 'lora'?",
            ),
            ('{"a": {"attention": "gna", "cache": "teacache"}}', "cache must be first-block or"),
            (
                '{"a": {"attention": "gna", "groups": "b"}}',
                "'groups' must be a list of text, not b",
            ),
            ("{", "is not JSON"),
            ('{" ": "gna"}', "a case has a blank name"),
        ],
    )
    def test_files_of_cases(self, compare: Any, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "cases.json").write_text(content)
        assert message in compare(PROMPTS[0], "--cases", "cases.json").error
        assert not (tmp_path / "out").exists()

    def test_a_floor_that_overflows_is_left_out(
        self, compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        render = comparing.render

        def overflowing(request: Any, loaded: Any, label: str, *args: Any, **rest: Any) -> Any:
            if label == "floor: precision":
                raise UserError("the model gave NaN in bfloat16")
            return render(request, loaded, label, *args, **rest)

        monkeypatch.setattr(comparing, "render", overflowing)
        result = compare(*PROMPTS, *GNA, *MEASURES)
        assert result.code == 0
        assert result.err.count("the model gave NaN in bfloat16") == 1
        assert "left out: case 'floor: precision', sample 1" in result.err
        assert len(table(tmp_path / "out")) == 6


class TestSampleTable:
    COLUMNS = "case,prompt,seed,seconds,loop_seconds,memory_gib,density,file,psnr"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "has other columns than this comparison writes"),
            ("case,prompt\n", "has other columns than this comparison writes"),
            (f"{COLUMNS}\ngna,a,0,1\n", "row 2 has 4 cells, not as many as columns"),
            (f"{COLUMNS}\ngna,a,x,1,1,1,1,f,20\n", "row 2 is not a sample: gna,a,x,1"),
            (
                f"{COLUMNS}\ngna,a,0,1,1,1,1,f,20\ngna,a,0,1,1,1,1,f,20\n",
                "row 3 repeats a sample of 'gna'",
            ),
            (f'{COLUMNS}\n"gna', "unexpected end of data"),
        ],
    )
    def test_files_that_are_no_such_table(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "samples.csv"
        path.write_text(content)
        with pytest.raises(UserError) as error:
            SampleTable(path, ["psnr"])
        assert message in str(error.value)
        assert str(error.value).endswith("move the file away, or choose another folder")
        assert path.read_text() == content

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "samples.csv"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="it is not UTF-8; move the file away"):
            SampleTable(path, ["psnr"])

    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "samples.csv"
        first = SampleTable(path, ["psnr", "flip"])
        prompt = 'a "red", circle\nof two lines'
        first.add(Row("gna", prompt, 3, 1 / 3, 0.1, "not known", "no pairs", "f.mp4",
                      {"psnr": float("inf"), "flip": "not installed: flip-evaluator"}))  # fmt: skip
        first.add(Row("gna", prompt, 4, 1.0, 1.0, 2.0, 0.25, "g.mp4", {"psnr": 1 / 7, "flip": ""}))
        again = SampleTable(path, ["psnr", "flip"])
        assert again.rows == first.rows
        assert again.rows[0].number("psnr") == float("inf")
        assert again.rows[0].number("flip") is None
        assert again.rows[0].number("density") is None
        assert again.rows[1].number("density") == 0.25


class TestTable:
    ROWS = tuple(
        Row(case, "a", seed, 1.0, 1.0, 1.0, 0.5, "f", {"psnr": value})
        for case, values in {
            "floor: precision": [40.0, 41.0, 42.0, 43.0, 44.0, 45.0],
            "floor: kernel": [float("inf")] * 6,
            "near": [39.0, 40.5, 41.0, 42.5, 43.0, 44.5],
            "far": [20.0, 21.0, 22.0, 22.0, 24.0, 25.0],
        }.items()
        for seed, value in enumerate(values)
    )
    CASES = (
        Case("dense"),
        Case("floor: precision"),
        Case("floor: kernel"),
        Case("near"),
        Case("far"),
    )

    def test_means_and_spreads(self) -> None:
        found = {
            line.case.name: line.cells["psnr"] for line in lines(self.CASES, self.ROWS, ["psnr"])
        }
        assert shown(found["floor: precision"], 2) == "42.50 ± 1.87"
        assert shown(found["floor: kernel"], 2) == "equal"
        assert "dense" not in found

    def test_each_case_is_tested_against_each_floor(self) -> None:
        tests = against_floors(self.CASES, self.ROWS, ["psnr"])
        assert [(one.first, one.second) for one in tests] == [
            ("near", "floor: precision"), ("far", "floor: precision"),
            ("near", "floor: kernel"), ("far", "floor: kernel"),
        ]  # fmt: skip
        near, far, near_kernel, _ = tests
        assert (near.test.lower, near.test.pairs) == (6, 6)
        assert near.test.sign_p == pytest.approx(2 / 2**6)
        assert near.sign_holm == pytest.approx(2 * 2 / 2**6)
        assert near.test.mean == pytest.approx(-0.75)
        assert far.t_holm is not None
        assert near.t_holm is not None
        assert far.t_holm < near.t_holm
        assert near_kernel.t_holm is None

    def test_a_floor_of_flex_attention_is_that_of_its_case(self) -> None:
        floor = Case("floor: FlexAttention, far", flex_of="far")
        rows = [
            dataclasses.replace(row, case=floor.name) for row in self.ROWS if row.case == "near"
        ]
        cases, rows = (*self.CASES, floor), [*self.ROWS, *rows]
        tests = against_floors(cases, rows, ["psnr"])
        assert [one.first for one in tests if one.second == floor.name] == ["far"]
        assert floor.name not in {one.first for one in tests}
        assert [(one.first, one.second) for one in between(cases, rows, ["psnr"])] == [
            ("near", "far")
        ]

    def test_methods_are_tested_against_each_other(self) -> None:
        (one,) = between(self.CASES, self.ROWS, ["psnr"])
        assert (one.first, one.second, one.test.higher) == ("near", "far", 6)


def test_the_groups_of_a_case_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text('{"a": {"attention": "gna", "groups": ["windows"]}}')
    (case,) = cases_of_file(path)
    assert (case.name, case.groups) == ("a", ("windows",))
