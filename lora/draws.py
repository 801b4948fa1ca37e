"""Everything random about a training, as a function of the seed and a sample's number.

Samples are numbered throughout the run: step after step, within a step forward after forward, and
within a forward process after process. So a run draws the same for the same sample after it was
resumed, and on more processes with smaller batches. No state of generators has to be kept.
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
    """Encoded clips, see `CachedClips`.

    Item i has "latents" (channels, latent frames, height, width) and "conditions" (name: tensor).

    Attributes:
        keys: the keys of the clips, in order.
    """

    @property
    def keys(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def sample_numbers(
    settings: TrainSettings, step: int, part: int, process: int, processes: int
) -> list[int]:
    """The numbers of the samples of one forward: forward `part` of a step in one process."""
    first = ((step * settings.accumulation + part) * processes + process) * settings.batch_size
    return list(range(first, first + settings.batch_size))


def clip_of(number: int, clips: int, seed: int) -> int:
    """The index of the clip in a sample; each epoch has every clip once, in random order."""
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
    """Draw clips, noise, times and dropped captions of samples, on the CPU.

    Args:
        clips: the clips to draw from.
        empty: the conditions of the empty caption, without batch axis.
        recipe, scheduler: the source of the times.
        settings: the settings of the training.
        numbers: the numbers of the samples.
    """
    drawn = []
    for number in numbers:
        item = clips[clip_of(number, len(clips), settings.seed)]
        generator = _generator(settings.seed, _SAMPLE, number)
        latents = item["latents"].float()
        noise = torch.randn(latents.shape, generator=generator)
        times = recipe.sample_times(
            scheduler, 1, generator, latents.shape[1:], settings.shift, settings.noise_levels
        )
        dropped = float(torch.rand((), generator=generator)) < settings.caption_dropout
        told = recipe.told(dict(item["conditions"]), dict(empty), dropped)
        drawn.append((latents, noise, times[0], told))
    conditions = [told for *_, told in drawn]
    return Batch(
        torch.stack([latents for latents, *_ in drawn]),
        torch.stack([noise for _, noise, *_ in drawn]),
        torch.stack([time for *_, time, _ in drawn]),
        {name: torch.stack([each[name] for each in conditions]) for name in conditions[0]},
    )


def seed_dropout(settings: TrainSettings, numbers: Sequence[int]) -> None:
    """Seed torch's default generators for the dropout of a forward on these samples."""
    torch.manual_seed(_seed(settings.seed, _DROPOUT, numbers[0]))


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, stream, number))


def _seed(seed: int, stream: int, number: int) -> int:
    # torch's generator on the CPU uses 32 bits of a seed, and needs seeds that differ in many bits.
    return int(np.random.SeedSequence((seed, stream, number)).generate_state(1)[0])
