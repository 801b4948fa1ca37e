"""Two processes, started by `accelerate launch` and joined by gloo, against one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training
from safetensors.torch import load_file

from diffattn.lora.adapter import LORA_FILE
from diffattn.lora.trainer import LOG_FILE

SCRIPT = Path(tiny_training.__file__)
SECONDS_TO_WAIT = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(folder: Path) -> None:
    """Start two processes on the CPU; without MPI accelerate does so only as for two GPUs."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", str(free_port()), SCRIPT, folder,
    ]  # fmt: skip
    environment = os.environ | {
        **tiny_training.own_path(),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS_TO_WAIT
    )
    assert done.returncode == 0, done.stderr


def test_they_do_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    launch(tmp_path / "two")
    one = tiny_training.trainer(tmp_path / "one", dropout=0.0, learning_rate=1e-3)
    one.train()
    logs = [
        [json.loads(line) for line in (tmp_path / run / LOG_FILE).read_text().splitlines()]
        for run in ("two", "one")
    ]
    assert len(logs[0]) == tiny_training.STEPS
    for shared, alone in zip(*logs, strict=True):
        # AdamW's first steps are the gradients' signs, also where those are rounding.
        assert shared == pytest.approx(alone, rel=1e-5, abs=1e-5)
    weights = [load_file(tmp_path / run / LORA_FILE) for run in ("two", "one")]
    for name, weight in weights[1].items():
        assert (weights[0][name] - weight).norm() < 0.05 * weight.norm(), name
    # Both processes took part in every checkpoint.
    last = tmp_path / "two" / "checkpoints" / f"step-{tiny_training.STEPS:06d}"
    assert {path.name for path in last.glob("random_states_*.pkl")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    assert json.loads((last / "progress.json").read_text())["identity"]["processes"] == 2
