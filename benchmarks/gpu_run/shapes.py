"""The attention calls that are measured: one layer of widely used models."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffattn import TokenGrid

FORWARD, BACKWARD = "forward", "backward"
BACKWARD_FLOPS = 2.5  # times a forward pass: five matrix products instead of two


@dataclass(frozen=True)
class Shape:
    """Self-attention of one sample in one layer of a model.

    Attributes:
        name: model and resolution.
        grid: its tokens; where text is a large part of a small picture (Flux at 1024), a picture
            with as many tokens, because dense text would leave no room for a density of 0.1.
        heads, head_dim: of the model.
    """

    name: str
    grid: TokenGrid
    heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        return self.grid.tokens

    def flops(self, pairs: int, direction: str) -> float:
        """Floating-point operations for `pairs` token pairs a head that attend."""
        forward = 4.0 * self.heads * pairs * self.head_dim
        return forward if direction == FORWARD else BACKWARD_FLOPS * forward


SHAPES = (
    Shape("wan-1.3b-480p", TokenGrid(21, 30, 52), heads=12, head_dim=128),
    Shape("wan-14b-720p", TokenGrid(21, 45, 80), heads=40, head_dim=128),
    Shape("hunyuan-720p", TokenGrid(33, 45, 80, text_after=256), heads=24, head_dim=128),
    Shape("flux-4096", TokenGrid(1, 256, 256, text_before=512), heads=24, head_dim=128),
    Shape("cogvideox-5b", TokenGrid(13, 30, 45, text_before=226), heads=48, head_dim=64),
    Shape("flux-1024", TokenGrid(1, 72, 64), heads=24, head_dim=128),
)


def tiny(shape: Shape) -> Shape:
    """The same shape in three ragged blocks and one head, for a CPU."""
    text = 5 if shape.grid.tokens != shape.grid.video_tokens else 0
    return replace(shape, grid=TokenGrid(6, 7, 8, text_before=text), heads=1)
