"""The stages of a run: processes in order, each with a limit of its own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

COMPILERS = 12

# Forms of kernels that are compared with float64, each in a process of its own: a form that hangs
# stops no other.
SMOKE = (
    "forward-plain", "forward-tma", "forward-gluon", "forward-gluon-ahead", "queries-plain",
    "queries-tma", "keys-plain", "keys-tma", "clusters", "gather", "linear", "summary", "public",
)  # fmt: skip

# Tests that need a GPU, of the kernels; all other files are found by their marks.
KERNEL_TESTS = tuple(
    f"tests/kernels/{name}.py"
    for name in (
        "test_forms",
        "test_triton",
        "test_best_blocks",
        "test_clusters",
        "test_gather",
        "test_linear_triton",
        "test_selection",
        "test_summary",
    )
)


@dataclass(frozen=True)
class Stage:
    """A process of a run.

    Attributes:
        name: the work and its subject, "rates:wan-1.3b-480p".
        limit: seconds after which its process is killed.
        least: the stage does not begin with fewer seconds left.
        command: the command line of its process.
        waits: whether its process, once it is ready, waits for a line of JSON with additions to its
            environment. Such a process can be made while another stage runs.
        beside: stages that follow each other with the same text here run side by side.
        alone: whether no other process is made while the stage runs, because the stage times work
            of the host.
        outlives_edits: whether its rows still count once the kernels' source text has changed.
    """

    name: str
    limit: float
    least: float
    command: tuple[str, ...]
    waits: bool = False
    beside: str = ""
    alone: bool = False
    outlives_edits: bool = False


def _worker(name: str, limit: float, least: float, **more: Any) -> Stage:
    command = (sys.executable, "-P", "-m", "gpu_run.worker")
    return Stage(name, limit, least, command, waits=True, **more)


def real_stages(root: Path) -> Iterator[Stage]:
    """The stages of a run on a GPU, the most important first.

    head_dim 64 is tuned after head_dim 128 has been tuned and measured.
    """
    for number in range(COMPILERS):
        yield _worker(f"compile:{number}/{COMPILERS}", 90, 20, beside="compile")
    yield _worker("yardstick", 45, 20, outlives_edits=True)
    for name in SMOKE:
        yield _worker(f"smoke:{name}", 60, 15, beside="smoke")
    for kernel in ("forward", "queries", "keys"):
        yield _worker(f"tune:{kernel}-128", 45, 20, outlives_edits=True)
    yield _worker("rates:wan-1.3b-480p", 70, 30)
    yield _worker("rates:wan-14b-720p", 90, 40)
    yield _worker("flex:wan-1.3b-480p", 90, 45)
    yield _worker("tune:gather-128", 45, 20, outlives_edits=True)
    yield _worker("selecting", 50, 25)
    yield _worker("summary", 25, 15)
    yield _worker("linear", 30, 15)
    for kernel in ("forward", "queries", "keys"):
        yield _worker(f"tune:{kernel}-64", 40, 20, outlives_edits=True)
    yield _worker("rates:cogvideox-5b", 60, 25)
    yield _worker("building:hunyuan-720p", 30, 15, alone=True)
    yield _worker("rates:hunyuan-720p", 90, 45)
    yield _worker("methods", 60, 25)
    yield from test_stages(root)


def test_stages(root: Path) -> Iterator[Stage]:
    """The tests that need a GPU, several at a time where pytest-xdist is installed."""
    marked = [
        str(file.relative_to(root))
        for file in sorted((root / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in file.read_text()
    ]
    pytest = pytest_command()
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", str(COMPILERS)]
    if importlib.util.find_spec("pytest_timeout"):
        # A thread ends the process, where a signal would not be seen in a call that hangs.
        pytest += ["--timeout", "60", "--timeout-method", "thread"]
    kernels = (*pytest, "--maxfail=20", *KERNEL_TESTS)
    yield Stage("tests:kernels", 180, 30, kernels)
    others = [file for file in marked if file not in KERNEL_TESTS]
    # Some of these files cannot be imported without diffusers.
    command = (*pytest, "-m", "gpu", "--continue-on-collection-errors", *others)
    yield Stage("tests:marked", 60, 20, command)


def pytest_command() -> list[str]:
    return [sys.executable, "-P", "-m", "pytest", "-p", "gpu_run.pytest_rows", "-q"]


# Left out of a dry run: stages that differ only in shape or form from a stage in the dry run.
NOT_DRY = (
    "smoke:*-tma", "tune:*-64", "rates:wan-14b-720p",
    "rates:hunyuan-720p", "tests:marked",
)  # fmt: skip


def dry_stages(root: Path) -> Iterator[Stage]:
    """The same program on a CPU: one compiler, one test, one shape, limits for a slow machine."""
    for stage in real_stages(root):
        if stage.name.startswith("compile:"):
            if stage.name != f"compile:0/{COMPILERS}":
                continue
            stage = replace(stage, name="compile:0/1")
        if any(fnmatch(stage.name, pattern) for pattern in NOT_DRY):
            continue
        if stage.name.startswith("tests:"):
            one = "tests/kernels/test_triton.py::test_long_rows_first"
            stage = replace(stage, command=(*pytest_command(), one))
        # Not side by side: the interpreter keeps a core busy.
        yield replace(stage, limit=120, least=1, beside="")
