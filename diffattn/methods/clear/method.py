"""CLEAR: an image token sees the image tokens within a circle around it, and all text.

Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
arXiv 2412.16112. The paper is about images; the windows for video are this project's extension.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch

from diffattn._checks import FLAG, check_fields, choice, count, number
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.interception import through_modes
from diffattn.masks.base import BLOCK, AttentionMask
from diffattn.methods.base import AttachedSites, Compiled, Site, SiteWeights, StaticMaskMethod
from diffattn.methods.clear.cells import CellWeights, cells, mean_weight, pooled
from diffattn.methods.clear.disk import DiskMask, best_tile, disk_limits
from diffattn.operator import add_keys, attention, every_pair
from diffattn.orders import TileOrder
from diffattn.spans import Span

# Published weights exist for the radii 8, 16 and 32. 16 is the smallest of these radii without
# repeated patterns in pictures that are made without pooled keys.
_RADIUS = 16
_FRAME_RADIUS = 8
_IMAGE_TILE = (1, 8, 16)
_TRAINED_TOKENS = 64 * 64 + 512  # Flux: 1024 x 1024 pixels, and the text
_STRAY_FACTOR = 10


@dataclass(frozen=True)
class _Settled:
    """The window's parameters with every None replaced; the same for all models."""

    radius: int
    window: str
    frame_radius: int
    first_frame: bool


_ALLOWED = {
    "radius": count(1),
    "frame_radius": count(1),
    "window": choice(("ellipsoid", "cylinder")),
    "first_frame": FLAG,
    "down_factor": count(1),
    "trained_tokens": count(2),
    "proportional_attention": FLAG,
    "reference_scale": FLAG,
    "ntk_factor": number(at_least=1),
}


