"""MiniMax-H3: text, references, audio and video in one packed sequence; the video stands last."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffattn.grid import Reference, TokenGrid
from diffattn.models.base import Family, SizeRules, argument
from diffattn.models.packed import runs
from diffattn.models.position_ids import Rectangle, rectangles
from diffattn.models.video_clock import frame_at


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of a call: the last video tokens, and the pictures and videos before them.

    Raises:
        ValueError: if the position ids of the last video tokens are not those of one video, or
            tokens that are not video stand after them.
    """
    ids = argument(args, kwargs, 6, "position_ids")
    name = type(model).__name__
    found: list[Rectangle] = []
    of_video = runs(argument(args, kwargs, 7, "video_indices"), f"video_indices of {name}")
    for run in of_video:
        inside = rectangles(
            ids, f"position_ids of {name}", joined=True, start=run.start, stop=run.stop
        )
        found += [replace(part, start=run.start + part.start) for part in inside]
    video = found.pop()
    _check_last(video, last_run=len(of_video[-1]), tokens=len(ids), name=name)
    return TokenGrid(
        video.frames,
        video.height,
        video.width,
        text_before=video.start,
        references=tuple(_reference(rectangle, video.times) for rectangle in found),
    )


def _check_last(video: Rectangle, last_run: int, tokens: int, name: str) -> None:
    if video.stop != tokens:
        raise ValueError(
            f"this call of {name} has {tokens - video.stop} tokens after the last video token of"
            f" its video_indices, but the pipelines put the video last: lay the sequence out as"
            f" they do, or set_attn_processor(None)"
        )
    if last_run > video.tokens == 1:
        raise ValueError(
            f"position_ids of {name} contradict its video_indices: the last {last_run} video tokens"
            f" stand in one run, but their ids make no picture of more than a token. Pass the ids"
            f" of the pipelines' layout, or set_attn_processor(None)"
        )


def _reference(rectangle: Rectangle, clock: tuple[float, ...]) -> Reference:
    """A picture or video before the target.

    Key frames have times of the target, in the same clock. References of their own come before the
    target's first frame in that clock, one after another: their frames count from 0.
    """
    of_target = rectangle.times[0] >= clock[0]
    return Reference(
        rectangle.start,
        rectangle.frames,
        rectangle.height,
        rectangle.width,
        times=tuple(frame_at(time, clock) for time in rectangle.times) if of_target else (),
    )


def _sizes(pipe: Any) -> SizeRules:
    # Of each chunk of frames the VAE keeps some latent frames, and as many frames of the last one.
    chunk, kept = pipe.vae_frames_per_chunk, pipe.vae_latents_per_chunk
    least, most = (round(seconds * pipe.fps) for seconds in (pipe.min_duration, pipe.max_duration))
    return SizeRules(
        spatial_multiple=pipe.canvas_multiple,
        frame_stride=chunk,
        frame_offset=kept,
        latent_frames=(kept, 2),
        frame_bounds=(least + (kept - least) % chunk, most - (most - kept) % chunk),
    )


MINIMAX_H3 = Family(
    name="minimax-h3",
    title="MiniMax-H3",
    beside="audio, dense; key frames, pictures and videos, as references",
    model_classes=("MiniMaxH3Transformer3DModel",),
    # The refiner of the text has blocks of its own.
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    text="before",
)
