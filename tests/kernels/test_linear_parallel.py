"""Linear attention over two processes with unequal parts of the tokens, compared with one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import linear_worker
import pytest
import torch
from linear_worker import CUTS, TOKENS, run


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[int, bool], list]]:
    folder = tmp_path_factory.mktemp("two-processes")
    script = Path(linear_worker.__file__)
    tests = str(script.parents[1])
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, script, folder, str(rank)],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(180) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), "\n".join(log.read_text()[-2000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_two_processes_equal_one(
    outcomes: list[dict[tuple[int, bool], list]], cut: int, masked: bool
) -> None:
    expected = run(slice(0, TOKENS), masked, None)
    parts = zip(outcomes[0][cut, masked], outcomes[1][cut, masked], strict=True)
    for (first, second), want in zip(parts, expected, strict=True):
        assert first.shape[1] == cut
        torch.testing.assert_close(torch.cat([first, second], 1), want, atol=1e-12, rtol=1e-10)
    alone = run(slice(0, cut), masked, None)
    assert not torch.allclose(alone[0], expected[0][:, :cut], atol=1e-4), "both should matter"
