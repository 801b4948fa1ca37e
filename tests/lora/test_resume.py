"""A run that is killed, really, and goes on: it ends as one that never was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_training
import torch

from diffattn.lora.checkpoint import checkpoints

SCRIPT = Path(tiny_training.__file__)
SECONDS_TO_WAIT = 120


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that a run ends with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = tiny_training.trainer(tmp_path_factory.mktemp("whole"), checkpoint_every=1)
    made.train()
    torch.set_num_threads(threads)
    return tiny_training.trained(made)


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | tiny_training.own_path() | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, SCRIPT, folder, *arguments], env=environment)


def finish(folder: Path) -> dict[str, torch.Tensor]:
    """Go on in this process, with as many threads as the killed one had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = tiny_training.trainer(folder, resume=True, checkpoint_every=1)
    assert 0 < made.step < tiny_training.STEPS
    made.train()
    torch.set_num_threads(threads)
    return tiny_training.trained(made)


def check_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_killed_while_it_writes_a_checkpoint(
    uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """All files of step 3 are written, but the checkpoint has no name yet."""
    killed = start(tmp_path, "3")
    assert killed.wait(SECONDS_TO_WAIT) == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [".step-000003.tmp", "step-000001", "step-000002"]
    check_same(finish(tmp_path), uninterrupted)
    log = (tmp_path / "losses.jsonl").read_text().splitlines()
    assert len(log) == tiny_training.STEPS


def test_killed_at_some_moment(uninterrupted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    killed = start(tmp_path)
    limit = time.monotonic() + SECONDS_TO_WAIT
    while not checkpoints(tmp_path) and time.monotonic() < limit:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(SECONDS_TO_WAIT) == -signal.SIGKILL
    check_same(finish(tmp_path), uninterrupted)
