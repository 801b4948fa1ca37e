"""VBench (Huang et al. 2024), which is run in an environment of its own.

The package asks for transformers 4.33.2 and numpy 1, which no diffusers of today can be beside.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import one_line
from .clip import NotMeasuredError
from .comparison import Folder
from .sample_table import Row, SampleTable, Value

# Dimensions that need no prompt suite of VBench's own (mode "custom_input").
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
# Names the Python of VBench's environment.
VARIABLE = "DIFFATTN_VBENCH"
_INSTALL = (
    f"install it in an environment of its own (pipx install vbench), or name the Python of that"
    f" environment by {VARIABLE}"
)
_SCRIPT = Path(__file__).with_name("vbench_script.py")
_NETWORKS = (
    "VBench keeps its networks in ~/.cache/vbench, or where VBENCH_CACHE_DIR says, and some in"
    " ~/.cache/torch and ~/.cache/clip; it downloads what is missing"
)


def python() -> Path | None:
    """The Python of VBench's environment; None if there is none.

    It is that of DIFFATTN_VBENCH, or of the command `vbench`.

    Raises:
        NotMeasuredError: if DIFFATTN_VBENCH names no program.
    """
    named = os.environ.get(VARIABLE)
    if named:
        program = shutil.which(named)
        if program is None:
            raise NotMeasuredError(
                f"{VARIABLE} is {named!r}, but must be the Python of an environment with the"
                f" package vbench, such as /path/to/env/bin/python"
            )
        return Path(program).absolute()
    command = shutil.which("vbench")
    if command is None:
        return None
    with Path(command).open("rb") as file:
        first = file.readline().decode("utf-8", "replace").strip()
    interpreter = first.removeprefix("#!").strip()
    is_python = first.startswith("#!") and "python" in Path(interpreter).name
    return Path(interpreter) if is_python and shutil.which(interpreter) else None


def lacking() -> str | None:
    """Why no video can be scored here; None if videos can be."""
    try:
        return "not installed: vbench" if python() is None else None
    except NotMeasuredError as error:
        return str(error)


def prepare() -> None:
    """Refuse an environment without VBench.

    Raises:
        NotMeasuredError: if there is no such environment, or the package cannot be imported there.
    """
    found = python()
    if found is None:
        raise NotMeasuredError(f"there is no command vbench, or not of a Python: {_INSTALL}")
    _check_import(found)


@functools.cache
def _check_import(interpreter: Path) -> None:
    run = subprocess.run(
        [interpreter, "-I", "-c", "import torch, vbench"],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise NotMeasuredError(f"{interpreter} cannot import vbench ({_last_line(run.stderr)})")


def score(folder: Folder, table: SampleTable, say: Callable[[str], None]) -> None:
    """Score all videos of a table that have no score yet, those of earlier runs as well.

    A dimension that fails leaves the reason in the table, and the next run tries again.

    Args:
        folder: holds the videos.
        table: takes the scores.
        say: takes lines for the user.
    """
    interpreter = None if lacking() else python()
    for dimension in DIMENSIONS if interpreter else ():
        name = f"vbench_{dimension}"
        rows = [row for row in table.rows if _is_open(row, name)]
        if not rows:
            continue
        say(f"VBench {dimension.replace('_', ' ')}: {len(rows)} videos")
        found: Mapping[str, Value] | str
        try:
            found = _scores(Path(str(interpreter)), dimension, folder, rows)
        except NotMeasuredError as error:
            found = str(error)
            say(f"left out: {found}")
        missing = f"VBench gave no {dimension}"
        table.put(
            name,
            {
                (row.case, row.sample): found
                if isinstance(found, str)
                else found.get(Path(row.file).name, missing)
                for row in rows
            },
        )


def _is_open(row: Row, name: str) -> bool:
    """Whether a row of a video lacks a score."""
    return name in row.measures and row.file.endswith(".mp4") and row.number(name) is None


def _scores(interpreter: Path, dimension: str, folder: Folder, rows: list[Row]) -> dict[str, Value]:
    """The scores of videos by the names of their files.

    Raises:
        NotMeasuredError: if VBench fails.
    """
    with tempfile.TemporaryDirectory() as made:
        videos, output = Path(made, "videos"), Path(made, "output")
        videos.mkdir()
        output.mkdir()
        prompts = {}
        for row in rows:
            path = folder.path / row.file
            if path.is_file():
                (videos / path.name).symlink_to(path.resolve())
                prompts[path.name] = row.prompt
        request = Path(made, "request.json")
        asked = {"videos": str(videos), "prompts": prompts, "dimension": dimension}
        request.write_text(json.dumps(asked | {"output": str(output)}), "utf-8")
        # -I: no module of this project may stand before VBench's own, such as "clip".
        run = subprocess.run(
            [interpreter, "-I", _SCRIPT, request],
            capture_output=True,
            text=True,
            check=False,
            cwd=made,
        )
        if run.returncode:
            raise NotMeasuredError(
                f"VBench cannot score {dimension} ({_last_line(run.stderr)}); {_NETWORKS}"
            )
        scores: dict[str, Value] = json.loads((output / "scores.json").read_text("utf-8"))
        return scores


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "without a word"
