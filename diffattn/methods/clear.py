"""CLEAR: image tokens see those within a circle around them, and all text.

Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
arXiv 2412.16112. The paper is about images; the windows for video are what it becomes there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from diffattn.grid import TokenGrid
from diffattn.mask import BLOCK, AttentionMask
from diffattn.methods.base import StaticMaskMethod, check_choice, check_count
from diffattn.methods.disk import DiskMask, best_tile, disk_limits
from diffattn.orders import TileOrder

# Of the radii with published weights (8, 16, 32) the smallest that does not repeat patterns in
# pictures without pooled keys.
_RADIUS = 16
_FRAME_RADIUS = 8
_IMAGE_TILE = (1, 8, 16)


@dataclass(frozen=True, kw_only=True)
class CLEARAttn(StaticMaskMethod):
    """CLEAR (arXiv 2412.16112).

    An image token sees the image tokens whose distance in the plane is less than `radius`, at the
    border as many as there are; text sees everything and is seen by everything. Weights that were
    fine-tuned for this are published for FLUX.1-dev. Without them pictures lose quality, the less
    the larger the radius.

    In a video the circle becomes an ellipsoid or a cylinder in time. The paper has neither, and
    there are no weights for them.

    Attributes:
        radius: tokens in the plane; those at exactly this distance are not seen. 1 is the token
            alone. A Flux token is 16 pixels.
        window: what the circle is in a video: "ellipsoid", smaller in frames further away, or
            "cylinder", the same in all frames within `frame_radius`.
        frame_radius: latent frames; those at exactly this distance are not seen. The number of
            latent frames, or more, with "cylinder" is all of the video.
        first_frame: in a video, every token sees all of the first latent frame, which sees all of
            the video: there is the picture that image-to-video starts from.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "clear"
    paper: ClassVar[str] = "arXiv 2412.16112"

    radius: int | None = field(
        default=None, metadata={"help": "tokens in the plane, those at this distance left out"}
    )
    window: str | None = field(
        default=None, metadata={"help": "ellipsoid or cylinder: what the circle is in a video"}
    )
    frame_radius: int | None = field(
        default=None, metadata={"help": "latent frames, those at this distance left out"}
    )
    first_frame: bool | None = field(
        default=None, metadata={"help": "the first frame of a video sees all and is seen by all"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("radius", "frame_radius"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), at_least=1)
        if self.window is not None:
            check_choice("window", self.window, ("ellipsoid", "cylinder"))
        if self.first_frame is not None:
            check_flag("first_frame", self.first_frame)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with every None replaced; the same for all models.

        All layers and steps are sparse, as in the paper, whose weights are fine-tuned for that.
        """
        return replace(
            self,
            radius=self.radius or _RADIUS,
            window=self.window or "ellipsoid",
            frame_radius=self.frame_radius or _FRAME_RADIUS,
            first_frame=True if self.first_frame is None else self.first_frame,
            dense_layers=self.dense_layers or 0,
            dense_steps=self.dense_steps or 0,
        )

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        # The one frame of an image is no first frame: it would see all of itself.
        first_frame = grid.frames > 1 and bool(self.for_model("", grid).first_frame)
        return DiskMask(grid, self._limits(grid), first_frame)

    def order_on(self, grid: TokenGrid) -> TileOrder:
        """Tiles of one block: 8 x 16 tokens of an image, what suits the window in a video."""
        if grid.frames == 1:
            return TileOrder(grid, _IMAGE_TILE)
        return TileOrder(grid, best_tile(grid, self._limits(grid), BLOCK))

    def _limits(self, grid: TokenGrid) -> torch.Tensor:
        method = self.for_model("", grid)
        assert method.radius is not None
        assert method.frame_radius is not None
        assert method.window is not None
        return disk_limits(grid, method.radius, method.frame_radius, method.window)


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, but must be true or false")
