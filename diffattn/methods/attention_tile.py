"""Attention tile: a frame sees itself and some frames that all frames see.

Ding et al., "Efficient-vDiT: Efficient Video Diffusion Transformers with Attention Tile",
arXiv 2502.06155.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from diffattn._checks import Allowed, check_fields, is_whole
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask
from diffattn.masks.frame_pairs import FramePairsMask
from diffattn.masks.neighbourhood import block_size_for
from diffattn.methods.base import StaticMaskMethod
from diffattn.spans import Span

# The paper's densest masks, 4 of 8 and 12 of 24 frames: 1.25 and 1.32 times as fast as dense.
_SHARE = 0.5

_ALLOWED = {
    "global_frames": Allowed(
        "an integer of at least 1, or a fraction of the frames above 0.0 and up to 1.0",
        lambda value: (
            0 < value <= 1 if isinstance(value, float) else is_whole(value) and value >= 1
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class AttentionTileAttn(StaticMaskMethod):
    """The attention tile of Efficient-vDiT (arXiv 2502.06155), for videos.

    A token sees its own frame, and some global frames that are spread evenly over the video from
    its first frame. The tokens of global frames see, and are seen by, all tokens. The cost grows
    linearly with the length of the video if the number of global frames is the same. A picture has
    one frame, and is dense.

    The paper looks for a mask for each layer (`calibrate_attention_tile`), and then trains the
    model for its masks, by distillation. Nothing is published about models that were not trained.

    Attributes:
        global_frames: latent frames that see and are seen by all: a count, or a fraction of the
            frames of the video (a float up to 1.0). The paper's masks "k : m" have a count of k.
            The frames stand ceil(frames / count) apart, from frame 0, so that there may be fewer:
            4 of 9 are the frames 0, 3 and 6. None is half of the frames. A reference has global
            frames of its own by the same rule.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "attention-tile"
    paper: ClassVar[str] = "arXiv 2502.06155"
    by_place: ClassVar[bool] = True

    global_frames: int | float | None = field(
        default=None,
        metadata={"help": "frames that see and are seen by all (count or fraction)"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _ALLOWED)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the paper's mildest mask, in which every second frame is global.

        All layers and steps are sparse, as in the paper. Family and grid have no influence.
        """
        return replace(
            self,
            global_frames=_SHARE if self.global_frames is None else self.global_frames,
            dense_layers=0 if self.dense_layers is None else self.dense_layers,
            dense_steps=0 if self.dense_steps is None else self.dense_steps,
        )

    def global_frames_of(self, frames: int) -> tuple[int, ...]:
        """The indices of the global frames among `frames` latent frames."""
        wanted = _SHARE if self.global_frames is None else self.global_frames
        count = max(1, int(wanted * frames + 0.5)) if isinstance(wanted, float) else wanted
        return tuple(range(0, frames, -(-frames // count)))

    def frame_pairs(self, frames: int) -> int:
        """The number of pairs of frames that see each other in a video of `frames` frames."""
        others = frames - len(self.global_frames_of(frames))
        return frames**2 - others**2 + others

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        """The token pairs that attend among the video tokens."""
        own = torch.eye(grid.frames, dtype=torch.bool)
        return FramePairsMask(grid, self._with_global_frames(own))

    def mask_between(self, query: Span, key: Span) -> AttentionMask | None:
        """Frames of equal times see each other, and global frames of both see all.

        None where this is every pair, as with a reference of one frame.
        """
        relation = self._with_global_frames(query.distances(key) == 0)
        if relation.all():
            return None
        return FramePairsMask(query.grid, relation, key.grid)

    def _with_global_frames(self, relation: torch.Tensor) -> torch.Tensor:
        frames_q, frames_kv = relation.shape
        out = relation.clone()
        out[list(self.global_frames_of(frames_q))] = True
        out[:, list(self.global_frames_of(frames_kv))] = True
        return out

    def block_size_on(self, grid: TokenGrid) -> int:
        return block_size_for(grid)

    def caution(self, grid: TokenGrid) -> str | None:
        if self.is_full_on(grid):
            return None
        return "the paper trains models for these masks; the quality without training is not known"

    def is_full_on(self, grid: TokenGrid) -> bool:
        """Whether every video token of `grid` sees all other video tokens."""
        return self.frame_pairs(grid.frames) == grid.frames**2
