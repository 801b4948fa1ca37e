"""What diffattn knows of a model family: its self-attention sites and the grid of a call."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffattn.grid import TokenGrid
from diffattn.models.token_flow import TokenFlow


@dataclass(frozen=True)
class SizeRules:
    """Which sizes a pipeline can make, in pixels and frames, and the tokens they become.

    Attributes:
        spatial_multiple: height and width are multiples of it.
        frame_stride, frame_offset: a number of frames is `frame_stride * k + frame_offset`, k >= 0;
            a stride of 0 is a pipeline that makes images.
        token_pixels: pixels per token along height and width; the multiple where it is None.
        frames_per_token: latent frames per token; pipelines pad those that are left over.
        frames_apart: whether each frame attends to itself alone, on a grid of its own.
    """

    spatial_multiple: int
    frame_stride: int
    frame_offset: int
    token_pixels: int | None = None
    frames_per_token: int = 1
    frames_apart: bool = False

    @classmethod
    def images(cls, spatial_multiple: int) -> SizeRules:
        """The rules of a pipeline that makes images."""
        return cls(spatial_multiple, frame_stride=0, frame_offset=1)

    def check(self, height: int, width: int, num_frames: int) -> None:
        """Raise ValueError, naming the nearest legal sizes, unless the size fits."""
        for name, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % self.spatial_multiple:
                raise ValueError(
                    f"{name} is {pixels}, but this model needs a multiple of"
                    f" {self.spatial_multiple}: {_both_sides(pixels, self.spatial_multiple, 0)}"
                )
        if self.frame_stride == 0:
            if num_frames != self.frame_offset:
                raise ValueError(f"num_frames is {num_frames}, but this model makes images: try 1")
        elif num_frames < 1 or (num_frames - self.frame_offset) % self.frame_stride:
            raise ValueError(
                f"num_frames is {num_frames}, but this model needs {self.frame_stride} * k +"
                f" {self.frame_offset}:"
                f" {_both_sides(num_frames, self.frame_stride, self.frame_offset)}"
            )

    def grid(self, height: int, width: int, num_frames: int) -> TokenGrid:
        """The video tokens of a size.

        Raises:
            ValueError: if the size does not fit; names the nearest that do.
        """
        self.check(height, width, num_frames)
        alone = self.frames_apart or self.frame_stride == 0
        latent_frames = 1 if alone else -(-num_frames // self.frame_stride)
        pixels = self.token_pixels or self.spatial_multiple
        return TokenGrid(
            -(-latent_frames // self.frames_per_token), height // pixels, width // pixels
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
            tells their blocks apart, which are numbered in the order of `named_modules()`.
        grid: gives the video tokens of a call from the denoiser (or the module that `grid_modules`
            names) and the arguments of its forward, without reading tensor values again and again:
            that would wait for the device and cannot be compiled.
        sizes: the legal sizes of a pipeline of this family.
        variants: which of the family's models a pipeline or denoiser holds, for recommended
            settings; the family's name where there is but one.
        text: where text tokens stand in the sequence of a site, if they do; how many there are is
            seen in the call.
        grid_modules: pattern of the names of the modules inside the denoiser whose calls have a
            grid each, for the sites within them; without it the denoiser's call has one for all.
        padding: how the model's attention masks say which keys are padding: by key; by the outer
            product of what is valid, per pair; or as a bias that is 0 where a key counts.
        rotary: position and name of the argument of its sites' calls that holds the tables of the
            rotary position embedding, cosines and sines for neighbouring channels, the same twice.
        images: whether its models make images, or frames that each attend to themselves alone;
            methods that recommend other settings for images than for videos ask for it.
        flow: where its video tokens may be put in another order for a whole forward; None where
            something between its blocks knows them by their place.
        tested: what the project's tests run of it: tiny models, and pipelines where those can be
            built offline.
    """

    name: str
    title: str
    model_classes: tuple[str, ...]
    sites: re.Pattern[str]
    grid: Callable[[torch.nn.Module, tuple[Any, ...], Mapping[str, Any]], TokenGrid]
    sizes: Callable[[Any], SizeRules]
    variants: Callable[[Any, torch.nn.Module], str] | None = None
    text: Literal["before", "after"] | None = None
    grid_modules: re.Pattern[str] | None = None
    padding: Literal["keys", "pairs", "bias"] = "keys"
    rotary: tuple[int, str] | None = None
    images: bool = False
    flow: TokenFlow | None = None
    tested: Literal["model", "model, pipeline"] = "model, pipeline"

    def variant(self, pipe: Any, model: torch.nn.Module) -> str:
        """The model's name in the tables of recommended settings; `pipe` may be None."""
        return self.name if self.variants is None else self.variants(pipe, model)

    def layers(self, model: torch.nn.Module) -> dict[str, int]:
        """The attention sites of a denoiser by name, and the index of the block each is in."""
        matches = [self.sites.fullmatch(name) for name, _ in model.named_modules()]
        blocks: dict[str, int] = {}
        return {
            match[0]: blocks.setdefault(match["layer"], len(blocks)) for match in matches if match
        }


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """An argument of a forward call, None where it is not given."""
    return args[position] if len(args) > position else kwargs.get(name)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The `hidden_states` of a forward call, its first argument in all of diffusers."""
    return args[0] if args else kwargs["hidden_states"]


def latent_grid(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], patch_size: tuple[int, int, int]
) -> TokenGrid:
    """The grid of a call on latents (batch, channels, frames, height, width)."""
    sizes = zip(first_input(args, kwargs).shape[2:], patch_size, strict=True)
    return TokenGrid(*(size // patch for size, patch in sizes))
