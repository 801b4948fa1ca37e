"""The language of the moving-shapes clips and its split into training and held-out prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

# 8-bit RGB of each colour name.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}

SHAPES: tuple[str, ...] = ("circle", "square", "triangle")

# The unit step (x, y) of each direction name, in image coordinates: y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}

HELD_OUT_COUNT = 50
SPLIT_SEED = 20


@dataclass(frozen=True)
class Scene:
    """The content of one clip."""

    colour: str
    shape: str
    direction: str
    background: str

    def __post_init__(self) -> None:
        """Raise ValueError for words that the renderer does not know."""
        _require("colour", self.colour, COLOURS)
        _require("shape", self.shape, SHAPES)
        _require("direction", self.direction, DIRECTIONS)
        _require("background", self.background, COLOURS)
        if self.colour == self.background:
            raise ValueError(
                f"a {self.colour} shape cannot be seen on a {self.background} background"
            )

    @property
    def caption(self) -> str:
        """The sentence that describes the scene."""
        thing = f"{self.colour} {self.shape}"
        return f"a {thing} moving {self.direction} on a {self.background} background"


def parse_caption(caption: str) -> Scene:
    """The scene of a caption that `Scene.caption` has written.

    Raises:
        ValueError: if the caption has another form or unknown words.
    """
    words = caption.split()
    if len(words) == 9:
        colour, shape, direction, background = words[1], words[2], words[4], words[7]
        frame = [words[0], words[3], words[5], words[6], words[8]]
        if frame == ["a", "moving", "on", "a", "background"]:
            return Scene(colour, shape, direction, background)
    raise ValueError(
        f"cannot read caption {caption!r}; expected "
        "'a COLOUR SHAPE moving DIRECTION on a COLOUR background'"
    )


def all_scenes() -> list[Scene]:
    """Every scene that the grammar can name, in a fixed order."""
    return [
        Scene(colour, shape, direction, background)
        for colour, shape, direction, background in product(COLOURS, SHAPES, DIRECTIONS, COLOURS)
        if colour != background
    ]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """The training scenes and the held-out scenes: disjoint, fixed by `SPLIT_SEED`."""
    scenes = all_scenes()
    held_out = set(random.Random(SPLIT_SEED).sample(range(len(scenes)), HELD_OUT_COUNT))
    training = [scene for index, scene in enumerate(scenes) if index not in held_out]
    return training, [scenes[index] for index in sorted(held_out)]


def vocabulary() -> list[str]:
    """Every word of the grammar once, in a fixed order."""
    return list(dict.fromkeys(["a", "moving", "on", "background", *COLOURS, *SHAPES, *DIRECTIONS]))


def _require(what: str, value: str, allowed: object) -> None:
    names = list(allowed)  # type: ignore[call-overload]
    if value not in names:
        raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(names)}")
