"""Every setting of one video, as plain data that can be written down and read back."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError, did_you_mean

BUNDLED_MODEL = "moving-shapes"
"""Name of the model that comes with the package."""

DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "group")
CONTEXT_PARALLEL = ("none", "ulysses", "ring")
LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Request:
    """One video to make.  ``None`` leaves a setting to the model or the machine."""

    prompt: str
    model: str = BUNDLED_MODEL
    attention: Mapping[str, Any] = field(default_factory=lambda: {"type": "radial"})
    """A method as its ``to_dict()`` gives it."""
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    fps: float | None = None
    dtype: str | None = None
    device: str | None = None
    offload: str = "none"
    context_parallel: str = "none"
    lora: str | None = None
    compare: bool = False

    def __post_init__(self) -> None:
        """Refuse what no model could do, with the option's name."""
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            optional = _DEFAULTS[name] is None
            if not (optional and value is None):
                check(option(name), value)
        if self.compare and self.attention["type"] == "dense":
            raise UserError(
                "--compare needs a sparse method to compare with dense, not --attn dense"
            )
        if self.context_parallel != "none" and self.offload != "none":
            raise UserError("give --context-parallel or --offload, not both")
        if self.context_parallel == "ring" and (self.compare or self.attention["type"] == "dense"):
            raise UserError(
                "--context-parallel ring goes with sparse methods, not with"
                f" {'--compare' if self.compare else '--attn dense'}: diffusers' own attention"
                " usually cannot; use ulysses"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {**dataclasses.asdict(self), "attention": dict(self.attention)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Request":
        """Build a request from :meth:`to_dict`'s form; unknown names are refused."""
        names = [item.name for item in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                raise UserError(f"unknown setting {name!r}{did_you_mean(name, names)}")
        if "prompt" not in settings:
            raise UserError("the settings hold no prompt")
        return cls(**settings)


def option(name: str) -> str:
    """Return how the command line spells a setting."""
    return {"prompt": "the prompt", "attention": "the attention method"}.get(
        name, "--" + name.replace("_", "-")
    )


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name} must be text, not {value!r}")


def _any_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise UserError(f"{name} must be text, not {value!r}")


def _method(name: str, value: object) -> None:
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        raise UserError(f'{name} must be an object with a "type", not {value!r}')


def _whole(least: int, most: int | None = None) -> Callable[[str, object], None]:
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"

    def check(name: str, value: object) -> None:
        good = isinstance(value, int) and not isinstance(value, bool)
        if not good or value < least or (most is not None and value > most):  # type: ignore[operator]
            raise UserError(f"{name} must be a whole number {allowed}, not {value!r}")

    return check


def _number(above: float) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value <= above:  # type: ignore[arg-type,operator]
            raise UserError(f"{name} must be a number above {above:g}, not {value!r}")

    return check


def _finite(name: str, value: object) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value):  # type: ignore[arg-type]
        raise UserError(f"{name} must be a finite number, not {value!r}")


def _choice(choices: tuple[str, ...]) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        if value not in choices:
            hint = did_you_mean(str(value), choices)
            raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}{hint}")

    return check


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, not {value!r}")


_DEFAULTS = {item.name: item.default for item in dataclasses.fields(Request)}

_CHECKS: dict[str, Callable[[str, object], None]] = {
    "prompt": _text,
    "model": _text,
    "attention": _method,
    "negative_prompt": _any_text,
    "height": _whole(1),
    "width": _whole(1),
    "num_frames": _whole(1),
    "steps": _whole(1),
    "guidance_scale": _finite,
    "seed": _whole(0, LARGEST_SEED),
    "fps": _number(0),
    "dtype": _choice(DTYPES),
    "device": _text,
    "offload": _choice(OFFLOADS),
    "context_parallel": _choice(CONTEXT_PARALLEL),
    "lora": _text,
    "compare": _flag,
}
