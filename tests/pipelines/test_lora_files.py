"""`diffattn lora info` and `lora convert` at the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import made_lora
import pytest
from made_lora import CELLS
from safetensors.torch import load_file
from tiny_complete import COMPLETE

from diffattn.lora.adapter import LORA_FILE

from .conftest import Result


@pytest.fixture
def wan_lora(tmp_path: Path) -> Path:
    folder = tmp_path / "wan-lora"
    made_lora.make(COMPLETE["wan"].build(), folder, CELLS)
    return folder


class TestInfo:
    def test_lines_for_people(self, wan_lora: Path, diffattn: Callable[..., Result]) -> None:
        result = diffattn("lora", "info", wan_lora)
        assert result.code == 0, result.err
        rows = dict(line.split("  ", 1) for line in result.out.splitlines())
        rows = {name: value.strip() for name, value in rows.items()}
        assert rows["layout"] == "diffusers"
        assert rows["family"] == "wan"
        assert rows["rank"] == "2"
        assert rows["method"].startswith("clear ")
        assert " radius=2 " in rows["method"]
        assert rows["weights"] == "3 of the method, beside the file"

    def test_json(self, wan_lora: Path, diffattn: Callable[..., Result]) -> None:
        (facts,) = json.loads(diffattn("lora", "info", wan_lora, "--json").out)
        assert (facts["family"], facts["layers"]) == ("wan", 12)

    def test_no_lora(self, tmp_path: Path, diffattn: Callable[..., Result]) -> None:
        missing = tmp_path / "none.safetensors"
        assert diffattn("lora", "info", missing).error == f"there is no LoRA at {missing}"
        missing.write_bytes(b"damaged")
        assert diffattn("lora", "info", missing).error.startswith(f"cannot read LoRA {missing}: ")


class TestConvert:
    def test_there_and_back(
        self, wan_lora: Path, tmp_path: Path, diffattn: Callable[..., Result]
    ) -> None:
        there = tmp_path / "there.safetensors"
        command = ["lora", "convert", wan_lora, there, "--to", "comfyui"]
        assert "--without-method-weights leaves them out" in diffattn(*command).error
        result = diffattn(*command, "--without-method-weights")
        assert (result.code, result.out) == (0, f"{there}: written in the comfyui layout\n")
        assert result.err.startswith("warning: the weights of the method are left out; ")
        back = tmp_path / "back"
        result = diffattn("lora", "convert", there, back, "--to", "diffusers")
        assert result.code == 0, result.err
        one, other = load_file(back / LORA_FILE), load_file(wan_lora / LORA_FILE)
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one)

    def test_an_unknown_layout(
        self, wan_lora: Path, tmp_path: Path, diffattn: Callable[..., Result]
    ) -> None:
        error = diffattn("lora", "convert", wan_lora, tmp_path / "x", "--to", "koya").error
        assert error.startswith("layout 'koya' is unknown")
        assert "kohya" in error


class TestMergeAndJoin:
    def test_merge(self, wan_lora: Path, tmp_path: Path, diffattn: Callable[..., Result]) -> None:
        out, base = tmp_path / "merged", tmp_path / "base"
        COMPLETE["wan"].build().save_pretrained(base)
        command = ["lora", "merge", base, wan_lora, "-o", out, "--without-method-weights"]
        assert diffattn(*command, "--scale", "1", "--scale", "2").error == (
            "--scale is given 2 times for 1 LoRAs: give one for all, or one for each"
        )
        assert diffattn(*command, "--scale", "nan").error == (
            "--scale is nan, but must be a number from -100 to 100"
        )
        result = diffattn(*command, "--scale", "0.5")
        assert result.code == 0, result.err
        assert " weights merged; " in result.out
        assert (out / "config.json").is_file()
        assert "exists: give another name" in diffattn(*command).error

    def test_join(self, wan_lora: Path, tmp_path: Path, diffattn: Callable[..., Result]) -> None:
        out = tmp_path / "both.safetensors"
        command = ["lora", "join", wan_lora, wan_lora, "-o", out]
        assert "cannot be joined" in diffattn(*command).error
        result = diffattn(*command, "--without-method-weights")
        assert (result.code, result.out) == (0, f"{out}: 2 LoRAs joined\n")
