"""What a policy was found on, and how another run differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from diffattn._checks import is_whole
from diffattn.grid import TokenGrid
from diffattn.methods.policy.rules import object_of


@dataclass(frozen=True)
class Recorded:
    """What a policy was found on. None and an empty text are not recorded.

    Attributes:
        model: repository id or folder.
        denoiser: class of the denoiser.
        variant: the model's name in the methods' tables of recommended settings.
        layers: number of blocks of the denoiser.
        grid: frames, rows and columns of tokens of the video.
        steps: denoising steps of a run.
        diffattn, torch: versions.
        found: how the policy was found, such as the scores, the wanted work and the seed.
    """

    model: str = ""
    denoiser: str = ""
    variant: str = ""
    layers: int | None = None
    grid: tuple[int, int, int] | None = None
    steps: int | None = None
    diffattn: str = ""
    torch: str = ""
    found: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("model", "denoiser", "variant", "diffattn", "torch"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"recorded: {name} is {getattr(self, name)!r}, but must be text")
        for name in ("layers", "steps"):
            value = getattr(self, name)
            if value is not None and (not is_whole(value) or value < 1):
                raise ValueError(
                    f"recorded: {name} is {value!r}, but must be an integer of at least 1"
                )
        if self.grid is not None:
            sizes = tuple(self.grid) if isinstance(self.grid, list | tuple) else ()
            if len(sizes) != 3 or not all(is_whole(size) and size > 0 for size in sizes):
                raise ValueError(
                    f"recorded: grid is {self.grid!r}, but must be the frames, rows and columns of"
                    f" tokens, such as [21, 30, 52]"
                )
            object.__setattr__(self, "grid", sizes)
        if not isinstance(self.found, Mapping):
            raise ValueError(f"recorded: found is {self.found!r}, but must be an object")

    def differences(
        self, denoiser: str, variant: str, model: str, grid: TokenGrid | None, steps: int
    ) -> list[str]:
        """What a run has another than the record, in words; what is not known does not differ."""
        import diffattn

        sizes = None if grid is None else (grid.frames, grid.height, grid.width)
        pairs: list[tuple[str, Any, Any]] = [
            ("denoiser", self.denoiser, denoiser),
            ("model", _last_part(self.model), _last_part(model)),
            ("variant", self.variant, variant),
            ("grid", self.grid, sizes),
            # A run of one step has no schedule: programs run one to warm up.
            ("steps", self.steps, steps if steps > 1 else 0),
            ("diffattn", self.diffattn, diffattn.__version__),
            ("torch", _minor(self.torch), _minor(torch.__version__)),
        ]
        return [
            f"{name} {_spelt(there)}, not {_spelt(recorded)}"
            for name, recorded, there in pairs
            if recorded and there and recorded != there
        ]


def recorded_of(value: Any) -> Recorded:
    """A record as a user gives it: a `Recorded`, or an object of JSON.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, Recorded):
        return value
    return Recorded(**object_of("recorded", value, [item.name for item in fields(Recorded)]))


def _last_part(model: str) -> str:
    return model.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _spelt(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
