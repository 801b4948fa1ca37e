"""Anti-aliased clips of one flat shape crossing a flat background, rendered from distance fields.

Lengths are fractions of the frame's width, so a clip looks the same at every resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .captions import COLOURS, DIRECTIONS, SHAPES, Scene

# Frames of a whole clip.
FRAMES = 16
# Width and height of a frame in pixels.
SIZE = 96

# Distance from the first position to the last; the path is centred in the frame.
TRAVEL = 0.5
# Largest shift of the path along its direction.
START_JITTER = 0.04
# Largest shift of the path across its direction.
SIDE_JITTER = 0.10
# Radius of the circle; the other shapes are scaled to about the same area.
RADIUS_RANGE = (0.15, 0.19)

# Multiples of the radius that give the square and the triangle the area of the circle.
_SQUARE_HALF_SIDE = 0.886
_TRIANGLE_INRADIUS = 0.777


@dataclass(frozen=True)
class Geometry:
    """The geometry that a caption leaves open, (batch,) each.

    Attributes:
        radius: of the circle.
        along, across: shifts of the path along and across its direction.
    """

    radius: Tensor
    along: Tensor
    across: Tensor


def draw_geometry(batch: int, generator: torch.Generator) -> Geometry:
    """Draw sizes and path shifts of `batch` clips, on the device of the generator."""
    low, high = RADIUS_RANGE
    unit = torch.rand(3, batch, generator=generator, device=generator.device)
    return Geometry(
        radius=low + (high - low) * unit[0],
        along=START_JITTER * (2 * unit[1] - 1),
        across=SIDE_JITTER * (2 * unit[2] - 1),
    )


def render(scenes: Sequence[Scene], geometry: Geometry, frames: Tensor, size: int = SIZE) -> Tensor:
    """Render chosen frames of clips.

    Args:
        scenes: one scene per clip.
        geometry: sizes and path shifts, (batch,) each; the clips are rendered on their device.
        frames: frame numbers in [0, FRAMES), shape (batch, frames).
        size: width and height in pixels.

    Returns:
        Float tensor (batch, 3, frames, size, size) in [-1, 1].
    """
    return paint(scenes, pick_shape(cover(scenes, geometry, frames, size), scenes))


def cover(scenes: Sequence[Scene], geometry: Geometry, frames: Tensor, size: int = SIZE) -> Tensor:
    """The share of every pixel that each of `SHAPES` would cover, were it the shape of the scene.

    Args:
        scenes, geometry, frames, size: as for `render`.

    Returns:
        Float tensor (batch, shapes, frames, size, size) in [0, 1].
    """
    device = geometry.radius.device
    step = torch.tensor([DIRECTIONS[scene.direction] for scene in scenes], device=device).float()
    side = torch.stack([-step[:, 1], step[:, 0]], dim=1)
    progress = frames.to(device).float() / (FRAMES - 1) - 0.5
    along = (TRAVEL * progress + geometry.along[:, None])[..., None]
    centre = 0.5 + along * step[:, None] + (geometry.across[:, None] * side)[:, None]

    axis = (torch.arange(size, device=device) + 0.5) / size
    x = axis.view(1, 1, 1, size) - centre[..., 0, None, None]
    y = axis.view(1, 1, size, 1) - centre[..., 1, None, None]
    distances = _distances(x, y, geometry.radius.view(-1, 1, 1, 1))
    return torch.stack([(0.5 - distance * size).clamp(0, 1) for distance in distances], dim=1)


def pick_shape(covers: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """The cover of each scene's own shape, (batch, frames, size, size)."""
    kinds = torch.tensor([SHAPES.index(scene.shape) for scene in scenes], device=covers.device)
    return covers[torch.arange(len(scenes), device=covers.device), kinds]


def paint(scenes: Sequence[Scene], covered: Tensor) -> Tensor:
    """Clips (batch, 3, frames, size, size) in [-1, 1] from covers (batch, frames, size, size)."""
    colour = palette_tensor([scene.colour for scene in scenes], covered.device)
    background = palette_tensor([scene.background for scene in scenes], covered.device)
    return background + covered[:, None] * (colour - background)


def render_clips(scenes: Sequence[Scene], seed: int, size: int = SIZE) -> Tensor:
    """Render whole clips, (batch, 3, FRAMES, size, size) in [-1, 1], reproducibly from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    geometry = draw_geometry(len(scenes), generator)
    return render(scenes, geometry, torch.arange(FRAMES).expand(len(scenes), -1), size)


def palette_tensor(names: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """Colours by name as (batch, 3, 1, 1, 1) in [-1, 1]."""
    rgb = torch.tensor([COLOURS[name] for name in names], device=device, dtype=torch.float32)
    return (rgb / 127.5 - 1).view(-1, 3, 1, 1, 1)


def _distances(x: Tensor, y: Tensor, radius: Tensor) -> list[Tensor]:
    """Signed distances to the outlines of `SHAPES`, negative inside; all arguments broadcast."""
    circle = (x * x + y * y).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - _SQUARE_HALF_SIDE * radius
    # Equilateral, apex up, centroid at the origin: the intersection of three half-planes.
    slope = 0.5 * 3**0.5
    triangle = torch.maximum(y, slope * x.abs() - 0.5 * y) - _TRIANGLE_INRADIUS * radius
    return [circle, square, triangle]
