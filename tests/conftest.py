"""Lets the Triton kernels run where there is no GPU, and skips the tests that do need one."""

import os

import pytest
import torch

# Before Triton is imported by anything: it decides then whether kernels are interpreted. A process
# that interprets them cannot compile them, so tests that compile start one without the variable.
if not (torch.cuda.is_available() or torch.xpu.is_available()):
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and TRITON_INTERPRET unset"))
