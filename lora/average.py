"""The moving average of the trained weights over the steps (EMA)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffattn.lora.errors import LoraError

FOLDER = "ema"
_FILE = "average.safetensors"


class MovingAverage:
    """An exponential moving average of weights.

    In the first steps the average is over fewer steps, as the start counts for nothing: step n
    decays by at most (1 + n) / (10 + n), as in diffusers.

    Attributes:
        decay: the part of the average that a step keeps.
        weights: the averages by name, in the weights' dtype, on their device.
    """

    def __init__(self, trained: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        """Start from the present weights.

        Args:
            trained: the weights by name.
            decay: the part of the average that a step keeps, above 0 and below 1.
        """
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in trained.items()}

    def update(self, trained: Mapping[str, torch.nn.Parameter], step: int) -> None:
        """Take in the weights after a step; steps count from 1."""
        kept = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in trained.items():
                self.weights[name].lerp_(weight, 1 - kept)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint's folder."""
        tensors = {name: weight.cpu().contiguous() for name, weight in self.weights.items()}
        save_file(tensors, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Read the average from a checkpoint's folder.

        Raises:
            LoraError: if the file is missing, damaged or of other weights.
        """
        file = folder / _FILE
        try:
            saved = load_file(file)
            for name, weight in self.weights.items():
                weight.copy_(saved[name])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise LoraError(
                f"cannot read {file}: {error}; remove the checkpoint to go on from the one before"
            ) from None
