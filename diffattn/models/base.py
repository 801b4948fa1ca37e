"""What diffattn knows of a model family: its self-attention sites and the grid of a call."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffattn.grid import TokenGrid


@dataclass(frozen=True)
class SizeRules:
    """Which video sizes a pipeline can make, in pixels and frames.

    Attributes:
        spatial_multiple: height and width are multiples of it.
        frame_stride, frame_offset: a number of frames is `frame_stride * k + frame_offset`, k >= 0.
    """

    spatial_multiple: int
    frame_stride: int
    frame_offset: int

    def check(self, height: int, width: int, num_frames: int) -> None:
        """Raise ValueError, naming the nearest legal sizes, unless the size fits."""
        for name, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % self.spatial_multiple:
                raise ValueError(
                    f"{name} is {pixels}, but this model needs a multiple of"
                    f" {self.spatial_multiple}: {_both_sides(pixels, self.spatial_multiple, 0)}"
                )
        if num_frames < 1 or (num_frames - self.frame_offset) % self.frame_stride:
            raise ValueError(
                f"num_frames is {num_frames}, but this model needs {self.frame_stride} * k +"
                f" {self.frame_offset}:"
                f" {_both_sides(num_frames, self.frame_stride, self.frame_offset)}"
            )


def _both_sides(value: int, multiple: int, offset: int) -> str:
    smallest = offset or multiple
    below = max((value - offset) // multiple * multiple + offset, smallest)
    above = below + multiple
    return f"try {smallest}" if value < smallest else f"try {below} or {above}"


@dataclass(frozen=True)
class Family:
    """A row of the table of models: all that is particular to a family of denoisers.

    Attributes:
        name: what configuration files and methods call the family.
        title: what people call it.
        model_classes: the diffusers classes of its denoisers.
        sites: pattern of the names of the modules that do video self-attention; its group `layer`
            is the index of the block.
        grid: gives the video tokens of a call from the denoiser and the arguments of its forward,
            from shapes alone.
        text: where text tokens stand in the sequence of a site, if they do; how many there are is
            seen in the call.
        sizes: the legal sizes of a pipeline of this family.
        pipeline_grid: the grid of a pipeline's call, from height, width and number of frames.
        variant: which of the family's models a pipeline or denoiser holds, for recommended
            settings.
    """

    name: str
    title: str
    model_classes: tuple[str, ...]
    sites: re.Pattern[str]
    grid: Callable[[torch.nn.Module, tuple[Any, ...], Mapping[str, Any]], TokenGrid]
    sizes: Callable[[Any], SizeRules]
    pipeline_grid: Callable[[Any, int, int, int], TokenGrid]
    variant: Callable[[Any, torch.nn.Module], str]
    text: Literal["before", "after"] | None = None
