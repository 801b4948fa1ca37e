"""Values that differ from step to step, on the command line."""

import json
import re
from typing import Any

import pytest

from diffattn import GNAAttn, LVSAAttn, PerStep, TokenGrid, hold, plan, ramp
from diffattn.lora.settings import TrainSettings
from diffattn.methods import from_dict
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.method_settings import MethodOptions, attention_settings, read_arguments

PROMPT = "a red circle moving right"
NARROW = ["--attn", "gna", "--arg", "window=3,3,3/1,1,1", "--arg", "stride=1"]
TOP = ["--attn", "block-topk", "--arg", "dense_steps=0", "--arg", "block=16"]


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("keep", "1,1,.5", [1, 1, 0.5]),
        ("keep", "1x2,0.5,0.1x3", [1, 1, 0.5, 0.1, 0.1, 0.1]),
        ("keep", "[1, 0.5]", [1, 0.5]),
        ("keep", "0.9..0.2", {"ramp": [0.9, 0.2]}),
        ("keep", "early_ramp:0.15", {"early_ramp": [0.15, 0.5]}),
        ("keep", "hold:0.15,0.5,2", {"hold": [0.15, 0.5, 2, "hold", None, 0]}),
        ("keep", "jenga:.7,.8", {"jenga": [0.7, 0.8]}),
        ("keep", '{"ramp": [0.9, 0.2]}', {"ramp": [0.9, 0.2]}),
        ("keep", "0.5", 0.5),
        ("score", "parts,mean", ["parts", "mean"]),
    ],
)
def test_spellings(name: str, text: str, want: Any) -> None:
    settings = attention_settings(MethodOptions("block-topk", (f"{name}={text}",), None), None)
    assert settings[name] == want
    assert from_dict(json.loads(json.dumps(settings))).to_dict() == settings


def test_lists_of_values_that_are_sequences() -> None:
    assert read_arguments(["window=5,9,9/3,5,5"]) == {"window": PerStep((5, 9, 9), (3, 5, 5))}
    assert read_arguments(["window=5,9,9"]) == {"window": (5, 9, 9)}
    assert read_arguments(["cache=a/b"]) == {"cache": "a/b"}, "a path is none"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "keep=early_ramp:2",
            "--attn-arg keep=early_ramp:2: early_ramp: share is 2, but must be a",
        ),
        ("keep=1,2", "in step 2 of a run of 2: keep is 2, but must be a number above 0"),
        ("keep=ramp:1", "--attn-arg keep=ramp:1: ramp does not take the 1 arguments"),
    ],
)
def test_bad_spellings(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        attention_settings(MethodOptions("block-topk", (argument,), None), None)


def test_a_run_with_a_list_and_its_record(generate, tmp_path, record) -> None:
    result = generate(PROMPT, "-o", "out.mp4", *TOP, "--arg", "keep=1,0.3")
    assert result.code == 0, result.err
    assert "by step: keep=1,0.3" in result.out
    assert "and 1 more of 2 steps stay dense" in result.out
    written = record("out.json")
    assert written["settings"]["attention"]["keep"] == [1, 0.3]
    assert written["attention"]["dense_by_value"] == 1
    assert written["attention"]["method"]["keep"] == [1, 0.3]
    repeated = generate("--from", tmp_path / "out.mp4.json", "-o", "again.mp4")
    assert repeated.code == 0, repeated.err
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "out.mp4").read_bytes()


def test_a_list_is_compared_with_dense(generate, tmp_path) -> None:
    """The untimed step before the comparison is a run of another length."""
    result = generate(PROMPT, "-o", "out.mp4", *TOP, "--arg", "keep=0.5,0.3", "--compare")
    assert result.code == 0, result.err
    assert (tmp_path / "out.mp4").is_file()


def test_a_list_of_another_length_is_refused_before_the_model_loads(
    generate, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("diffattn.pipelines.run.loading.load_model", None)
    result = generate(PROMPT, "-o", "out.mp4", *TOP, "--arg", "keep=1,0.5,0.3")
    assert result.error.startswith(
        "--steps 2: keep has 3 values, one a step, but the run has 2 steps: give 2 values"
    )
    assert not list(tmp_path.iterdir())


def test_a_plan(diffattn) -> None:
    result = diffattn("plan", "--grid", "5x6x7", "--steps", 2, *NARROW)
    assert result.code == 0, result.err
    method = GNAAttn(window=PerStep((3, 3, 3), (1, 1, 1)), stride=1)
    want = plan(TokenGrid(5, 6, 7), method, steps=2)
    assert f"{want.density:.2%} on average over the steps" in result.out
    assert want.words() in result.out
    as_json = diffattn("plan", "--grid", "5x6x7", "--steps", 2, *NARROW, "--json")
    assert json.loads(as_json.out) == json.loads(json.dumps(want.to_dict()))
    assert (
        "window has 2 values, one a step, but the run has 3 steps"
        in diffattn("plan", "--grid", "5x6x7", "--steps", 3, *NARROW).error
    )


class TestMask:
    def test_the_picture_of_a_step(self, diffattn, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        rotating = ["--attn", "lvsa", "--arg", "window=1", "--arg", "period=3"]
        of_step = ["mask", "--grid", "12x2x3", *rotating, "--arg", "phase=rotate"]
        result = diffattn(*of_step, "--steps", 5, "--step", 3, "-o", "third.png")
        assert result.code == 0, result.err
        assert diffattn(*of_step, "-o", "none.png").code == 0
        for phase, name in ((2, "third"), (0, "none")):
            plain = ["mask", "--grid", "12x2x3", *rotating, "--arg", f"phase={phase}"]
            assert diffattn(*plain, "-o", "plain.png").code == 0
            assert (tmp_path / "plain.png").read_bytes() == (tmp_path / f"{name}.png").read_bytes()
        assert LVSAAttn(period=3, phase=2).anchors(12) != LVSAAttn(period=3).anchors(12)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--step", 1], "give --step and --steps: gna differs from step to step"),
            (["--steps", 2], "give --step and --steps: gna differs from step to step"),
            (["--step", 3, "--steps", 2], "--step must be a whole number from 1 to 2, not 3"),
            (["--step", 1, "--steps", 4], "window has 2 values, one a step, but the run has 4"),
        ],
    )
    def test_bad_steps(self, diffattn, tmp_path, monkeypatch, options, message) -> None:
        monkeypatch.chdir(tmp_path)
        assert message in diffattn("mask", "--grid", "5x6x7", *NARROW, *options).error
        assert not list(tmp_path.iterdir())


def test_settings_of_a_training_keep_the_schedule() -> None:
    for value in ([1, 0.5], ramp(0.9, 0.2), hold(0.2, 0.5)):
        method = from_dict({"type": "block-topk", "keep": value})
        settings = TrainSettings(attention=method.to_dict())
        read = TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
        assert from_dict(read.attention) == method
