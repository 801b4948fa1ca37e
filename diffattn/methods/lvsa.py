"""LVSA: anchor frames and a window of frames, for videos beyond the length of the training.

Long-video sparse attention, arXiv 2605.31057; the public code is LongVideoSparseAttention.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from diffattn._checks import FLAG, Allowed, check_fields, count, is_whole, number
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask
from diffattn.masks.frame_pairs import FramePairsMask
from diffattn.masks.neighbourhood import block_size_for
from diffattn.methods.base import StaticMaskMethod
from diffattn.schedule import Counting

# Latent frames of the length that a model was trained on.
_TRAINED = {
    "wan2.1": 21,
    "wan2.2": 21,
    "wan2.2-5b": 31,
    "hunyuanvideo": 33,
    "hunyuanvideo-1.5": 33,
    "cogvideox": 13,
}
_FIXED_PERIOD = 4  # of the public code, where no trained length is given

_ALLOWED = {
    "window": count(0),
    "first_frames": count(0),
    "period": Allowed(
        "an integer of at least 0, or 'auto'",
        lambda value: value == "auto" if isinstance(value, str) else is_whole(value) and value >= 0,
    ),
    "trained_frames": count(1),
    "sparsity_scale": number(above=0),
    "expand": FLAG,
    "phase": count(0),
}


@dataclass(frozen=True, kw_only=True)
class LVSAAttn(StaticMaskMethod):
    """Long-video sparse attention (arXiv 2605.31057), for videos beyond the trained length.

    A token sees the anchor frames, which are the same for all, and a window of frames around its
    own. Anchors are the first frames and a periodic grid of frames. The automatic period lets a
    token see about as many frames as the model was trained on, so that videos up to this length
    are dense. No training is needed. All numbers of frames are of latent frames.

    With `phase="rotate"`, as in the paper, the grid of anchors moves on by one frame with each
    denoising step, and begins anew with each run. There are as many masks as the period has frames.

    Attributes:
        window: frames that a token sees to either side. Windows are moved inwards at the ends of
            the video. With 0 there is no window, and frames that are no anchors do not see
            themselves.
        first_frames: frames at the start of the video that are anchors.
        period: distance of the periodic anchors; 0 for none; "auto" for the longest period that
            keeps the trained number of frames visible. None is "auto" where the trained length is
            known, and else 4, the public code's fixed period.
        trained_frames: frames of the videos that the model was trained on. None takes the length of
            the model family.
        sparsity_scale: factor of `trained_frames` for the automatic period; below 1 is sparser.
        expand: whether windows are widened until they hold as many frames beside the anchors as
            they have frames.
        phase: frames that the periodic anchors are moved by, taken modulo the period; "rotate" for
            the number of the step. Outside of a run "rotate" is 0.

    Raises:
        ValueError: for a parameter out of range. `mask` refuses `period="auto"` without
            `trained_frames`.
    """

    type: ClassVar[str] = "lvsa"
    paper: ClassVar[str] = "arXiv 2605.31057"
    by_place: ClassVar[bool] = True

    window: int = field(default=3, metadata={"help": "latent frames seen to either side"})
    first_frames: int = field(default=1, metadata={"help": "first latent frames that all see"})
    period: int | str | None = field(
        default=None, metadata={"help": "distance of the anchor frames (0 for none), or auto"}
    )
    trained_frames: int | None = field(
        default=None, metadata={"help": "latent frames that the model was trained on"}
    )
    sparsity_scale: float = field(
        default=1.0, metadata={"help": "factor of trained_frames; below 1 is sparser"}
    )
    expand: bool = field(default=True, metadata={"help": "widen windows by the anchors in them"})
    phase: int = field(
        default=0, metadata={"help": "frames that the anchors are moved by, or rotate"}
    )

    def __post_init__(self) -> None:
        phase: object = self.phase
        if phase == "rotate":
            object.__setattr__(self, "phase", Counting())
        super().__post_init__()
        check_fields(self, _ALLOWED)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the trained length of a model family, and all layers and steps sparse.

        On a grid, phases that move the anchors alike become one.
        """
        trained = _TRAINED.get(family) if self.trained_frames is None else self.trained_frames
        automatic: int | str = _FIXED_PERIOD if trained is None else "auto"
        settled = replace(
            self,
            trained_frames=trained,
            period=automatic if self.period is None else self.period,
            dense_layers=0 if self.dense_layers is None else self.dense_layers,
            dense_steps=0 if self.dense_steps is None else self.dense_steps,
        )
        knows_period = is_whole(settled.period) or settled.trained_frames is not None
        if grid is None or not self.phase or not knows_period:
            return settled
        period = settled.period_on(grid.frames)
        return replace(settled, phase=self.phase % period if period else 0)

    def period_on(self, frames: int) -> int:
        """The period of the anchors among `frames` latent frames; 0 for none.

        Raises:
            ValueError: if the period is automatic, and the trained length is not known.
        """
        automatic: int | str = _FIXED_PERIOD if self.trained_frames is None else "auto"
        period = automatic if self.period is None else self.period
        if is_whole(period):
            return period
        if self.trained_frames is None:
            raise ValueError(
                "period is 'auto', but the length that the model was trained on is not known:"
                " give trained_frames, in latent frames, or a period"
            )
        budget = max(self.first_frames + 1, int(self.trained_frames * self.sparsity_scale))
        if frames <= budget:
            return 1
        width = 2 * self.window + 1
        needed = max(self.first_frames, budget - min(width, frames))
        first = set(range(min(self.first_frames, frames)))
        periods = range(frames, 0, -1)
        longest = next((r for r in periods if len(first | {*range(0, frames, r)}) >= needed), 1)
        # Just beyond the trained length the longest period would be 1: dense.
        beside = budget - (2 * self.window + self.first_frames)
        wanted = max(frames - budget + beside, beside)
        return max(longest, -(-wanted // max(beside, 1)))

    def anchors(self, frames: int) -> tuple[int, ...]:
        """The indices of the anchors among `frames` latent frames, ascending."""
        out = set(range(min(self.first_frames, frames)))
        period = self.period_on(frames)
        if period:
            offset = self.phase % period
            out |= {(offset + i * period) % frames for i in range(-(-frames // period))}
        return tuple(sorted(out))

    def relation(self, frames: int) -> torch.Tensor:
        """bool `(frames, frames)`: whether a frame sees another."""
        anchors = self.anchors(frames)
        out = torch.zeros(frames, frames, dtype=torch.bool)
        out[:, list(anchors)] = True
        if self.window:
            for frame in range(frames):
                first, last = self._window_of(frame, frames, frozenset(anchors))
                out[frame, first : last + 1] = True
        return out

    def _window_of(self, frame: int, frames: int, anchors: frozenset[int]) -> tuple[int, int]:
        """The first and the last frame of the window of a frame."""
        reach = self.window
        first = max(0, min(frame - reach, frames - 1 - 2 * reach))
        last = min(frames - 1, max(frame + reach, 2 * reach))
        if not self.expand:
            return first, last
        missing = min(2 * reach + 1, frames - len(anchors))
        missing -= sum(f not in anchors for f in range(first, last + 1))
        # By turns, the left first.
        while missing > 0 and (first > 0 or last < frames - 1):
            if first > 0:
                first -= 1
                missing -= first not in anchors
            if missing > 0 and last < frames - 1:
                last += 1
                missing -= last not in anchors
        return first, last

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        """The token pairs that attend among the video tokens.

        Parameters left at None take the values for a model of unknown length. Attached to a
        pipeline, the method has the values for the pipeline's model instead.
        """
        return FramePairsMask(grid, self.relation(grid.frames))

    def block_size_on(self, grid: TokenGrid) -> int:
        return block_size_for(grid)
