"""Every shipped Triton kernel compiles for the GPUs it is meant for, and fits on them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_configurations.py")
GATHER_SCRIPT = Path(__file__).with_name("compile_gather.py")
LINEAR_SCRIPT = Path(__file__).with_name("compile_linear.py")


def compile_for(
    arch: int, cache: Path, *, script: Path = SCRIPT, code: str | None = None
) -> tuple[int, str, str]:
    """Exit status and output of the script, in a process that compiles and does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(script)] if code is None else [sys.executable, "-c", code]
    run = subprocess.run(
        [*command, "--arch", str(arch)],
        env=environment, cwd=SCRIPT.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.returncode, run.stdout, run.stderr


def kernels_of(table: str) -> set[str]:
    """Names of the kernels in what the script printed."""
    return {line.split(" warps")[0].split()[-1] for line in table.splitlines() if "regs" in line}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_gather_configuration_compiles_without_spills(arch: int, tmp_path: Path) -> None:
    status, table, problems = compile_for(arch, tmp_path, script=GATHER_SCRIPT)
    print(table)
    assert status == 0, problems
    assert kernels_of(table) == {
        "count_kernel", "fill_kernel", "forward_kernel", "delta_kernel", "queries_kernel",
        "keys_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_linear_configuration_compiles_without_spills(arch: int, tmp_path: Path) -> None:
    status, table, problems = compile_for(arch, tmp_path, script=LINEAR_SCRIPT)
    print(table)
    assert status == 0, problems
    expected = {"collect_kernel", "apply_kernel", "pull_back_kernel", "denominator_kernel"}
    assert kernels_of(table) == expected


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_configuration_compiles_without_spills(arch: int, tmp_path: Path) -> None:
    status, table, problems = compile_for(arch, tmp_path)
    print(table)
    assert status == 0, problems
    expected = {"forward_kernel", "delta_kernel", "queries_kernel", "keys_kernel"}
    if arch == 90:
        expected |= {"tma_kernel", "warp_specialized_kernel"}
    assert kernels_of(table) == expected


@pytest.mark.parametrize(
    ("sabotage", "problem"),
    [
        pytest.param("", "", id="nothing"),
        pytest.param(
            "check.forward = lambda *a, **k: forward(*a, config=TileConfig(128, 128, 4, 2), **k)",
            "has a stack, of spilled registers",
            id="spills",
        ),
        pytest.param(
            "check.forward = lambda *a, **k: forward(*a, config=TileConfig(128, 128, 8, 4), **k)",
            "the chip has 163 KiB",
            id="shared-memory",
        ),
        pytest.param(
            "check.forward = lambda *a, **k: forward(*a, config=TileConfig(128, 24, 4, 2), **k)",
            "CompilationError",
            id="does-not-compile",
        ),
    ],
)
def test_the_check_finds(sabotage: str, problem: str, tmp_path: Path) -> None:
    code = f"""
import sys
import torch
import compile_configurations as check
from diffattn.kernels.block_sparse.configs import TileConfig
from diffattn.kernels.block_sparse.forward import forward
check.cases = lambda arch, everything: [check.Case(128, torch.bfloat16)]
check.launches = lambda case, arch, every=check.launches: [next(iter(every(case, arch)))]
{sabotage}
sys.exit(check.main())
"""
    status, _, problems = compile_for(80, tmp_path, code=code)
    assert status == bool(problem), problems
    assert problem in problems
