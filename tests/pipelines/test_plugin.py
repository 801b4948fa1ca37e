"""A method of another package, by its name: in commands of their own process, and in LoRAs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import outside_method
import pytest

from diffattn import TokenGrid, register_method
from diffattn.methods import METHODS

from .conftest import SIZE, Result

PROMPT = "a red circle moving right on a blue background"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder where the package of the document is installed beside a broken one."""
    folder = tmp_path / "site"
    outside_method.install_strip(folder)
    outside_method.install(folder, "broken_attn", "import nowhere", {"broken": "broken_attn:B"})
    return folder


@pytest.fixture
def command(site: Path, tmp_path: Path) -> Callable[..., str]:
    """Run the command line in a process of its own, and return what it prints."""
    paths = [str(site), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    path = os.pathsep.join(os.path.abspath(folder) for folder in paths if folder)

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "diffattn.pipelines", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def _as_before() -> Iterator[None]:
    """Forget what a test has registered and imported."""
    there = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(there)
    sys.modules.pop("strip_attn", None)


@pytest.fixture
def plugged(
    diffattn: Callable[..., Result],
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    _as_before: None,
) -> Callable[..., Result]:
    """Run the command line in this process, inside ``tmp_path``, with the packages installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(site)
    return diffattn


@pytest.fixture
def strip(_as_before: None) -> Any:
    """The method of the document, registered in this process."""
    names: dict[str, Any] = {"__name__": "strip_attn"}
    exec(outside_method.source(), names)
    return register_method(names["StripAttn"])


def pairs_nearby(grid: TokenGrid, rows: int) -> int:
    near = sum(abs(a - b) <= rows for a in range(grid.height) for b in range(grid.height))
    return near * (grid.frames * grid.width) ** 2


class TestCommands:
    def test_a_mask_in_a_process_of_its_own(
        self, command: Callable[..., str], tmp_path: Path
    ) -> None:
        options = ["--method", "strip", "--arg", "rows=2", "-o", "strip.png"]
        out = command("mask", "--grid", "2x9x5", *options)
        assert f"density: {pairs_nearby(TokenGrid(2, 9, 5), 2) / 90**2:.4%}" in out
        assert iio.imread(tmp_path / "strip.png").ndim == 3

    def test_a_video_in_a_process_of_its_own(
        self, command: Callable[..., str], record: Callable[[str], dict]
    ) -> None:
        options = ["--num-frames", 4, "--height", 32, "--width", 32, "--steps", 1]
        method = ["--attn", "strip", "--attn-arg", "rows=0"]
        command("generate", PROMPT, "-o", "out.gif", *options, *method)
        made = record("out.json")["attention"]
        assert (made["method"]["type"], made["method"]["rows"]) == ("strip", 0)
        assert made["density"] == pytest.approx(1 / made["grid"][1])

    def test_it_is_listed_and_a_broken_one_is_warned_of(
        self, plugged: Callable[..., Result]
    ) -> None:
        result = plugged("methods")
        assert result.code == 0, result.err
        assert "\nstrip: StripAttn, Tokens see the rows near their own\n" in result.out
        assert re.search(r"^  rows +\[1\]$", result.out, re.MULTILINE)
        assert "\nradial: RadialAttn" in result.out
        assert result.err == (
            "warning: left out method 'broken': the entry point broken = broken_attn:B of"
            " broken_attn 0.3 cannot be loaded (ModuleNotFoundError: No module named 'nowhere');"
            " repair, update or uninstall that package\n"
        )

    def test_its_plan(self, plugged: Callable[..., Result]) -> None:
        grid = ["--grid", "2x9x5", "--json", "--method", "strip", "--arg", "rows=2"]
        result = plugged("plan", *grid)
        assert (result.code, result.err) == (0, "")
        plan = json.loads(result.out)
        assert plan["method"]["rows"] == 2
        assert plan["density"] == pytest.approx(pairs_nearby(TokenGrid(2, 9, 5), 2) / 90**2)

    def test_a_config_file_and_the_record_of_a_run(
        self, plugged: Callable[..., Result], tiny_wan: Path, record: Callable[[str], dict]
    ) -> None:
        Path("method.json").write_text('{"type": "strip", "rows": 0, "dense_steps": 1}')
        run = ["--model", tiny_wan, *SIZE, "--attn-config", "method.json", "-o", "out.png"]
        assert plugged("generate", "a cat", *run).code == 0
        assert record("out.json")["attention"]["method"]["dense_steps"] == 1
        assert plugged("generate", "--from", "out.png.json", "-o", "again.png").code == 0
        assert record("again.json")["attention"] == record("out.json")["attention"]

    def test_a_broken_one_is_one_line(self, plugged: Callable[..., Result]) -> None:
        error = plugged("generate", "a red circle", "-o", "out.gif", "--attn", "broken").error
        assert error.startswith("the entry point broken = broken_attn:B of broken_attn 0.3 cannot")
        assert not Path("out.gif").exists()


class TestLora:
    def test_from_its_training_to_a_video(
        self,
        strip: Any,
        diffattn: Callable[..., Result],
        generate: Callable[..., Result],
        tiny_wan: Path,
        tmp_path: Path,
        record: Callable[[str], Any],
    ) -> None:
        (tmp_path / "prompts.txt").write_text("a cat\n")
        (tmp_path / "train.toml").write_text(
            'prompts = "prompts.txt"\nrank = 2\nsteps = 1\nteacher_steps = 1\n'
            '[attention]\ntype = "strip"\nrows = 0\n'
        )
        size = SIZE[: SIZE.index("--steps")]
        run = ["--model", tiny_wan, *size, "--config", "train.toml", "-o", "run"]
        result = diffattn("lora", "train", *run)
        assert result.code == 0, result.err
        assert "under strip attention" in result.out
        result = generate("a cat", "-o", "own.png", "--lora", "run")
        assert result.code == 0, result.err
        assert "the LoRA was trained under strip (rows=0), which is attached" in result.out
        assert record("own.json")["attention"]["method"] == strip(rows=0).to_dict()
        del METHODS["strip"]
        assert generate("a cat", "-o", "no.png", "--lora", "run").error == (
            "the LoRA was trained under strip, which cannot be had here (unknown method 'strip';"
            f" choose from {', '.join(sorted(METHODS))}); install the package or the version that"
            " has it, or choose another method by --attn"
        )
        result = generate("a cat", "-o", "other.png", "--lora", "run", "--attn", "dense")
        assert result.code == 0, result.err
        assert "note: the LoRA was trained under strip, which cannot be had here (" in result.out
        assert (tmp_path / "other").is_dir()

    def test_a_program_that_lacks_it_says_so(
        self, strip: Any, diffattn: Callable[..., Result], tmp_path: Path
    ) -> None:
        settings = tmp_path / "method.json"
        settings.write_text(json.dumps(strip(rows=2).to_dict()))
        del METHODS["strip"]
        error = diffattn("generate", "a cat", "--attn-config", settings).error
        assert error.startswith("unknown method 'strip'; ")
