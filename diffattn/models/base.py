"""A model family: its self-attention sites, the grid of a call, and the sizes of its pipelines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from diffattn.grid import TokenGrid
from diffattn.models.token_flow import TokenFlow


@dataclass(frozen=True)
class SizeRules:
    """The sizes that a pipeline can make, in pixels and frames, and the tokens of a size.

    Attributes:
        spatial_multiple: height and width in pixels are multiples of this number.
        frame_stride, frame_offset: a number of frames is `frame_stride * k + frame_offset`, k >= 0.
            A stride of 0 is a pipeline that makes images.
        latent_frames: latent frames of a stride, and of the offset. None for 1 of each; an offset
            of 0 has none.
        frame_bounds: the least and the largest number of frames; None for no bounds.
        token_pixels: pixels per token along height and width, of which the last may be less; None
            for `spatial_multiple`.
        frames_per_token: latent frames per token; pipelines pad the last token.
        frames_apart: whether each frame attends to itself alone, on a grid of one frame.
        most_tokens: the most tokens along frames, height and width; None for no limit.
        limited_by: the origin of `most_tokens`, for messages.
    """

    spatial_multiple: int
    frame_stride: int
    frame_offset: int
    latent_frames: tuple[int, int] | None = None
    frame_bounds: tuple[int, int] | None = None
    token_pixels: int | None = None
    frames_per_token: int = 1
    frames_apart: bool = False
    most_tokens: tuple[int | None, int | None, int | None] = (None, None, None)
    limited_by: str = ""

    @classmethod
    def images(cls, spatial_multiple: int) -> SizeRules:
        """The rules of a pipeline that makes images of multiples of `spatial_multiple` pixels."""
        return cls(spatial_multiple, frame_stride=0, frame_offset=1)

    def up_to(self, frames: int | None, side: int | None, limited_by: str) -> SizeRules:
        """These rules with a limit: tokens along the frames, and along height and width each."""
        return replace(self, most_tokens=(frames, side, side), limited_by=limited_by)

    def check(self, height: int, width: int, num_frames: int) -> None:
        """Check a size.

        Args:
            height, width: pixels.
            num_frames: frames of the video; 1 for images.

        Raises:
            ValueError: if the pipeline cannot make the size; names the nearest legal sizes, or the
                limit and its origin.
        """
        for name, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % self.spatial_multiple:
                raise ValueError(
                    f"{name} is {pixels}, but this model needs a multiple of"
                    f" {self.spatial_multiple}: {_both_sides(pixels, self.spatial_multiple, 0)}"
                )
        least, most = self.frame_bounds or (num_frames, num_frames)
        if not least <= num_frames <= most:
            raise ValueError(
                f"num_frames is {num_frames}, but this model makes {least} to {most} frames:"
                f" try {least if num_frames < least else most}"
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
        self._check_limits(height, width, num_frames)

    def grid(self, height: int, width: int, num_frames: int) -> TokenGrid:
        """The video tokens of a size.

        Args:
            height, width: pixels.
            num_frames: frames of the video; 1 for images.

        Raises:
            ValueError: if the pipeline cannot make the size; names the nearest legal sizes.
        """
        self.check(height, width, num_frames)
        frames, rows, columns = self._tokens(height, width, num_frames)
        alone = self.frames_apart or self.frame_stride == 0
        return TokenGrid(1 if alone else frames, rows, columns)

    def _tokens(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        """Tokens along frames, height and width, of frames that attend apart too."""
        latent_frames = 1
        if self.frame_stride:
            of_stride, of_offset = self._latents
            strides = (num_frames - self.frame_offset) // self.frame_stride
            latent_frames = of_stride * strides + of_offset
        pixels = self.token_pixels or self.spatial_multiple
        return -(-latent_frames // self.frames_per_token), -(-height // pixels), -(-width // pixels)

    @property
    def _latents(self) -> tuple[int, int]:
        """Latent frames of a stride, and of the offset."""
        return self.latent_frames or (1, 1 if self.frame_offset else 0)

    def _check_limits(self, height: int, width: int, num_frames: int) -> None:
        """Raise ValueError for more tokens along an axis than the model has positions for."""
        given = {"num_frames": num_frames, "height": height, "width": width}
        units = ("token frames", "rows of tokens", "columns of tokens")
        tokens = self._tokens(height, width, num_frames)
        for (name, size), unit, many, most in zip(
            given.items(), units, tokens, self.most_tokens, strict=True
        ):
            if most is not None and many > most:
                raise ValueError(
                    f"{name} is {size}, which is {many} {unit}, but this model has positions for"
                    f" {most} ({self.limited_by}): try at most {self._largest(name, most)}"
                )

    def _largest(self, name: str, most: int) -> int:
        """The largest number of frames or pixels that makes at most `most` tokens."""
        if name == "num_frames":
            latent_frames = most * self.frames_per_token
            of_stride, of_offset = self._latents
            strides = (latent_frames - of_offset) // of_stride
            return strides * self.frame_stride + self.frame_offset
        pixels = most * (self.token_pixels or self.spatial_multiple)
        return pixels // self.spatial_multiple * self.spatial_multiple


def _both_sides(value: int, multiple: int, offset: int) -> str:
    smallest = offset or multiple
    below = max((value - offset) // multiple * multiple + offset, smallest)
    above = below + multiple
    return f"try {smallest}" if value < smallest else f"try {below} or {above}"


Part: TypeAlias = Callable[[TokenGrid], TokenGrid | None]  # of the tokens of a call


@dataclass(frozen=True)
class Family:
    """A row of the table of models: everything particular to a family of denoisers.

    Attributes:
        name: the family's name in configuration files and in the tables of methods.
        title: the family's name for people.
        model_classes: names of the diffusers classes of the denoisers.
        sites: pattern of the names of the modules that do video self-attention. The group `layer`
            of the pattern identifies a block; blocks are numbered in the order of
            `named_modules()`.
        grid: function of a module and the positional and keyword arguments of its forward; gives
            the video tokens of the call. The module is the denoiser, or a module of `grid_modules`.
            The grid may count other tokens and name references among them; a site's call adds the
            tokens that are missing on the side of `text`. Reading the values of tensors waits for
            the device: `position_ids` keeps what it has read.
        sizes: function of a pipeline; gives the legal sizes.
        variants: function of a pipeline, which may be None, and a denoiser; gives the model's name
            in the tables of recommended settings. None if the family's name serves all models.
        text: where text tokens stand in the sequence of a site; None if the sequence has no text.
            The number of text tokens follows from each call.
        beside: for people: tokens beside the grid that are no text, and what becomes of them. "As
            references" are those that `Family.grid` gives as references; others are dense: their
            rows and columns are full. "" without any.
        grid_modules: pattern of the names of the modules inside the denoiser that have a grid of
            their own in each call, for the sites inside them. None if the denoiser's call has one
            grid for all sites.
        parts: for models with sites whose calls have a part of the tokens, as blocks for one kind
            of tokens have: patterns of their names, and functions of the grid of the denoiser's
            call that give the grid of their calls, or None if the denoiser does not call them.
        padding: the format of the model's attention masks. "keys": True for each key that counts.
            "pairs": True for each pair of query and key that both count. "bias": 0 for each key
            that counts. "grid": a rule that the grid has as `causal_frames`.
        rotary: position and name of the argument of a site's call that holds the rotary position
            embedding: cosines and sines for pairs of neighbouring channels, every number twice.
            None if the sites have no such argument.
        queries: for models with calls that have fewer queries than keys, or that are over a part of
            the sequence: function of the video tokens of a forward and the numbers of queries and
            keys of a site's call. The keys are the sequence. The function gives the positions of
            the queries in the sequence, in order. None for a call that is to stay dense. Calls over
            fewer tokens than the forward's video tokens stay dense, too.
        images: whether the models make images, or frames that each attend to themselves alone.
            Some methods recommend other settings for images than for videos.
        flow: where video tokens enter and leave the blocks, to permute them once per forward; None
            if something between the blocks depends on the place of a token.
        tested: the parts that the project's tests run: tiny models, and pipelines that can be built
            offline.
    """

    name: str
    title: str
    model_classes: tuple[str, ...]
    sites: re.Pattern[str]
    grid: Callable[[torch.nn.Module, tuple[Any, ...], Mapping[str, Any]], TokenGrid]
    sizes: Callable[[Any], SizeRules]
    variants: Callable[[Any, torch.nn.Module], str] | None = None
    text: Literal["before", "after"] | None = None
    beside: str = ""
    grid_modules: re.Pattern[str] | None = None
    parts: tuple[tuple[re.Pattern[str], Part], ...] = ()
    padding: Literal["keys", "pairs", "bias", "grid"] = "keys"
    rotary: tuple[int, str] | None = None
    queries: Callable[[TokenGrid, int, int], tuple[slice, ...] | None] | None = None
    images: bool = False
    flow: TokenFlow | None = None
    tested: Literal["model", "model, pipeline"] = "model, pipeline"

    def variant(self, pipe: Any, model: torch.nn.Module) -> str:
        """The model's name in the tables of recommended settings; `pipe` may be None."""
        return self.name if self.variants is None else self.variants(pipe, model)

    def part(self, site: str) -> Part | None:
        """The part of a call's tokens that the site of this name attends over; None for all."""
        return next((part for pattern, part in self.parts if pattern.fullmatch(site)), None)

    def layers(self, model: torch.nn.Module) -> dict[str, int]:
        """The attention sites of a denoiser by name, with the index of each site's block."""
        matches = [self.sites.fullmatch(name) for name, _ in model.named_modules()]
        blocks: dict[str, int] = {}
        return {
            match[0]: blocks.setdefault(match["layer"], len(blocks)) for match in matches if match
        }


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """An argument of a forward call by position or name; None if the call does not have it."""
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


