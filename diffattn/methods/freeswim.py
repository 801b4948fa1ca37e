"""FreeSwim's window: in every frame a token sees an area as large as the trained resolution.

Wu et al., "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free
Ultra-High-Resolution Video Generation", arXiv 2511.14712.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

from diffattn._checks import FLAG, check, count, lists_to_tuples
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask
from diffattn.masks.neighbourhood import AxisWindow, NeighbourhoodMask, block_size_for
from diffattn.methods.base import StaticMaskMethod
from diffattn.orders import TileOrder
from diffattn.spans import Span

# Rows and columns of tokens at the resolution that a model was trained on. The entry of Wan 2.1 is
# for the paper's 1.3B at 480 x 832 pixels; the 14B has (45, 80).
_NATIVE = {
    "wan2.1": (30, 52),
    "wan2.2": (45, 80),
    "wan2.2-5b": (22, 40),
    "skyreels-v2": (45, 80),
    "hunyuanvideo": (45, 80),
    "cogvideox": (30, 45),
    "mochi": (30, 53),
    "ltx": (16, 22),
    "allegro": (45, 80),
    "flux": (64, 64),
    "sd3": (64, 64),
}
_ANY_FAMILY = (30, 52)


@dataclass(frozen=True)
class _Settled:
    """`native` and `radius` after a model family has settled them: rows and columns each."""

    native: tuple[int, int]
    radius: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class FreeSwimAttn(StaticMaskMethod):
    """The inward sliding window of FreeSwim (arXiv 2511.14712), for sizes beyond the native one.

    A token sees the tokens of all frames that are at most `radius` rows and columns away. At the
    borders the window is moved inwards and not cut: every token sees equally many tokens. A window
    longer than an axis of the grid covers the axis. On grids up to the native resolution every
    token therefore sees all tokens, and only the temperature changes attention.

    Attributes:
        native: rows and columns of tokens at the resolution that the model was trained on. None
            takes the size of the model family.
        radius: rows and columns to either side, or one number for both. None takes half of
            `native`: the 30 x 52 tokens of Wan 2.1 at 480 x 832 pixels give a window of 31 x 53.
        temperature: sharpen attention by sqrt(log(2n) / log(n)), where n is the native tokens of a
            frame, as the public code does at every target size (1.046 for Wan 2.1). False keeps the
            model's own scale.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "freeswim"
    paper: ClassVar[str] = "arXiv 2511.14712"
    by_place: ClassVar[bool] = True

    native: tuple[int, int] | None = field(
        default=None, metadata={"help": "rows,columns of tokens that the model was trained on"}
    )
    radius: int | tuple[int, int] | None = field(
        default=None, metadata={"help": "rows,columns seen to either side (default: native / 2)"}
    )
    temperature: bool = field(
        default=True, metadata={"help": "sharpen attention as the public code does"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lists_to_tuples(self, "native", "radius")
        if self.native is not None:
            if not isinstance(self.native, tuple):
                raise ValueError(
                    f"native is {self.native!r}, but must be two integers of at least 1: rows and"
                    f" columns of tokens"
                )
            _check_pair("native", self.native, at_least=1)
            if self.native == (1, 1):
                raise ValueError("native is (1, 1), but must be more than one token")
        if isinstance(self.radius, tuple):
            _check_pair("radius", self.radius, at_least=0)
        elif self.radius is not None:
            check("radius", self.radius, count(0))
        check("temperature", self.temperature, FLAG)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the native size of a model family and the window for this size.

        A family without a known size takes the size of Wan 2.1, the paper's model. All layers and
        steps are sparse. The grid has no influence.
        """
        return replace(
            self,
            **asdict(self._settled(family)),
            dense_layers=0 if self.dense_layers is None else self.dense_layers,
            dense_steps=0 if self.dense_steps is None else self.dense_steps,
        )

    def _settled(self, family: str) -> _Settled:
        native = self.native or _NATIVE.get(family, _ANY_FAMILY)
        radius = (native[0] // 2, native[1] // 2) if self.radius is None else self.radius
        return _Settled(native, (radius, radius) if isinstance(radius, int) else radius)

    def axes(self, grid: TokenGrid) -> tuple[AxisWindow, AxisWindow, AxisWindow]:
        """The windows along the frames, the height and the width of `grid`."""
        radius = self._settled("").radius
        rows, columns = (
            AxisWindow(size, min(2 * reach + 1, size))
            for size, reach in zip((grid.height, grid.width), radius, strict=True)
        )
        return AxisWindow(grid.frames, grid.frames), rows, columns

    def is_full_on(self, grid: TokenGrid) -> bool:
        """Whether every video token of `grid` sees all other video tokens."""
        return all(axis.window == axis.size for axis in self.axes(grid))

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        """The token pairs that attend among the video tokens.

        Parameters left at None take the values for a family without a known native size. Attached
        to a pipeline, the method has the values for the pipeline's model instead.
        """
        return NeighbourhoodMask(grid, self.axes(grid))

    def mask_between(self, query: Span, key: Span) -> AttentionMask | None:
        """The window around a token's place in another grid; None unless both have equal frames."""
        if not query.in_step_with(key):
            return None
        return NeighbourhoodMask(query.grid, self.axes(query.grid), key.grid)

    def score_scale(self, grid: TokenGrid, head_dim: int, scale: float | None) -> float | None:
        if not self.temperature:
            return scale
        tokens = math.prod(self._settled("").native)
        own = 1 / math.sqrt(head_dim) if scale is None else scale
        return own * math.sqrt(math.log(2 * tokens) / math.log(tokens))

    def block_size_on(self, grid: TokenGrid) -> int:
        return block_size_for(grid)

    def order_on(self, grid: TokenGrid) -> TileOrder | None:
        """Tiles of all frames by a patch of the picture, each of about one block of tokens.

        In the model's own order a block is a strip as wide as the picture: every window in the same
        rows touches the strip, however narrow the window is.
        """
        places = max(1, self.block_size_on(grid) // grid.frames)
        rows = max(1, math.isqrt(places))
        tile = (grid.frames, min(rows, grid.height), min(places // rows, grid.width))
        if grid.video_tokens <= self.block_size_on(grid) or (grid.height == 1 == grid.frames):
            return None
        return TileOrder(grid, tile)


def _check_pair(name: str, value: tuple[Any, ...], *, at_least: int) -> None:
    if len(value) != 2:
        raise ValueError(f"{name} has {len(value)} values, but must have 2: for height and width")
    for axis, part in zip(("height", "width"), value, strict=True):
        check(f"{name} along {axis}", part, count(at_least))
