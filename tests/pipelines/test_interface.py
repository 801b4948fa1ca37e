"""The same words in every command: option names, help, JSON, completion."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from diffattn import RadialAttn, TokenGrid, draw
from diffattn.methods import METHODS
from diffattn.pipelines.cli import app
from diffattn.pipelines.cli.listing import catalogue
from diffattn.planning.published import PUBLISHED

from .conftest import Result

COMMANDS = [
    ("generate",), ("upscale",), ("plan",), ("mask",), ("calibrate",), ("methods",), ("models",),
    ("lora", "train"), ("lora", "info"), ("lora", "convert"), ("lora", "merge"), ("lora", "join"),
    ("compare",), ("study",),
]  # fmt: skip
WITH_METHODS = ["generate", "upscale", "plan", "mask", "lora train"]


def command(*path: str) -> Any:
    found = typer.main.get_command(app)
    for name in path:
        found = found.commands[name]
    return found


class TestOptionNames:
    @pytest.mark.parametrize("name", WITH_METHODS)
    def test_methods_are_named_alike(self, name: str) -> None:
        options = {tuple(parameter.opts) for parameter in command(*name.split()).params}
        assert ("--attn", "--method") in options
        assert ("--attn-arg", "--arg") in options
        assert ("--attn-config",) in options

    @pytest.mark.parametrize("name", ["plan", "mask"])
    def test_aliases_do_the_same(
        self, name: str, diffattn: Callable[..., Result], tmp_path: Path
    ) -> None:
        where = ["--grid", "3x8x8"] + ([] if name == "plan" else ["-o", tmp_path / "m.png"])
        new = diffattn(name, *where, "--attn", "gna", "--attn-arg", "window=3,5,5")
        old = diffattn(name, *where, "--method", "gna", "--arg", "window=3,5,5")
        config = tmp_path / "method.json"
        config.write_text('{"type": "gna", "window": [3, 5, 5]}')
        filed = diffattn(name, *where, "--attn-config", config)
        assert new.code == old.code == filed.code == 0, (new.err, old.err, filed.err)

        def without_times(result: Result) -> list[str]:
            return [line for line in result.out.splitlines() if not line.startswith("built in")]

        assert without_times(new) == without_times(old) == without_times(filed)

    def test_an_argument_may_not_come_twice(self, diffattn: Callable[..., Result]) -> None:
        for name in ("window", "window "):
            twice = ["--attn-arg", "window=3", "--attn-arg", f"{name}=5"]
            result = diffattn("plan", "--grid", "3x8x8", "--attn", "gna", *twice)
            assert result.error == (f"--attn-arg gives window twice, the second time as '{name}=5'")


class TestHelp:
    @pytest.mark.parametrize("path", [(), ("lora",), *COMMANDS], ids=" ".join)
    def test_short_and_long(self, path: tuple[str, ...], diffattn: Callable[..., Result]) -> None:
        short, long = diffattn(*path, "-h"), diffattn(*path, "--help")
        assert short.code == long.code == 0
        assert short.out == long.out
        assert "Usage: diffattn" in short.out

    @pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
    def test_it_ends_with_examples(
        self, path: tuple[str, ...], diffattn: Callable[..., Result]
    ) -> None:
        _, found, examples = diffattn(*path, "--help").out.partition("Examples:")
        assert found
        assert f"$ diffattn {' '.join(path)}" in " ".join(examples.split())

    @pytest.mark.parametrize(
        ("path", "groups"),
        [
            (("generate",), ["Attention", "Size and length", "Sampling", "Machine"]),
            (("upscale",), ["Attention", "Size and length", "Sampling", "Machine"]),
            (("plan",), ["Attention", "Size and length"]),
            (("lora", "train"), ["Attention", "Data", "Training", "LoRA", "Losses"]),
        ],
    )
    def test_options_are_grouped(
        self, path: tuple[str, ...], groups: list[str], diffattn: Callable[..., Result]
    ) -> None:
        out = diffattn(*path, "--help").out
        assert all(f"─ {group} ─" in out for group in groups)

    def test_without_arguments_there_is_help_and_nothing_else(
        self, diffattn: Callable[..., Result]
    ) -> None:
        result = diffattn()
        assert "Usage: diffattn" in result.out + result.err
        assert "diffattn: " not in result.err


class TestListing:
    def test_the_catalogue_is_what_the_program_has(self, diffattn: Callable[..., Result]) -> None:
        own = [name for name, cls in METHODS.items() if cls.__module__.startswith("diffattn.")]
        found = json.loads(json.dumps(catalogue()))
        found["methods"] = [entry for entry in found["methods"] if entry["type"] in own]
        path = Path(sys.modules["diffattn.pipelines.cli.listing"].__file__ or "")
        kept = json.loads((path.parent / "catalogue.json").read_text("utf-8"))
        assert kept == found, "run python -m diffattn.pipelines.cli.listing"

    def test_methods_as_json(self, diffattn: Callable[..., Result]) -> None:
        listed = {entry["type"]: entry for entry in json.loads(diffattn("methods", "--json").out)}
        assert listed.keys() == METHODS.keys()
        parameters = {item["name"]: item for item in listed["radial"]["parameters"]}
        assert parameters["decay_factor"]["default"] is None
        assert parameters["block_rule"]["default"] == "covering"

    def test_models_as_json(self, diffattn: Callable[..., Result]) -> None:
        listed = {entry["name"]: entry for entry in json.loads(diffattn("models", "--json").out)}
        assert listed["wan"]["models"][0] == "WanTransformer3DModel"
        assert listed["flux"]["text"] == "before"


class TestCompletion:
    def complete(self, words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "diffattn.pipelines"],
            env=os.environ | {
                "_DIFFATTN_COMPLETE": "complete_bash",
                "COMP_WORDS": f"diffattn {words}",
                "COMP_CWORD": str(len(words.split(" "))),
            },
            text=True,
            capture_output=True,
            check=False,
        )  # fmt: skip
        return done.stdout

    def test_commands(self) -> None:
        assert "generate" in self.complete("gen").split()

    def test_methods(self) -> None:
        assert self.complete("plan --attn r").split() == ["radial"]


class TestMaskOfAModel:
    """`mask --model` draws what the model runs, not what a bare grid would."""

    def test_parameters_are_the_models(
        self, diffattn: Callable[..., Result], tmp_path: Path
    ) -> None:
        sizes = ["--height", 256, "--width", 256, "--num-frames", 33]
        name = "Wan-AI/Wan2.2-T2V-A14B"
        result = diffattn("mask", "--model", name, *sizes, "-o", tmp_path / "m.png")
        assert result.code == 0, result.err
        grid = TokenGrid(9, 16, 16)
        method = RadialAttn().for_model("wan2.2", grid)
        assert method != RadialAttn().for_model("", grid)
        assert f"density: {method.mask(grid).density:.4%} of" in result.out
        beside = diffattn("mask", "--model", name, "--grid", "9x16x16", "-o", tmp_path / "n.png")
        assert beside.out.splitlines()[:2] == result.out.splitlines()[:2]
        assert (tmp_path / "m.png").read_bytes() == (tmp_path / "n.png").read_bytes()

    def test_the_bundled_model_has_its_own_size(
        self, diffattn: Callable[..., Result], tmp_path: Path
    ) -> None:
        result = diffattn("mask", "--model", "moving-shapes", "-o", tmp_path / "m.png")
        assert result.out.startswith("16x12x12: 2304 tokens\n")
        method = RadialAttn().for_model("wan2.1", TokenGrid(16, 12, 12))
        assert f"{method.mask(TokenGrid(16, 12, 12)).density:.4%}" in result.out

    def test_with_the_text_of_the_model(
        self, diffattn: Callable[..., Result], tmp_path: Path
    ) -> None:
        model = "black-forest-labs/FLUX.1-schnell"
        size = ["--height", 256, "--width", 256]
        result = diffattn(
            "mask", "--model", model, *size, "--attn", "gna", "-o", tmp_path / "m.png"
        )
        assert result.code == 0, result.err
        assert f"{PUBLISHED[model].text_before + 256} tokens" in result.out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "give --grid, the tokens that radial is drawn on, or --model"),
            (["--height", 64], "--height is a size of a --model; a --grid says its own"),
            (
                ["--model", "moving-shapes", "--grid", "2x3x4", "--width", 64],
                "--width is a size of a --model; a --grid says its own",
            ),
            (
                ["--model", "moving-shapes", "--seed", 3],
                "--seed is for methods that select by content, such as vmoba; radial is drawn on a"
                " --grid or for a --model",
            ),
            (["--model", "nobody/knows"], "'nobody/knows' is neither a folder nor a model whose"),
            (["--model", ""], "--model must be text, not ''"),
            (
                ["--model", "moving-shapes", "--height", 1024],
                "height is 1024, which is 128 rows of tokens, but this model has positions for 64",
            ),
            (
                ["--model", "stabilityai/stable-diffusion-3-medium", "--attn", "linfusion"],
                "linfusion cannot be attached to models of the family sd3",
            ),
        ],
    )
    def test_bad_options(
        self,
        options: list[object],
        message: str,
        diffattn: Callable[..., Result],
        tmp_path: Path,
    ) -> None:
        assert diffattn("mask", *options, "-o", tmp_path / "m.png").error.startswith(message)
        assert not (tmp_path / "m.png").exists()


def test_words_of_a_method_are_the_librarys() -> None:
    assert draw.method_words(RadialAttn(decay_factor=0.5)) == "radial  decay_factor=0.5"
