"""What every launch of a kernel needs to know of the device and of numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

# Scores times this are as good as 0.
SMALLEST_SCALE = 1e-30


def is_hopper(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU.

    ROCm's GPUs are "cuda" to torch, with capabilities of their own numbering.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) == (9, 0)
    )


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def padded_head_dim(head_dim: int) -> int:
    """The head dimension, padded to what a matrix product takes."""
    return max(16, triton.next_power_of_2(head_dim))


def float32_precision() -> str:
    """How float32 is multiplied: in full, unless torch was told that TF32 will do."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
