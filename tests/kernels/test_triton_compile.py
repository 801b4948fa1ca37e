"""Every shipped Triton kernel compiles for the GPUs it is meant for, and to good machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# What is known not to be reached, and how near it is. The same kernel has .94 of the block-sparse
# one's share with Triton 3.6, which copies more of it to shared memory otherwise.
NEARLY = {"share of gather's keys at head_dim 64 / that of block_sparse": 0.88}

# Runs the command several times in one process: most of the time of each would go into imports.
SEVERAL = """
import contextlib, io, json, sys
from machine_code.command import main
results = {}
for name, arguments in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stderr(io.StringIO()) as wrong:
        status = main(arguments)
    results[name] = [status, wrong.getvalue()]
print(json.dumps(results))
"""

# What is wrong with a choice of tiles, and how the check says so: queries, keys, warps, stages.
BAD_TILES = {
    "duplicated-products": (
        "--arch 90 --kernel keys --tiles 32,64,8,2",
        "computes its products 1.50 times in the 'full' loop",
    ),
    "spills": (
        "--arch 80 --kernel forward --tiles 128,128,4,2",
        "words of registers in the 'full' loop",
    ),
    "serialized": (
        "--arch 90 --kernel forward --variant tma --tiles 128,128,4,2",
        "wgmma products are serialized (ptxas C75",
    ),
    "shared-memory": (
        "--arch 80 --kernel forward --tiles 128,128,8,4",
        "the chip has 163 KiB",
    ),
    "does-not-compile": ("--arch 80 --kernel forward --tiles 128,24,4,2", "CompilationError"),
    "nothing": ("--arch 80 --kernel forward --tiles 64,64,4,2", ""),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that compiles and does not interpret; it keeps what it compiles in Triton's cache.

    The benchmarks are in its path.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [environment.get("PYTHONPATH", ""), str(BENCHMARKS)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The table of every shipped configuration, as JSON."""
    folder = tmp_path_factory.mktemp("machine_code")
    done = run(str(BENCHMARKS / "machine_code"), "--output", str(folder))
    print(done.stdout)
    (written,) = folder.glob("*.json")
    content = json.loads(written.read_text())
    assert done.returncode == bool(content["problems"]), done.stderr
    return content


@pytest.fixture(scope="module")
def checked() -> dict[str, tuple[int, str]]:
    """Exit status and problems of the command for each of `BAD_TILES`."""
    calls = {name: arguments.split() for name, (arguments, _) in BAD_TILES.items()}
    done = run("-c", SEVERAL, json.dumps(calls))
    assert done.returncode == 0, done.stderr
    return {
        name: tuple(result) for name, result in json.loads(done.stdout.splitlines()[-1]).items()
    }


@pytest.mark.parametrize(
    "family",
    ["block_sparse", "clusters", "tangent", "gather", "linear", "selection", "summary"],
)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_configuration_compiles_well(arch: int, family: str, table: dict[str, Any]) -> None:
    """No duplicated or serialized products, no spills in hot loops, no lack of shared memory."""
    problems = [x for x in table["problems"] if x.startswith(f"sm_{arch} {family} ")]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("family", "kernels"),
    [
        ("block_sparse", {"forward", "queries", "keys", "row_sums"}),
        ("clusters", {"largest", "nearest", "span_sums", "split", "sums"}),
        ("tangent", {"tangent"}),
        ("gather", {"forward", "join", "queries", "keys", "row_sums", "count", "fill"}),
        ("linear", {"collect", "apply", "pull_back", "denominator"}),
        ("selection", {"pooling", "parts", "best", "list"}),
        ("summary", {"forward", "queries", "keys", "row_sums"}),
    ],
)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_is_in_the_table(
    arch: int, family: str, kernels: set[str], table: dict[str, Any]
) -> None:
    rows = [x for x in table["kernels"] if (x["arch"], x["family"]) == (arch, family)]
    if family == "selection" and arch != 90:
        kernels = {"parts"}  # the others have no products, and are alike on all chips
    assert {x["kernel"] for x in rows} == kernels


def test_every_variant_for_hopper_is_in_the_table(table: dict[str, Any]) -> None:
    """But for Gluon's: not every version of Triton has it."""
    found: dict[str, set[str]] = {"forward": set(), "queries": set(), "keys": set()}
    for row in table["kernels"]:
        if row["arch"] == 90 and row["family"] == "block_sparse" and row["kernel"] in found:
            found[row["kernel"]].add(row["variant"])
    found["forward"].discard("gluon")
    assert found == {
        "forward": {"plain", "tma"},
        "queries": {"plain", "tma"},
        "keys": {"plain", "tma"},
    }


def test_every_kernel_with_products_has_its_loops_in_the_table(table: dict[str, Any]) -> None:
    """In 16 bits with the products that its tiles need; float32 is multiplied without them."""
    without = {
        "row_sums", "count", "fill", "join", "denominator", "pooling", "best", "list", "split",
        "sums", "largest",
    }  # fmt: skip
    for row in table["kernels"]:
        if "float32" not in row["case"]:
            assert bool(row["loops"]) == (row["kernel"] not in without), row
        for loop in row["loops"]:
            has_products = "float32" not in row["case"]
            assert not has_products or loop["duplicated"] >= 0.999, (row, loop)


def test_the_goals_are_reached(table: dict[str, Any]) -> None:
    missed = [
        x for x in table["must_reach"]
        if not x["passed"] and x["found"] < NEARLY.get(x["goal"], x["wanted"])
    ]  # fmt: skip
    assert not missed, "\n".join(map(str, missed))


@pytest.mark.parametrize("name", BAD_TILES)
def test_the_check_finds(name: str, checked: dict[str, tuple[int, str]]) -> None:
    status, problems = checked[name]
    _, problem = BAD_TILES[name]
    assert status == bool(problem), problems
    assert problem in problems
