"""Where tests outside of tests/kernels run the Triton kernels."""

import os
from pathlib import Path

import pytest
import torch


def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU, or the CPU in Triton's interpreter, whose faults are repaired for this test."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        return accelerator.type
    monkeypatch.syspath_prepend(Path(__file__).parent / "kernels")
    from interpreter import repair

    repair(monkeypatch)
    return "cpu"
