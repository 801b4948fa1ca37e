"""Makes the oracles beside this file importable: the suite runs in pytest's importlib mode."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads waiting for each other take most of the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where Triton kernels run: a GPU, or the CPU in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        return accelerator.type
    from interpreter import repair

    repair(monkeypatch)
    return "cpu"