@dataclass(frozen=True, kw_only=True)
class CLEARAttn(StaticMaskMethod):
    """CLEAR (arXiv 2412.16112).

    An image token sees the image tokens at a distance of less than `radius` in the plane. The
    circle is cut at the border of the image. Text sees everything, and everything sees text.
    Weights that were fine-tuned for CLEAR are published for FLUX.1-dev. Without these weights
    pictures lose quality; a larger radius loses less.

    In a video the circle becomes an ellipsoid or a cylinder in time. The paper has neither window,
    and no weights for them exist.

    Attributes:
        radius: distance in the plane, in tokens, from which on tokens are not seen. With 1 a token
            sees itself alone. A Flux token is 16 pixels wide.
        window: the shape in a video: "ellipsoid", a circle that shrinks with the distance in time,
            or "cylinder", the same circle in all frames within `frame_radius`.
        frame_radius: distance in latent frames from which on frames are not seen. With "cylinder",
            the number of latent frames covers the whole video.
        first_frame: in a video, every token sees the whole first latent frame, and the first frame
            sees the whole video: image-to-video starts from the picture in that frame.
        down_factor: side, in tokens, of the cells whose pooled keys every image or video token sees
            in the same softmax; 1 for no pooled keys. The weights of the sums over a cell are
            trained in each layer, and are a mean before. `diffattn.plan` counts pooled keys, the
            mask and its density do not. Pooled keys make attention quadratic again, at a cost of
            1 / down_factor^2 of dense attention.
        proportional_attention: sharpen attention for more tokens than the model was trained on, by
            sqrt(ln(tokens) / ln(trained_tokens)). The tokens include text, but no pooled keys.
        trained_tokens: tokens, text included, of the size that the model was trained on.
        reference_scale: with `down_factor`, multiply the tokens in this formula by ten, as the
            public code does without giving a reason.
        ntk_factor: factor of the base of Flux's rotary position embedding, for sizes beyond the
            trained size; 10 in the public code. The factor changes the whole model.

    Raises:
        ValueError: for a parameter out of range, or a parameter without effect beside the others.
    """

    type: ClassVar[str] = "clear"
    paper: ClassVar[str] = "arXiv 2412.16112"
    by_place: ClassVar[bool] = True
    same_in_every_step: ClassVar[frozenset[str]] = frozenset(("down_factor", "ntk_factor"))

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
    down_factor: int = field(
        default=1, metadata={"help": "side of the cells of pooled keys; 1 for no pooled keys"}
    )
    proportional_attention: bool = field(
        default=False, metadata={"help": "sharpen attention for more tokens than trained on"}
    )
    trained_tokens: int = field(
        default=_TRAINED_TOKENS, metadata={"help": "tokens that the model was trained on"}
    )
    reference_scale: bool = field(
        default=False, metadata={"help": "the public code's scale for down_factor"}
    )
    ntk_factor: float = field(
        default=1.0, metadata={"help": "factor of the rotary embedding's base (Flux)"}
    )
    _every_pair: dict[tuple[int, int, torch.device], BlockLayout] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _ALLOWED)
        if self.reference_scale and (self.down_factor == 1 or not self.proportional_attention):
            raise ValueError(
                "reference_scale is True, but the public code's scale differs only with"
                " proportional_attention=True and a down_factor above 1; leave it out"
            )

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with every None replaced; the values are the same for all models.

        All layers and steps are sparse, as in the fine-tuning of the paper's weights.
        """
        return replace(
            self,
            **asdict(self._settled()),
            dense_layers=self.dense_layers or 0,
            dense_steps=self.dense_steps or 0,
        )

    def _settled(self) -> _Settled:
        return _Settled(
            radius=self.radius or _RADIUS,
            window=self.window or "ellipsoid",
            frame_radius=self.frame_radius or _FRAME_RADIUS,
            first_frame=True if self.first_frame is None else self.first_frame,
        )

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        # `first_frame` does not apply to an image: every token would see the whole image.
        first_frame = grid.frames > 1 and self._settled().first_frame
        return DiskMask(grid, self._limits(grid, grid.frames), first_frame)

    def mask_between(self, query: Span, key: Span) -> AttentionMask:
        """The circle around a token's place in another grid, by the distance of frames in time.

        Between two videos `first_frame` holds for the first frame of each.
        """
        distances = query.distances(key)
        first_frame = min(distances.shape) > 1 and self._settled().first_frame
        limits = self._limits(query.grid, int(distances.max()) + 1)
        return DiskMask(query.grid, limits, first_frame, key.grid, distances)

    def order_on(self, grid: TokenGrid) -> TileOrder:
        """Tiles of one block: 8 x 16 tokens in an image, the result of `best_tile` in a video."""
        if grid.frames == 1:
            return TileOrder(grid, _IMAGE_TILE)
        return TileOrder(grid, best_tile(grid, self._limits(grid, grid.frames), BLOCK))

    @property
    def is_mask_alone(self) -> bool:
        return self.down_factor == 1

    @property
    def changes_the_model(self) -> bool:
        return not self.is_mask_alone or self.ntk_factor != 1

    def extra_keys(self, grid: TokenGrid) -> int:
        return 0 if self.down_factor == 1 else cells(grid, self.down_factor)

    def score_scale(self, grid: TokenGrid, head_dim: int, scale: float | None) -> float | None:
        if not self.proportional_attention:
            return scale
        tokens = grid.tokens * (_STRAY_FACTOR if self.reference_scale else 1)
        sharper = math.sqrt(math.log(tokens) / math.log(self.trained_tokens))
        return sharper * (head_dim**-0.5 if scale is None else scale)

    def site_weights(self, module: torch.nn.Module, joint: bool) -> SiteWeights | None:
        return None if self.down_factor == 1 else CellWeights(self.down_factor, module)

    def caution(self, grid: TokenGrid) -> str:
        return "without fine-tuned weights pictures lose quality"

    def compiled_as(self, family: str) -> Compiled:
        # An operator of a whole group of blocks does not know the weights of one block.
        return "outside"

    def check_family(self, family: str) -> None:
        if self.ntk_factor != 1 and family not in ("", "flux"):
            raise ValueError(
                f"ntk_factor is {self.ntk_factor}, but models of the family {family} do not have"
                f" the rotary position embedding of Flux that it is for; leave it out"
            )

    def adaptation(self, model: torch.nn.Module) -> RopeBase | None:
        if self.ntk_factor == 1:
            return None
        embedding: Any = getattr(model, "pos_embed", None)
        if type(embedding).__name__ != "FluxPosEmbed":
            raise ValueError(
                f"ntk_factor is {self.ntk_factor}, but {type(model).__name__} does not have the"
                f" rotary position embedding of Flux that it is for; leave it out"
            )
        return RopeBase(embedding, embedding.theta, self.ntk_factor)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        *,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        from diffattn.kernels.outside_graphs import call_outside  # which imports Dynamo

        # The content of a layout depends on the mask and cannot be traced.
        outside = partial(call_outside, self._attend_with_cells)
        attend = super().attend if self.is_mask_alone else outside
        with_rest = partial(attend, site=site, scale=scale, key_mask=key_mask)
        return through_modes(with_rest, query, key, value)

    def _attend_with_cells(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        *,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        grid, video = site.grid, site.grid.video
        scale = self.score_scale(grid, query.shape[-1], scale)
        order = self.order(grid)
        layout = self.layout(grid, query.device, order)
        out, lse = attention(
            query,
            key,
            value,
            layout,
            order=order,
            scale=scale,
            key_mask=key_mask,
            return_lse=True,
        )
        weights: Any = site.weights
        weight = mean_weight(self.down_factor) if weights is None else weights.spatial_weight
        key, value = pooled(key, grid, weight), pooled(value, grid, weight)
        if not key.shape[1]:
            return out
        sizes = grid.video_tokens, key.shape[1], query.device
        if sizes not in self._every_pair:
            self._every_pair[sizes] = every_pair(*sizes)
        seen = add_keys(
            out[:, video],
            lse[:, :, video],
            query[:, video],
            key,
            value,
            self._every_pair[sizes],
            scale,
        )
        return torch.cat([out[:, : video.start], seen, out[:, video.stop :]], 1)

    def _limits(self, grid: TokenGrid, frames: int) -> torch.Tensor:
        settled = self._settled()
        return disk_limits(grid, frames, settled.radius, settled.frame_radius, settled.window)


@dataclass(frozen=True)
class RopeBase:
    """The adaptation that multiplies the base of a rotary position embedding by a factor.

    Attributes:
        embedding: the model's embedding, with its base in `theta`.
        theta: the base before.
        factor: the factor.
    """

    embedding: Any
    theta: float
    factor: float

    def apply(self, sites: AttachedSites) -> None:
        self.embedding.theta = self.theta * self.factor

    def undo(self) -> None:
        self.embedding.theta = self.theta

    def __str__(self) -> str:
        return f"ntk_factor={self.factor}"
