"""Everything random about a training, as a function of the seed and a sample's number.

Samples are numbered through the run: step after step, within a step forward after forward and
process after process. So a run that is resumed, or spread over more processes with smaller batches,
draws the same for the same sample, and nothing about it has to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from diffattn.lora.losses import Batch
from diffattn.lora.recipes.base import Recipe
from diffattn.lora.settings import TrainSettings

# Independent streams of random numbers.
_ORDER, _SAMPLE, _DROPOUT = range(3)


class Clips(Protocol):
    """Encoded clips: item i has "latents" (channels, frames, height, width), and "conditions".

    Attributes:
        keys: what tells the clips apart, in their order.
    """

    @property
    def keys(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def sample_numbers(
    settings: TrainSettings, step: int, part: int, process: int, processes: int
) -> list[int]:
    """The numbers of the samples of one forward: the `part`-th of a step in one process."""
    first = ((step * settings.accumulation + part) * processes + process) * settings.batch_size
    return list(range(first, first + settings.batch_size))


def clip_of(number: int, clips: int, seed: int) -> int:
    """Which of the clips a sample shows: all of them once in random order, then again."""
    epoch, place = divmod(number, clips)
    order = torch.randperm(clips, generator=_generator(seed, _ORDER, epoch))
    return int(order[place])


def draw_batch(
    clips: Clips,
    empty: Mapping[str, torch.Tensor],
    recipe: Recipe,
    scheduler: Any,
    settings: TrainSettings,
    numbers: Sequence[int],
) -> Batch:
    """Draw clips, noise, times and dropped captions of the samples with these numbers, on the CPU.

    Args:
        clips: what to choose from.
        empty: the conditions of the empty caption, without batch axis.
        recipe, scheduler: say which times there are.
        settings: of the training.
        numbers: of the samples.
    """
    drawn = []
    for number in numbers:
        item = clips[clip_of(number, len(clips), settings.seed)]
        generator = _generator(settings.seed, _SAMPLE, number)
        latents = item["latents"].float()
        noise = torch.randn(latents.shape, generator=generator)
        times = recipe.sample_times(scheduler, 1, generator, settings.shift)
        dropped = float(torch.rand((), generator=generator)) < settings.caption_dropout
        drawn.append((latents, noise, times[0], empty if dropped else item["conditions"]))
    told = [conditions for *_, conditions in drawn]
    return Batch(
        torch.stack([latents for latents, *_ in drawn]),
        torch.stack([noise for _, noise, *_ in drawn]),
        torch.stack([time for *_, time, _ in drawn]),
        {name: torch.stack([each[name] for each in told]) for name in told[0]},
    )


def seed_dropout(settings: TrainSettings, numbers: Sequence[int]) -> None:
    """Seed torch's own generators for a forward, whose LoRA may drop inputs."""
    torch.manual_seed(_seed(settings.seed, _DROPOUT, numbers[0]))


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, stream, number))


def _seed(seed: int, stream: int, number: int) -> int:
    # torch's generator on the CPU looks at 32 bits only, which must differ in more than the last.
    return int(np.random.SeedSequence((seed, stream, number)).generate_state(1)[0])
