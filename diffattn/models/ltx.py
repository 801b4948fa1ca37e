"""LTX-Video and the video half of LTX-2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from diffattn.grid import Reference, TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input
from diffattn.models.position_ids import Rectangle, rectangles
from diffattn.models.token_flow import TokenFlow
from diffattn.models.video_clock import frame_at

# Seconds, or another unit of coordinates, in which frames do not differ.
_MOMENT = 1e-4


@dataclass(frozen=True)
class _Places:
    """The arguments of a forward that say where tokens are.

    Attributes:
        sizes: position of `num_frames`; `height` and `width` follow.
        coords: position of `video_coords`.
        bounded: whether `video_coords` are the bounds of each token, (batch, 3, tokens, 2), and not
            a point, (batch, 3, tokens).
    """

    sizes: int
    coords: int
    bounded: bool


def _grid(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], places: _Places
) -> TokenGrid:
    """The grid of a call on a sequence of tokens.

    Numbers of frames, rows and columns that make all tokens decide. Otherwise the coordinates have
    the video and its references: conditions, key frames, reference videos.

    Raises:
        ValueError: if the call has no such numbers, or the coordinates contradict them or the
            number of tokens.
    """
    names = ("num_frames", "height", "width")
    sizes = [argument(args, kwargs, places.sizes + i, name) for i, name in enumerate(names)]
    tokens = first_input(args, kwargs).shape[1]
    video = None
    # One pipeline for long videos says 1, 1, 1 beside coordinates of many tokens.
    if None not in sizes and (sizes != [1, 1, 1] or tokens == 1):
        patches = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
        video = TokenGrid(*(size // patch for size, patch in zip(sizes, patches, strict=True)))
        if video.tokens == tokens:
            return video
    coords = argument(args, kwargs, places.coords, "video_coords")
    name = type(model).__name__
    if coords is None:
        found = f"make {video} = {video.tokens}" if video else "are missing or 1"
        raise ValueError(
            f"this call of {name} has {tokens} tokens, but num_frames, height and width {found},"
            f" and no video_coords say where the tokens are: pass the sizes of the latents, or"
            f" video_coords, or set_attn_processor(None)"
        )
    videos = _bounded_videos(coords, name) if places.bounded else _videos(coords, name)
    if videos[-1].stop != tokens:
        raise ValueError(
            f"this call of {name} has {tokens} tokens in hidden_states, but video_coords of"
            f" {videos[-1].stop}: pass coordinates of each token"
        )
    target = _target(videos, video, name)
    return TokenGrid(
        target.frames,
        target.height,
        target.width,
        text_before=target.start,
        text_after=tokens - target.stop,
        references=tuple(_reference(other, target) for other in videos if other is not target),
    )


def _target(videos: Sequence[Rectangle], size: TokenGrid | None, name: str) -> Rectangle:
    """The video that is denoised: the first of the largest that start at time 0.

    Args:
        size: the size of the video, from the other arguments of the call; None if they have none.

    Raises:
        ValueError: if no video of that size starts at time 0.
    """
    fitting = [video for video in videos if abs(video.times[0]) < _MOMENT]
    if size is not None:
        sides = (size.frames, size.height, size.width)
        fitting = [v for v in fitting if (v.frames, v.height, v.width) == sides]
    if not fitting:
        seen = ", ".join(f"{v.frames}x{v.height}x{v.width} from {v.times[0]:g} on" for v in videos)
        wanted = f"a video of {size}, as num_frames, height and width say," if size else "a video"
        raise ValueError(
            f"video_coords of {name} do not place {wanted} from time 0 on, but {seen}: pass the"
            f" coordinates of the pipelines, or set_attn_processor(None)"
        )
    return max(fitting, key=lambda video: video.tokens)


def _reference(other: Rectangle, target: Rectangle) -> Reference:
    return Reference(
        other.start,
        other.frames,
        other.height,
        other.width,
        aligned=(other.origin, other.step) == (target.origin, target.step),
        times=tuple(frame_at(time, target.times) for time in other.times),
    )


def _videos(coords: torch.Tensor, name: str) -> tuple[Rectangle, ...]:
    """The videos of coordinates (batch, 3, tokens), whose frames follow one another in time."""
    return rectangles(coords, f"video_coords of {name}", joined=True, of_tokens=_points)


def _bounded_videos(coords: torch.Tensor, name: str) -> tuple[Rectangle, ...]:
    """The videos of coordinates (batch, 3, tokens, 2), whose frames begin where others end.

    A key frame is a frame of its own: it lies inside a latent frame of the video.
    """
    label = f"video_coords of {name}"
    frames = rectangles(coords, label, joined=False, of_tokens=_firsts)
    ends = rectangles(coords, label, joined=False, of_tokens=_ends)
    out: list[Rectangle] = []
    open_end = math.inf
    for frame, end in zip(frames, ends, strict=True):
        if abs(frame.times[0] - open_end) < _MOMENT and _same_picture(out[-1], frame):
            longer = (*out[-1].times, *frame.times)
            out[-1] = replace(out[-1], frames=len(longer), times=longer)
        else:
            out.append(frame)
        open_end = end.times[0]
    return tuple(out)


def _same_picture(a: Rectangle, b: Rectangle) -> bool:
    return (a.height, a.width, a.origin, a.step) == (b.height, b.width, b.origin, b.step)


def _points(coords: torch.Tensor) -> torch.Tensor:
    return coords[0].T


def _firsts(coords: torch.Tensor) -> torch.Tensor:
    return _bounds(coords, 0)


def _ends(coords: torch.Tensor) -> torch.Tensor:
    return _bounds(coords, 1)


def _bounds(coords: torch.Tensor, bound: int) -> torch.Tensor:
    """Time, row, column and height of each token of the first sample, with a bound of its time."""
    time, row, column = coords[0]  # (tokens, 2) each
    # Tokens of one picture are of one height. References may have larger ones.
    height = (row[:, 1] - row[:, 0]).round()
    return torch.stack([time[:, bound], row.mean(1), column.mean(1), height], dim=1)


def _grid_without_strengths(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> TokenGrid:
    """The grid of a call of LTX-2.

    Raises:
        ValueError: also if the call weakens attention between tokens of the video.
    """
    if argument(args, kwargs, 22, "video_self_attention_mask") is not None:
        raise ValueError(
            f"this call of {type(model).__name__} has a video_self_attention_mask, which weakens"
            f" each pair of tokens by a number of its own: sparse attention keeps a pair or leaves"
            f" it out. Pass conditioning_attention_strength=1 and no conditioning_attention_mask,"
            f" or set_attn_processor(None)"
        )
    return _grid(model, args, kwargs, _Places(sizes=10, coords=15, bounded=True))


def _sizes(pipe: Any) -> SizeRules:
    config = pipe.transformer.config
    return SizeRules(
        spatial_multiple=pipe.vae_spatial_compression_ratio * config.patch_size,
        frame_stride=pipe.vae_temporal_compression_ratio * config.patch_size_t,
        frame_offset=1,
    )


LTX = Family(
    name="ltx",
    title="LTX-Video",
    beside="conditions, as references",
    model_classes=("LTXVideoTransformer3DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=partial(_grid, places=_Places(sizes=4, coords=8, bounded=False)),
    sizes=_sizes,
    flow=TokenFlow(
        model_class="LTXVideoTransformer3DModel",
        # Image to video has a timestep per token.
        arguments=((0, "hidden_states", 1), (2, "timestep", 1)),
        outputs={"rope": 1},
    ),
)

LTX2 = Family(
    name="ltx-2",
    title="LTX-2",
    beside="key frames and reference videos, as references; audio apart, dense",
    model_classes=("LTX2VideoTransformer3DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=_grid_without_strengths,
    sizes=_sizes,
)
