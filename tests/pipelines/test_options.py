"""No option of a command is ignored: each is a setting of what the command does, or refused."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from diffattn import plan
from diffattn.lora.settings import TrainSettings
from diffattn.pipelines.cli import app
from diffattn.pipelines.cli.compare import _APART as _NOT_OF_A_COMPARED_REQUEST
from diffattn.pipelines.cli.generate import _NOT_OF_A_REQUEST
from diffattn.pipelines.cli.lora import _APART, PLURALS
from diffattn.pipelines.cli.mask import _NOT_OF_A_RUN, _OF_A_CALL
from diffattn.pipelines.cli.plan import _NOT_OF_A_PLAN
from diffattn.pipelines.cli.selection_picture import Call
from diffattn.pipelines.cli.study import _APART as _NOT_OF_A_STUDIED_REQUEST
from diffattn.pipelines.run import upscale_picture
from diffattn.pipelines.run import upscale_video as upscale
from diffattn.pipelines.run.request import Request
from diffattn.pipelines.train.run import TrainJob

from .conftest import Result


def options_of(*path: str) -> set[str]:
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return {parameter.name for parameter in command.params}


def fields_of(*classes: type) -> set[str]:
    return {item.name for cls in classes for item in dataclasses.fields(cls)}


def test_each_option_is_a_setting() -> None:
    assert options_of("generate") - {*_NOT_OF_A_REQUEST} <= fields_of(Request)
    assert options_of("compare") - {*_NOT_OF_A_COMPARED_REQUEST} <= fields_of(Request)
    assert options_of("study") - {*_NOT_OF_A_STUDIED_REQUEST} <= fields_of(Request)
    assert options_of("plan") - {*_NOT_OF_A_PLAN} <= {*inspect.signature(plan).parameters}
    of_run = options_of("mask") - {*_NOT_OF_A_RUN} - {*_OF_A_CALL}
    assert of_run <= fields_of(Request)
    assert {*_OF_A_CALL} <= fields_of(Call)
    of_training = {PLURALS.get(name, name) for name in options_of("lora", "train") - {*_APART}}
    assert of_training <= fields_of(TrainJob, TrainSettings)


def test_each_option_of_upscale_has_an_effect_on_videos_or_pictures() -> None:
    known = upscale.VIDEO_OPTIONS | upscale_picture.PICTURE_OPTIONS
    assert options_of("upscale") == known


def test_an_option_that_is_no_setting_is_an_error(
    diffattn: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As if they were new, and nobody had said what becomes of them.
    monkeypatch.setattr(
        "diffattn.pipelines.cli.generate._NOT_OF_A_REQUEST",
        ("prompt", "attn", "attn_arg", "attn_config"),
    )
    error = diffattn("generate", "a cat", "-o", tmp_path / "a.gif").error
    assert error == "unknown setting 'output'"


@pytest.mark.parametrize("kind", ["videos", "pictures"])
def test_an_option_of_upscale_that_is_no_setting_is_an_error(
    kind: str, diffattn: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upscale_picture, "makes_pictures", lambda model: kind == "pictures")
    for module, name in ((upscale, "VIDEO_OPTIONS"), (upscale_picture, "PICTURE_OPTIONS")):
        monkeypatch.setattr(module, name, getattr(module, name) - {"seed", "steps"})
    error = diffattn("upscale", "a cat", "--seed", 3, "--height", 64, "--steps", 2).error
    assert error.startswith(f"--steps, --seed cannot be given with a model of {kind}")


@pytest.mark.parametrize("name", sorted(upscale.VIDEO_OPTIONS - upscale_picture.PICTURE_OPTIONS))
def test_options_for_videos_are_refused_with_pictures(
    name: str, diffattn: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upscale_picture, "makes_pictures", lambda model: True)
    option = "--" + name.replace("_", "-")
    value = () if name == "no_memory_check" else ("1",)
    error = diffattn("upscale", "a cat", option, *value).error
    assert error.startswith(f"{option} cannot be given with a model of pictures")