def image_grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of a call on latents (..., height, width), in patches of one size along both."""
    height, width = first_input(args, kwargs).shape[-2:]
    patch = model.config.patch_size
    return TokenGrid(1, height // patch, width // patch)


def last_queries(video: TokenGrid, queries: int, keys: int) -> tuple[slice, ...] | None:
    """The positions of queries that are the last tokens of the sequence, for `Family.queries`.

    None for queries that are not all of the video tokens and those after them.
    """
    fits = _traced() or video.video_tokens + video.text_after <= queries
    return (slice(keys - queries, keys),) if fits and queries < keys else None


def first_queries(video: TokenGrid, queries: int, keys: int) -> tuple[slice, ...] | None:
    """The positions of queries that are the first tokens of the sequence, for `Family.queries`.

    None for queries that are not all of the video tokens and those before them.
    """
    fits = _traced() or video.text_before + video.video_tokens <= queries
    return (slice(0, queries),) if fits and queries < keys else None


def _traced() -> bool:
    # Code that compares with a grid would be compiled again for each grid.
    return torch.compiler.is_dynamo_compiling()


def sizes_in_the_call(reason: str) -> Callable[[Any], SizeRules]:
    """The `sizes` of a family whose grid no size foretells.

    Args:
        reason: what the pipeline does, after its name.
    """

    def refuse(pipe: Any) -> SizeRules:
        raise ValueError(f"{type(pipe).__name__} {reason}: the grid is only known in the call")

    return refuse
