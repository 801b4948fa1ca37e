"""The LoRA of a run: loaded, with the method's own weights, and described in a line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffattn.lora.adapter import LoraRecord
    from diffattn.methods import Method


def load_lora(
    pipe: DiffusionPipeline, path: str, record: LoraRecord | None, *, everywhere: bool
) -> None:
    """Load a LoRA file or folder into the denoiser of its record; without a record, into all.

    Args:
        pipe: the pipeline.
        path: the file or the folder.
        record: the result of `read_lora_record`.
        everywhere: keep the LoRA on in calls that it was not trained for.

    Raises:
        UserError: if there is no LoRA at `path`, or the LoRA does not fit the model.
    """
    from diffattn.lora.errors import LoraError
    from diffattn.lora.loading import load_factors

    try:
        load_factors(pipe, Path(path).expanduser(), record, everywhere=everywhere)
    except LoraError as error:
        raise UserError(error) from None


def read_lora_record(path: str) -> LoraRecord | None:
    """How the LoRA at `path` was trained; None unless `diffattn lora train` has trained it.

    Raises:
        UserError: if there is no LoRA at `path`, or the file is not one that is read.
    """
    from diffattn.lora.adapter import read_record
    from diffattn.lora.errors import LoraError
    from diffattn.lora.loading import find_file

    try:
        return read_record(find_file(Path(path).expanduser()))
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


def where_on(method: str, record: LoraRecord, dense_steps: int, *, everywhere: bool) -> str | None:
    """A line that says where a LoRA is off, or is on without having been trained for it.

    Args:
        method: the type of the run's method.
        record: how the LoRA was trained.
        dense_steps: number of steps of the run that stay dense.
        everywhere: whether the LoRA stays on everywhere.

    Returns:
        The line; None where the LoRA was trained for every step of the run.
    """
    trained = record.method["type"]
    if method != trained:
        where = f"in this run, which attends by {method}"
    elif dense_steps:
        where = f"in the {dense_steps} dense steps"
    else:
        return None
    if everywhere:
        return f"the LoRA is on {where}, although it was trained under {trained}"
    return (
        f"the LoRA is off {where}: it was trained under {trained} (--lora-everywhere keeps it on)"
    )
