"""Frames of the past that stand before a video in its sequence, in coarser tokens the older."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffattn.grid import Reference, TokenGrid
from diffattn.models.base import argument


@dataclass(frozen=True)
class Past:
    """The arguments of a forward that hold frames of the past.

    Attributes:
        latents: position and name of the latents (batch, channels, frames, height, width).
        indices: position and name of the number of each latent frame, (frames) or (batch, frames).
        patch: latents of a token along frames, height and width. The model pads what is missing.
    """

    latents: tuple[int, str]
    indices: tuple[int, str]
    patch: tuple[int, int, int]


def behind(
    pasts: Iterable[Past],
    video: TokenGrid,
    numbers: torch.Tensor | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> TokenGrid:
    """The grid of a call: the frames of the past in the order of `pasts`, and then the video.

    Args:
        video: the tokens of the video.
        numbers: the number of each latent frame of the video; None for 0, 1, 2 and so on.

    Raises:
        ValueError: if a call has more or fewer numbers of frames than frames.
    """
    origin = 0.0 if numbers is None else _first_sample(numbers)[0]
    start, references = 0, []
    for past in pasts:
        latents, indices = (argument(args, kwargs, *at) for at in (past.latents, past.indices))
        # Models leave out frames without numbers.
        if latents is None or indices is None:
            continue
        at = _first_sample(indices)
        if len(at) != latents.shape[2]:
            raise ValueError(
                f"{past.latents[1]} has {latents.shape[2]} frames, but {past.indices[1]} has the"
                f" numbers of {len(at)}: give each frame one"
            )
        sizes = [-(-n // step) for n, step in zip(latents.shape[2:], past.patch, strict=True)]
        times = _pooled(at, past.patch[0], origin)
        references.append(Reference(start, sizes[0], sizes[1], sizes[2], times=times))
        start = references[-1].stop
    return replace(video.beside(before=start), references=tuple(references))


def _first_sample(numbers: torch.Tensor) -> list[float]:
    # Pipelines keep these few numbers on the CPU: reading them does not wait for a device.
    return [float(x) for x in (numbers if numbers.ndim == 1 else numbers[0]).tolist()]


def _pooled(at: list[float], step: int, origin: float) -> tuple[float, ...]:
    """The times of tokens of `step` frames each; the last frame stands for missing ones."""
    padded = at + at[-1:] * (-len(at) % step)
    groups = (padded[i : i + step] for i in range(0, len(padded), step))
    return tuple(sum(group) / step - origin for group in groups)
