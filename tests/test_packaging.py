"""The installed wheel, tried from a directory that is not the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PUBLIC = [
    "diffattn",
    "diffattn.kernels.cpu",
    "diffattn.kernels.reference",
    "diffattn.lora",
    "diffattn.lora.trainer",
    "diffattn.methods",
    "diffattn.models",
    "diffattn.pipelines.bench.session",
    "diffattn.pipelines.cli.commands",
    "diffattn.pipelines.doctor.report",
    "diffattn.samples.moving_shapes",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT],
        check=True,
    )
    return next(folder.glob("diffattn-*.whl"))


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's contents, and a user's own `kernels`, `lora` and `pipelines`."""
    folder = tmp_path_factory.mktemp("elsewhere")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    for name in ("kernels", "lora", "pipelines", "samples"):
        (folder / f"{name}.py").write_text("raise ImportError('a module of the user was touched')")
    return folder


def run_elsewhere(elsewhere: Path, code: str, cwd: Path | None = None) -> str:
    environment = os.environ | {"PYTHONPATH": str(elsewhere / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd or elsewhere,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_import(elsewhere: Path) -> None:
    code = f"""
import importlib, json, sys
where = {{name: importlib.import_module(name).__file__ for name in {PUBLIC!r}}}
import diffattn
missing = [name for name in diffattn.__all__ if not hasattr(diffattn, name)]
taken = [name for name in ("kernels", "lora", "pipelines", "samples") if name in sys.modules]
print(json.dumps([where, missing, taken]))
"""
    where, missing, taken = json.loads(run_elsewhere(elsewhere, code))
    assert all(Path(file).is_relative_to(elsewhere / "site") for file in where.values()), where
    assert missing == []
    assert taken == []


def test_wheel_has_everything_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"diffattn"}
    assert "diffattn/py.typed" in names
    assert "diffattn/samples/moving_shapes/model/model_index.json" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    # The pytest plugin is for others' tests.
    assert not any("test" in name for name in names if not name.startswith("diffattn/testing/"))


def test_the_bundled_model_is_in_the_wheel(elsewhere: Path, tmp_path: Path) -> None:
    # In a directory of its own: transformers itself trips over a user's module named `kernels`.
    code = """
from diffusers import WanPipeline
from diffattn.samples.moving_shapes import MODEL_DIR
pipe = WanPipeline.from_pretrained(MODEL_DIR, local_files_only=True)
print(sum(file.stat().st_size for file in MODEL_DIR.rglob("*") if file.is_file()))
"""
    assert int(run_elsewhere(elsewhere, code, cwd=tmp_path)) <= 10_000_000


def test_the_command_is_installed(elsewhere: Path) -> None:
    code = "from diffattn.pipelines.cli import main; import sys; sys.argv[1:] = ['--help']; main()"
    assert "generate" in run_elsewhere(elsewhere, code)
