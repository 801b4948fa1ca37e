"""Every setting of one video, as plain data that can be written down and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffattn._checks import (
    FLAG,
    Allowed,
    choice,
    did_you_mean,
    number,
    refused,
    whole,
)

from ..errors import UserError, shortened

# Name of the model that comes with the package.
BUNDLED_MODEL = "moving-shapes"

DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "group")
# The names of `diffattn.lora.frozen.STORAGES`, which imports torch.
BASE_DTYPES = ("fp8", "int8", "nf4")
CONTEXT_PARALLEL = ("none", "ulysses", "ring")
LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Request:
    """One video or picture to make. `None` leaves a setting to the model or the machine.

    Attributes:
        model: pipeline folder, hub id, or name of the bundled model.
        attention: a method as its `to_dict()` gives it.
        height, width: in pixels.
        steps: denoising steps.
        image: files of pictures: the first frame, a picture to change, or reference pictures.
        last_image: file of the last frame.
        input: file of a video to change.
        strength: how much of `image` or `input` is changed, from 0 to 1.
        fps: frames a second of the file.
        lora: file or folder of a LoRA, or several, each with a scale or an expert, see
            `trained_lora.loras_of`.
        lora_everywhere: whether the LoRA stays on in calls that it was not trained for.
        compare: whether the dense video or picture is rendered too.
    """

    prompt: str
    model: str = BUNDLED_MODEL
    attention: Mapping[str, Any] = field(default_factory=lambda: {"type": "radial"})
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    image: tuple[str, ...] = ()
    last_image: str | None = None
    input: str | None = None
    strength: float | None = None
    seed: int = 0
    fps: float | None = None
    dtype: str | None = None
    device: str | None = None
    offload: str = "none"
    context_parallel: str = "none"
    lora: str | tuple[str, ...] | None = None
    lora_everywhere: bool = False
    compare: bool = False

    def __post_init__(self) -> None:
        """Raise UserError, with the name of the option, for a setting that no model could use."""
        if isinstance(self.image, list):  # as JSON has it
            object.__setattr__(self, "image", tuple(self.image))
        if isinstance(self.lora, list):
            object.__setattr__(self, "lora", tuple(self.lora))
        if isinstance(self.lora, tuple) and len(self.lora) < 2:
            object.__setattr__(self, "lora", self.lora[0] if self.lora else None)
        for name in refused(self, _ALLOWED):
            check_option(name, getattr(self, name), _ALLOWED[name])
        if self.compare and self.attention["type"] == "dense":
            raise UserError(
                "--compare needs a sparse method to compare with dense, not --attn dense"
            )
        if self.last_image is not None and not self.image:
            raise UserError("--last-image needs the first frame too: give --image")
        if self.strength is not None and not self.image and self.input is None:
            raise UserError("--strength is of --image or --input, of which none is given")
        if self.lora_everywhere and self.lora is None:
            raise UserError("--lora-everywhere is about the LoRA of --lora, which is not given")
        if self.context_parallel != "none" and self.offload != "none":
            raise UserError("give --context-parallel or --offload, not both")
        if self.context_parallel == "ring" and (self.compare or self.attention["type"] == "dense"):
            raise UserError(
                "--context-parallel ring goes with sparse methods, not with"
                f" {'--compare' if self.compare else '--attn dense'}: diffusers' own attention"
                " usually cannot; use ulysses"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return {**dataclasses.asdict(self), "attention": dict(self.attention)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Request:
        """Build a request from the form that `to_dict` gives.

        Raises:
            UserError: for an unknown name, a wrong value, or settings without a prompt.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                raise UserError(f"unknown setting {name!r}{did_you_mean(name, names)}")
        if "prompt" not in settings:
            raise UserError("the settings hold no prompt")
        return cls(**settings)


def option(name: str) -> str:
    """The name of a setting as the command line spells it."""
    return {"prompt": "the prompt", "attention": "the attention method"}.get(
        name, "--" + name.replace("_", "-")
    )


def check_option(name: str, value: object, allowed: Allowed) -> None:
    """Raise UserError, in the words of the command line, unless the value is allowed."""
    if not allowed.holds(value):
        if isinstance(value, str) and not _is_text(value):
            raise UserError(f"{option(name)} must be text in UTF-8, not {shortened(repr(value))}")
        hint = did_you_mean(str(value), allowed.names)
        raise UserError(
            f"{option(name)} must be {allowed.words}, not {shortened(repr(value))}{hint}"
        )


def _is_entry(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("type"), str)


def _is_text(value: Any) -> bool:
    """Whether a value is text; bytes of the command line that are no UTF-8 come as surrogates."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _are_names(value: Any) -> bool:
    """Whether a value is names of files."""
    return isinstance(value, tuple) and all(TEXT.holds(name) for name in value)


TEXT = Allowed("text", lambda value: _is_text(value) and value.strip() != "")

_ALLOWED: Mapping[str, Allowed] = {
    "prompt": TEXT,
    "model": TEXT,
    "attention": Allowed('an object with a "type"', _is_entry),
    "negative_prompt": Allowed("text", _is_text),
    "height": whole(1),
    "width": whole(1),
    "num_frames": whole(1),
    "steps": whole(1),
    "guidance_scale": number(),
    "image": Allowed("names of files", _are_names),
    "last_image": TEXT,
    "input": TEXT,
    "strength": number(above=0, at_most=1),
    "seed": whole(0, LARGEST_SEED),
    # GIF counts hundredths of a second in 16 bits, and containers have limits of their own.
    "fps": number(at_least=0.01, at_most=1000),
    "dtype": choice(DTYPES),
    "device": TEXT,
    "offload": choice(OFFLOADS),
    "context_parallel": choice(CONTEXT_PARALLEL),
    "lora": Allowed("text", lambda value: TEXT.holds(value) or _are_names(value)),
    "lora_everywhere": FLAG,
    "compare": FLAG,
}
