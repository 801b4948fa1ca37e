"""Method, model and size of a LoRA or a recorded run, for commands that make no video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffattn._checks import whole

from ..errors import UserError
from .method_settings import MethodOptions, attention_settings
from .request import TEXT, check_option
from .sidecar import read_settings
from .trained_lora import read_lora_record

if TYPE_CHECKING:
    from diffattn.lora.adapter import LoraRecord
    from diffattn.planning.published import ModelShape

SIZES = ("height", "width", "num_frames")

# Latent rows and columns of a token in the families that LoRAs are trained on.
_PATCH = {"ltx": 1}
_USUAL_PATCH = 2


@dataclass(frozen=True)
class Origin:
    """Files that say what the options of a command leave open.

    Attributes:
        lora: file or folder of a LoRA of `diffattn lora train`: its method, and the size of its
            training where no other size is given.
        record: the JSON sidecar of a run: its method, model, size and steps.
    """

    lora: str | None = None
    record: Path | None = None


@dataclass(frozen=True)
class Known:
    """What the options and the files together say.

    Attributes:
        attention: a method as its `to_dict()` gives it.
        model: hub id, folder or name of the bundled model; None without one.
        numbers: sizes, and other numbers by the names of options.
        lora: how the LoRA was trained; None without a LoRA.
    """

    attention: Mapping[str, Any]
    model: str | None
    numbers: Mapping[str, int]
    lora: LoraRecord | None

    def numbers_for(self, shape: ModelShape) -> Mapping[str, int]:
        """The numbers for a model: a LoRA's size where no size is given.

        Raises:
            UserError: as `trained_size`.
        """
        if self.lora is None or any(name in self.numbers for name in SIZES):
            return self.numbers
        return {**trained_size(self.lora, shape), **self.numbers}


def read_origin(
    origin: Origin, method: MethodOptions, model: str | None, numbers: Mapping[str, int]
) -> Known:
    """Fill what the options leave open from a LoRA and a record; the options come first.

    Args:
        origin: the files.
        method, model: the options of the command.
        numbers: those of the sizes and steps that the user gave, by their names.

    Raises:
        UserError: if a file cannot be read or says no method, or a setting in it is refused.
    """
    settings: Mapping[str, Any] = {}
    if origin.record is not None:
        settings = read_settings(origin.record)[0]
    trained = None
    if origin.lora is not None:
        check_option("lora", origin.lora, TEXT)
        trained = read_lora_record(origin.lora)
        if trained is None:
            raise UserError(
                f"--lora {origin.lora} names no method and no size: `diffattn lora train` did not"
                f" train it"
            )
    recorded = settings.get("attention") if trained is None else trained.method
    found = {name: settings[name] for name in (*SIZES, "steps") if settings.get(name) is not None}
    for name, value in found.items():
        check_option(name, value, whole(1))
    if model is None and settings.get("model") is not None:
        model = settings["model"]
        check_option("model", model, TEXT)
    return Known(
        attention_settings(method, recorded),
        model,
        {**found, **numbers},
        trained,
    )


def trained_size(record: LoraRecord, shape: ModelShape) -> dict[str, int]:
    """Pixels and frames of the clips that a LoRA was trained on.

    Args:
        record: how the LoRA was trained.
        shape: the model.

    Raises:
        UserError: if the record holds no shape of latents, or the model's sizes are not known.
    """
    try:
        _, frames, rows, columns = (int(size) for size in record.latents)
    except (TypeError, ValueError):
        raise UserError(
            f"the LoRA's header gives its latents as {record.latents!r:.40}, but latents have"
            f" channels, frames, rows and columns: give --height, --width and --num-frames"
        ) from None
    sizes = shape.sizes
    if sizes is None:
        raise UserError(
            f"the sizes of {shape.name} are not known: give --height, --width and --num-frames"
        )
    patch = _PATCH.get(shape.family, _USUAL_PATCH)
    pixels = (sizes.token_pixels or sizes.spatial_multiple) // patch
    size = {"height": rows * pixels, "width": columns * pixels}
    if sizes.frame_stride:
        whole_strides = frames - 1 if sizes.frame_offset else frames
        size["num_frames"] = whole_strides * sizes.frame_stride + sizes.frame_offset
    return size
