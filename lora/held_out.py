"""Clips that are kept out of the training, and the loss on them with fixed noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffattn.lora.draws import Clips
from diffattn.lora.errors import LoraError

# Draws of noise in a look, at least: with fewer the loss depends on the levels drawn.
DRAWS = 8


@dataclass(frozen=True)
class SomeClips:
    """Some of the clips of a training.

    Attributes:
        clips: all clips.
        indices: the places of these among all, in order.
    """

    clips: Clips
    indices: tuple[int, ...]

    @property
    def keys(self) -> Sequence[str]:
        keys = self.clips.keys
        return [keys[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.clips[self.indices[index]]


def hold_out(clips: Clips, count: int, seed: int) -> tuple[Clips, Clips | None]:
    """The clips to learn from, and those that are kept out: random ones by the seed.

    Raises:
        LoraError: if nothing would be left to learn from.
    """
    if not count:
        return clips, None
    if count >= len(clips):
        raise LoraError(
            f"held_out is {count}, but there are {len(clips)} clips, of which one at least must be"
            f" learnt from: hold out fewer"
        )
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed)).tolist()
    held, learnt = sorted(order[:count]), sorted(order[count:])
    return SomeClips(clips, tuple(learnt)), SomeClips(clips, tuple(held))
