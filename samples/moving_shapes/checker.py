"""Read a clip back: the shape, its colour, the background, the direction of the motion.

The checker sees frames only, never the prompt. An attribute that the frames do not show is None: a
coloured smear has no kind of shape, a blob that wanders about has no direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .captions import COLOURS, DIRECTIONS, SHAPES, Scene

# Smallest share of the frame that an object may cover.
MIN_AREA = 0.01
# Largest share of the frame that an object may cover.
MAX_AREA = 0.5
# Smallest RGB distance between an object and its background.
MIN_CONTRAST = 40.0
# Share of the frames that must show an object.
MIN_VISIBLE = 0.6
# Shortest distance from start to end, as a share of the frame's width.
MIN_TRAVEL = 0.15
# Least ratio of the motion along the main axis to the motion across this axis.
MIN_STRAIGHTNESS = 2.0
# Share of the variance of the positions that a uniform motion must explain.
MIN_STEADINESS = 0.6
# Smallest mean overlap with the best matching ideal shape.
MIN_OVERLAP = 0.7

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Reading:
    """The content of a clip; None for an attribute that the frames do not show.

    Attributes:
        colour: colour of the object.
        background: colour of the background.
        direction: direction of motion.
        shape: kind of shape.
        overlap: mean intersection over union with the best matching ideal shape, 0 to 1.
        purity: share of the foreground pixels that belong to the largest object, 0 to 1.
    """

    colour: str | None
    background: str | None
    direction: str | None
    shape: str | None
    overlap: float
    purity: float

    def agreement(self, scene: Scene) -> dict[str, bool]:
        """Compare with the intended scene: whether each attribute agrees, and whether `all` do."""
        parts = {
            "colour": self.colour == scene.colour,
            "background": self.background == scene.background,
            "direction": self.direction == scene.direction,
            "shape": self.shape == scene.shape,
        }
        return {**parts, "all": all(parts.values())}


def read_clip(frames: NDArray[np.generic]) -> Reading:
    """Read one clip.

    Args:
        frames: (frames, height, width, 3), uint8 in [0, 255] or floats in [0, 1].

    Raises:
        ValueError: for another shape, or floats out of range.
        TypeError: for another type.
    """
    pixels = _as_rgb255(frames)
    background_rgb = np.median(_border(pixels), axis=0)
    background = _nearest_colour(background_rgb)
    found = _foreground(pixels, background_rgb)
    if found is None:
        return Reading(None, background, None, None, 0.0, 0.0)
    foreground, object_rgb = found
    objects = _largest_objects(foreground)
    purity = float(objects.sum() / foreground.sum())
    area = objects.mean(axis=(1, 2))
    visible = (area >= MIN_AREA) & (area <= MAX_AREA)
    if visible.mean() < MIN_VISIBLE:
        return Reading(None, background, None, None, 0.0, purity)
    times = np.flatnonzero(visible)
    objects = objects[visible]
    centres = np.stack([_centre(mask) for mask in objects])
    shape, overlap = _shape_kind(objects, centres)
    return Reading(
        colour=_nearest_colour(object_rgb),
        background=background,
        direction=_direction(times, centres, pixels.shape[2]),
        shape=shape,
        overlap=overlap,
        purity=purity,
    )


def _as_rgb255(frames: NDArray[np.generic]) -> Array:
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must have shape (frames, height, width, 3), not {frames.shape}")
    pixels = frames.astype(np.float64)
    if frames.dtype == np.uint8:
        return pixels
    if not np.issubdtype(frames.dtype, np.floating):
        raise TypeError(f"frames must be uint8 or floating point, not {frames.dtype}")
    if not np.isfinite(pixels).all() or pixels.min() < -0.01 or pixels.max() > 1.01:
        raise ValueError("floating-point frames must be finite and lie in [0, 1]")
    return pixels * 255


def _border(pixels: Array) -> Array:
    """Pixels of the frames' rim, as wide as one sixteenth of a frame, (count, 3)."""
    rim = max(1, pixels.shape[2] // 16)
    inside = np.zeros(pixels.shape[1:3], dtype=bool)
    inside[rim:-rim, rim:-rim] = True
    return pixels[:, ~inside].reshape(-1, 3)


def _nearest_colour(rgb: Array) -> str | None:
    """Name of the nearest palette colour; None if the second nearest is nearly as near."""
    names = list(COLOURS)
    distances = np.linalg.norm(np.array(list(COLOURS.values())) - rgb, axis=1)
    best, second = np.argsort(distances)[:2]
    return names[best] if distances[best] < 0.8 * distances[second] else None


def _foreground(pixels: Array, background_rgb: Array) -> tuple[Mask, Array] | None:
    """The mask of the foreground (frames, height, width) and its colour (3,); None if empty."""
    contrast = np.linalg.norm(pixels - background_rgb, axis=-1)
    # The most contrasting hundredth of the pixels is the inside of the object, if there is one.
    threshold = max(MIN_CONTRAST, 0.7 * float(np.quantile(contrast, 0.99)))
    core = contrast > threshold
    if core.mean() < MIN_AREA / 2:
        return None
    object_rgb = np.median(pixels[core], axis=0)
    towards = object_rgb - background_rgb
    # Half-way between the two colours, along their connecting line: blur does not move this edge.
    share = (pixels - background_rgb) @ towards / (towards @ towards)
    mask = share > 0.5
    return (mask, object_rgb) if mask.any() else None


def _largest_objects(mask: Mask) -> Mask:
    """Keep the largest 4-connected component of every frame."""
    frames, height, width = mask.shape
    kept = np.zeros_like(mask)
    for index in range(frames):
        rest = mask[index].copy()
        best_size = 0
        while rest.sum() > best_size:
            seed = np.zeros((height, width), dtype=bool)
            seed.flat[int(np.argmax(rest))] = True
            component = _flood(seed, rest)
            size = int(component.sum())
            if size > best_size:
                best_size, kept[index] = size, component
            rest &= ~component
    return kept


def _flood(seed: Mask, allowed: Mask) -> Mask:
    """Grow `seed` to all pixels of `allowed` that are connected with it."""
    region, size = seed, 0
    while (grown_size := int(region.sum())) > size:
        size = grown_size
        # Several rounds between counts: counting costs as much as growing.
        for _ in range(4):
            grown = region.copy()
            grown[1:] |= region[:-1]
            grown[:-1] |= region[1:]
            grown[:, 1:] |= region[:, :-1]
            grown[:, :-1] |= region[:, 1:]
            region = grown & allowed
    return region


def _centre(mask: Mask) -> Array:
    """Centre of mass (x, y) in pixels."""
    y, x = np.nonzero(mask)
    return np.array([x.mean(), y.mean()])


def _direction(times: NDArray[np.intp], centres: Array, width: int) -> str | None:
    """Direction of the straight line fitted to the centres, (frames, 2)."""
    if len(times) < 2:
        return None
    offsets = times - times.mean()
    moved = centres - centres.mean(axis=0)
    velocity = offsets @ moved / (offsets @ offsets)
    main = int(np.argmax(np.abs(velocity)))
    travel = np.abs(velocity) * (times[-1] - times[0])
    residual = moved[:, main] - velocity[main] * offsets
    variance = float(moved[:, main] @ moved[:, main])
    if (
        travel[main] < MIN_TRAVEL * width
        or travel[main] < MIN_STRAIGHTNESS * travel[1 - main]
        or residual @ residual > (1 - MIN_STEADINESS) * variance
    ):
        return None
    step = [0, 0]
    step[main] = int(np.sign(velocity[main]))
    return next(name for name, unit in DIRECTIONS.items() if list(unit) == step)


def _shape_kind(objects: Mask, centres: Array) -> tuple[str | None, float]:
    """The best matching ideal shape of equal area and centre, and its mean overlap."""
    overlaps = {
        shape: float(
            np.mean([_overlap(m, c, shape) for m, c in zip(objects, centres, strict=True)])
        )
        for shape in SHAPES
    }
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return (best if overlaps[best] >= MIN_OVERLAP else None), overlaps[best]


def _overlap(mask: Mask, centre: Array, shape: str) -> float:
    """Intersection over union of a mask with the ideal shape of its area and centre."""
    height, width = mask.shape
    x = np.arange(width)[None, :] - centre[0]
    y = np.arange(height)[:, None] - centre[1]
    area = mask.sum()
    if shape == "circle":
        ideal = np.hypot(x, y) <= np.sqrt(area / np.pi)
    elif shape == "square":
        ideal = np.maximum(np.abs(x), np.abs(y)) <= 0.5 * np.sqrt(area)
    else:
        # Equilateral with the apex up; its inradius is r where the area is 3 sqrt(3) r^2.
        inradius = np.sqrt(area / (3 * np.sqrt(3)))
        ideal = np.maximum(y, 0.5 * np.sqrt(3) * np.abs(x) - 0.5 * y) <= inradius
    return float((mask & ideal).sum() / (mask | ideal).sum())
