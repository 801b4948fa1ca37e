"""`diffattn study`: its cases, and a part of it on the bundled model."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffattn.methods import METHODS, from_dict
from diffattn.pipelines.compare import study
from diffattn.pipelines.compare.case import check_cases
from diffattn.pipelines.compare.comparison import Folder
from diffattn.pipelines.compare.densities import Found
from diffattn.pipelines.compare.papers import FIGURES, papers_beside
from diffattn.pipelines.compare.sample_table import Row
from diffattn.pipelines.knobs import KNOBS
from diffattn.pipelines.run.request import BUNDLED_MODEL, Request
from diffattn.samples.moving_shapes.captions import split_scenes

from .conftest import Result

QUARTER = {
    "radial": {"sink": False, "first_distance_width": "half", "decay_factor": 0.25,
               "split_threshold": 109},
    "gna": {"window": [10, 7, 8]},
    "vmoba": {"topk": [2, 11, 16]},
}  # fmt: skip


def known_densities(folder: Path, base: Request) -> None:
    """Put parameters into the folder, as a search that has ended leaves them."""
    found = Found(Folder(folder), base)
    for name in KNOBS:
        for density in study.DENSITIES:
            more = QUARTER.get(name, {}) if density == 0.25 else {}
            last = {"last_dense_steps": density if density != 0.25 else 0}
            settings = {"type": name, "dense_layers": 0, "dense_steps": 0, **last, **more}
            found.keep(f"{name} at {density:.4g}", from_dict(settings).to_dict())


def cases_of(folder: Path, base: Request, lora: str | None = None) -> tuple[list[Any], dict]:
    known_densities(folder, base)
    return study.study_cases(base, Folder(folder), lora, print)


class TestCases:
    def test_every_method_is_in_it(self, tmp_path: Path) -> None:
        cases, _ = cases_of(tmp_path, Request("a", attention={"type": "dense"}))
        check_cases(cases)
        own = {name for name, cls in METHODS.items() if cls.__module__.startswith("diffattn.")}
        own -= {"auto", "by-head", "policy"}  # which are made of the other methods
        found = {case.attention["type"] for case in cases if study.METHODS in case.groups}
        assert found == own - {"dense"}
        assert {*KNOBS} | {*study._WITHOUT_PAIRS} == own - {"dense"}

    def test_the_sweep_and_the_parts(self, tmp_path: Path) -> None:
        cases, skipped = cases_of(tmp_path, Request("a", attention={"type": "dense"}))
        by_name = {case.name: case for case in cases}
        steps = {
            by_name[f"gna at 0.25{words}"].attention["dense_steps"]
            for words in ("", ", first 10% dense", ", first 25% dense", ", first 40% dense")
        }
        assert steps == {0, 0.1, 0.25, 0.4}
        assert by_name["gna at 0.25, last 25% dense"].attention["last_dense_steps"] == 0.25
        assert by_name["gna at 0.25"].groups == ("methods", "warm-up", "lora", "cache")
        lora = by_name["gna + LoRA"]
        assert lora.attention == by_name["gna at 0.25"].attention
        assert lora.lora == str(tmp_path / "loras/gna")
        assert {case.cache for case in cases if case.cache} == {"first-block", "cache-dit:0.2"}
        assert skipped == {}
        ramps = [case for case in cases if study.RAMPS in case.groups]
        kept = [from_dict(dict(case.attention)) for case in ramps]
        work = [[one.at_step(step, 20).keep for step in range(20)] for one in kept]  # type: ignore[attr-defined]
        assert [of_run[0] for of_run in work] == [0.3, 0.5, 0.1]
        assert [sum(of_run) / 20 for of_run in work] == pytest.approx([0.3] * 3)
        assert {group for case in cases for group in case.groups} == {*study.GROUPS}
        floor = by_name["floor: FlexAttention, gna at 0.25"]
        assert (floor.flex_of, floor.groups) == ("gna at 0.25", ("methods",))
        assert floor.attention == by_name["gna at 0.25"].attention

    def test_shares_that_one_setting_is_nearest_to(self, tmp_path: Path) -> None:
        """On small grids parameters have few values."""
        base = Request("a", attention={"type": "dense"})
        found = Found(Folder(tmp_path), base)
        for name in KNOBS:
            for density in study.DENSITIES:
                settings = {"type": name, "dense_layers": 0, "dense_steps": 0}
                found.keep(f"{name} at {density:.4g}", from_dict(settings).to_dict())
        cases, _ = study.study_cases(base, Folder(tmp_path), None, print)
        check_cases(cases)
        names = [case.name for case in cases]
        assert "gna at 0.5" in names
        assert "gna at 0.25" not in names
        assert "gna at 0.5, first 25% dense" in names
        floor = next(case for case in cases if case.flex_of)
        assert floor.flex_of == "gna at 0.5"
        cached = next(case for case in cases if case.name == "vmoba at 0.5 + first-block")
        assert cached.attention == next(c for c in cases if c.name == "vmoba at 0.5").attention

    @pytest.mark.parametrize("content", ["{", "[]", '{"settings": 3}', '{"methods": {}}'])
    def test_a_damaged_file_of_parameters_is_made_anew(self, tmp_path: Path, content: str) -> None:
        base = Request("a", attention={"type": "dense"})
        (tmp_path / "densities.json").write_text(content)
        assert Found(Folder(tmp_path), base).methods == {}
        known_densities(tmp_path, base)
        settings = json.loads((tmp_path / "densities.json").read_text())["settings"]
        for methods in (3, None):
            (tmp_path / "densities.json").write_text(
                json.dumps({"settings": settings, "methods": methods})
            )
            assert Found(Folder(tmp_path), base).methods == {}

    def test_a_model_of_the_user(self, tmp_path: Path) -> None:
        base = Request("a", model="some/model", attention={"type": "dense"})
        cases, skipped = cases_of(tmp_path, base)
        assert not any(case.lora for case in cases)
        assert skipped["LoRA"] == "give the LoRA of `diffattn lora train` by --lora"

    def test_parameters_of_another_model_are_not_taken(self, tmp_path: Path) -> None:
        base = Request("a", attention={"type": "dense"})
        known_densities(tmp_path, base)
        assert Found(Folder(tmp_path), base).methods
        other = Request("a", attention={"type": "dense"}, steps=3)
        assert not Found(Folder(tmp_path), other).methods


class TestPrompts:
    def asked(self, count: int, file: Path | None = None) -> study.AskedStudy:
        return study.AskedStudy(count, file, 2, (), None)

    def test_held_out_captions(self) -> None:
        _, held_out = split_scenes()
        found = study._prompts(self.asked(15), BUNDLED_MODEL)
        assert len(set(found)) == 15
        assert set(found) <= {scene.caption for scene in held_out}
        for attribute in ("shape", "direction"):
            kinds = {getattr(s, attribute) for s in held_out if s.caption in found}
            assert len(kinds) >= 3

    def test_of_its_own_and_of_a_file(self, tmp_path: Path) -> None:
        assert len(set(study._prompts(self.asked(15), "some/model"))) == 15
        file = tmp_path / "prompts.txt"
        file.write_text("one\ntwo\none\n")
        assert study._prompts(self.asked(2, file), "some/model") == ["one", "two"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "0"], "--prompts must be at least 1, not 0"),
        (["--seeds", "-1"], "--seeds must be at least 1, not -1"),
        (["--prompts", "51"], "--prompts 51: there are 50 prompts"),
        (["--lora", "x"], "--lora is for --model; the LoRAs of the bundled model are trained here"),
    ],
)
def test_bad_input(
    diffattn: Callable[..., Result], tmp_path: Path, options: list[str], message: str
) -> None:
    assert diffattn("study", "-o", tmp_path / "out", *options).error == message
    assert not (tmp_path / "out").exists()


def test_an_unknown_part(diffattn: Callable[..., Result], tmp_path: Path) -> None:
    prompt = study._prompts(study.AskedStudy(1, None, 1, (), None), BUNDLED_MODEL)[0]
    known_densities(tmp_path, Request(prompt, attention={"type": "dense"}))
    error = diffattn("study", "-o", tmp_path, "--prompts", 1, "--only", "ramp").error
    assert error == "--only 'ramp' is no case of this run; did you mean 'ramps'?"


def test_a_part_on_the_bundled_model(
    diffattn: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "lacking", lambda cache: "not here" if "dit" in cache else None)
    prompt = study._prompts(study.AskedStudy(1, None, 1, (), None), BUNDLED_MODEL)[0]
    known_densities(tmp_path, Request(prompt, attention={"type": "dense"}, steps=2))
    options = ["--prompts", 1, "--seeds", 1, "--steps", 2, "--only", "dense + first-block"]
    options += ["--only", "dense + cache-dit", "--only", "gna at 0.25"]
    result = diffattn("study", "-o", tmp_path, *options)
    assert result.code == 0, result.err
    assert "skipped: dense + cache-dit: not here" in result.out
    with (tmp_path / "samples.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert {*rows} == {
        "dense", "floor: precision", "floor: kernel", "dense + first-block", "gna at 0.25"
    }  # fmt: skip
    assert float(rows["gna at 0.25"]["density"]) == pytest.approx(0.2431, abs=2e-3)
    assert rows["dense + first-block"]["density"] == "calls left out"
    assert 0 <= float(rows["dense"]["right"]) <= 1
    text = (tmp_path / "index.html").read_text("utf-8")
    assert "What the papers report" in text
    assert "arXiv 2506.19852" in text
    record = json.loads((tmp_path / "comparison.json").read_text("utf-8"))
    assert "radial + LoRA" in record["cases"]


def test_loras_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffattn.pipelines.compare import study_loras

    monkeypatch.setattr(study_loras, "_STEPS", 1)
    method = from_dict({"type": "gna", "window": (3, 3, 3), "dense_layers": 0, "dense_steps": 0})
    said: list[str] = []
    for _ in range(2):
        study_loras.train(method.to_dict(), tmp_path / "gna", said.append)
    assert len(said) == 1
    assert (tmp_path / "gna/pytorch_lora_weights.safetensors").is_file()


def test_papers_stand_beside_what_was_measured() -> None:
    def row(case: str, psnr: float | str, seconds: float) -> Row:
        return Row(case, "a", 0, seconds, seconds, 1.0, 1.0, "f", {"psnr": psnr})

    rows = [row("dense", "", 4.0), row("gna at 0.5", 20.0, 2.0), row("gna at 0.125", 12.5, 1.0)]
    cached = Row("gna at 0.5 + first-block", "a", 0, 0.1, 0.1, 1.0, 1.0, "f", {"psnr": 3.0})
    found = papers_beside([*rows, cached])
    assert len(found) == len(FIGURES)
    half = next(one for one in found if "30x40x40" in one["setting"])
    assert half["here"] == "gna at 0.5: 20.0 dB, 2.00x"
    assert next(one for one in found if "VMoBA" in one["method"])["here"] == "not measured yet"
