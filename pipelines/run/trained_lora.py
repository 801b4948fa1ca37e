"""Load a LoRA, after a check that the model has a place for each of its layers.

A LoRA of `diffattn lora train` records the method that it was trained under. Trained weights of the
method itself may lie beside the LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_line

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from diffattn.lora.adapter import LoraRecord
    from diffattn.methods import Method

_FACTOR = re.compile(r"transformer\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


def load_lora(pipe: DiffusionPipeline, path: str, record: LoraRecord | None) -> None:
    """Load a LoRA file or folder into the denoiser of its record; without a record, into all.

    Where nothing fits, diffusers only warns, and would render a video without the LoRA.

    Raises:
        UserError: if there is no LoRA at `path`, or the LoRA does not fit the model.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise UserError(f"there is no LoRA at {path}")
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{type(pipe).__name__} takes no LoRA")
    try:
        factors = pipe.lora_state_dict(source)
    except Exception as error:
        # safetensors, torch and diffusers each raise their own errors for other files.
        raise UserError(f"cannot read LoRA {path}: {one_line(error)}") from None
    for name in _denoisers(pipe) if record is None else [record.denoiser]:
        if getattr(pipe, name, None) is None:
            raise UserError(f"LoRA {path} is for the {name}, which {type(pipe).__name__} lacks")
        _check_fit(getattr(pipe, name), factors, path)
        # Only pipelines with two experts know this argument.
        extra = {"load_into_transformer_2": True} if name == "transformer_2" else {}
        try:
            pipe.load_lora_weights(source, **extra)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"LoRA {path} does not fit the model: {one_line(error)}") from None


def read_lora_record(path: str) -> LoraRecord | None:
    """How the LoRA at `path` was trained; None unless `diffattn lora train` has trained it."""
    from diffattn.lora.adapter import read_record
    from diffattn.lora.errors import LoraError

    try:
        return read_record(Path(path).expanduser())
    except LoraError as error:
        raise UserError(error) from None


def load_weights_of_method(
    pipe: DiffusionPipeline, method: Method, path: str, record: LoraRecord
) -> None:
    """Load the weights of an attached method that were trained together with a LoRA.

    Nothing is loaded if the user chose another method than the LoRA's.
    """
    from diffattn.lora.adapter import load_method_weights
    from diffattn.lora.errors import LoraError

    if record.method["type"] != method.type:
        return
    try:
        load_method_weights(pipe, Path(path).expanduser(), record)
    except LoraError as error:
        raise UserError(error) from None


def _denoisers(pipe: DiffusionPipeline) -> list[str]:
    names = ("transformer", "transformer_2")
    return [name for name in names if getattr(pipe, name, None) is not None]


def _check_fit(model: torch.nn.Module, factors: Mapping[str, Any], path: str) -> None:
    layers = dict(model.named_modules())
    matches = [match for key in factors if (match := _FACTOR.fullmatch(key))]
    if not matches:
        raise UserError(
            f"LoRA {path} does not fit: none of its {len(factors)} tensors is for the transformer"
        )
    unknown = sorted({match["layer"] for match in matches} - set(layers))
    if unknown:
        raise UserError(
            f"LoRA {path} does not fit {type(model).__name__}: it has no layer {unknown[0]}"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
        )
    for match in matches:
        layer = layers[match["layer"]]
        attribute, axis = ("in_features", 1) if match["side"] == "A" else ("out_features", 0)
        wanted = getattr(layer, attribute, None)
        size = factors[match.string].shape[axis]
        if wanted is not None and wanted != size:
            raise UserError(
                f"LoRA {path} does not fit {type(model).__name__}: {match['layer']} has "
                f"{attribute} {wanted}, the LoRA is for {size}"
            )
