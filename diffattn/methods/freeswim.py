"""FreeSwim's window: every token sees as much around it as the model was trained on, of all frames.

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

# Rows and columns of tokens at the resolution that a model was trained on. Wan 2.1 is the 1.3B of
# the paper, at 480 x 832 pixels; its 14B has (45, 80).
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
    """The sizes that may be None, or one number for both axes, settled for a model family."""

    native: tuple[int, int]
    radius: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class FreeSwimAttn(StaticMaskMethod):
    """The inward sliding window of FreeSwim (arXiv 2511.14712), for sizes beyond the native one.

    A token sees the tokens of all frames that are at most `radius` rows and columns away. At the
    borders the window is moved inwards and not cut, so that every token sees equally many; a window
    that is longer than the grid is all of it. What it leaves out is the rest of larger grids: up to
    the native resolution attention is dense, but for the temperature.

    Attributes:
        native: rows and columns of tokens at the resolution that the model was trained on; the
            model family's when None.
        radius: rows and columns to either side, or one number for both; half of `native` when None,
            which makes a window of 31 x 53 tokens for the 30 x 52 of Wan 2.1 at 480 x 832 pixels.
        temperature: sharpen attention by sqrt(log(2n) / log(n)), n being the native tokens of a
            frame, as the public code does at every target size (1.046 for Wan 2.1). False leaves
            the model's own scale.

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "freeswim"
    paper: ClassVar[str] = "arXiv 2511.14712"

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
        """The method with the native size of a model family, and the window that follows from it.

        A family whose size is not known here takes Wan 2.1's, the paper's own. All layers and steps
        are sparse.
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
        """The windows along frames, height and width of `grid`."""
        radius = self._settled("").radius
        rows, columns = (
            AxisWindow(size, min(2 * reach + 1, size))
            for size, reach in zip((grid.height, grid.width), radius, strict=True)
        )
        return AxisWindow(grid.frames, grid.frames), rows, columns

    def is_full_on(self, grid: TokenGrid) -> bool:
        """Does every video token of `grid` see all others?"""
        return all(axis.window == axis.size for axis in self.axes(grid))

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        """The token pairs that attend among the video tokens.

        Parameters left at None take the values for a model without a native size of its own;
        attached to a pipeline, they take that model's.
        """
        return NeighbourhoodMask(grid, self.axes(grid))

    def score_scale(self, grid: TokenGrid, head_dim: int, scale: float | None) -> float | None:
        if not self.temperature:
            return scale
        tokens = math.prod(self._settled("").native)
        own = 1 / math.sqrt(head_dim) if scale is None else scale
        return own * math.sqrt(math.log(2 * tokens) / math.log(tokens))

    def block_size_on(self, grid: TokenGrid) -> int:
        return block_size_for(grid)

    def order_on(self, grid: TokenGrid) -> TileOrder | None:
        """Patches of the picture through all frames, of about a block each.

        In the model's own order a block is a strip as wide as the picture, which windows of any
        width touch.
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
