"""Device, padding and precision of a kernel's launch."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch

# Scores times this scale are as good as 0.
SMALLEST_SCALE = 1e-30


@functools.cache
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
    """A context in which Triton, which launches on the current device, launches on `device`."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def padded_head_dim(head_dim: int) -> int:
    """The head dimension, padded to a power of 2 of at least 16, as matrix products take it."""
    # `triton.next_power_of_2` takes 5 us, and a launch asks several times.
    return max(16, 1 << (head_dim - 1).bit_length())


def float32_precision() -> str:
    """`"ieee"` for float32 products in full; `"tf32"` where torch's settings allow TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
