"""The LoRAs of a run: loaded, with the method's own weights, and described in lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .request import TEXT, check_option

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffattn.lora.adapter import LoraRecord
    from diffattn.lora.loading import Lora
    from diffattn.methods import Method


# The experts of Wan 2.2, by the noise that they work on, as components of the pipeline.
_EXPERTS = {"high": "transformer", "low": "transformer_2"}
# Beyond it a scale is a slip of the finger.
_LARGEST_SCALE = 100

# The value of --lora: one LoRA, or several.
Loras = str | tuple[str, ...] | None


def loras_of(given: Loras) -> list[Lora]:
    """The LoRAs that `--lora` names, as PATH, PATH:SCALE, high=PATH or low=PATH:SCALE.

    A name that exists as it stands is a path.

    Raises:
        UserError: if a scale is not finite or too large.
    """
    names = () if given is None else (given,) if isinstance(given, str) else given
    return [_parsed(name) for name in names]


def _parsed(text: str) -> Lora:
    from diffattn.lora.loading import Lora

    if Path(text).expanduser().exists():
        return Lora(text)
    expert, sign, rest = text.partition("=")
    denoiser = _EXPERTS.get(expert) if sign else None
    path = text if denoiser is None else rest
    before, colon, end = path.rpartition(":")
    if colon and before and not Path(path).expanduser().exists():
        try:
            scale = float(end)
        except ValueError:
            return Lora(path, denoiser=denoiser)
        if not math.isfinite(scale) or abs(scale) > _LARGEST_SCALE:
            raise UserError(
                f"--lora {text}: the scale is {end}, but must be a number from -{_LARGEST_SCALE} to"
                f" {_LARGEST_SCALE}"
            )
        return Lora(before, scale, denoiser)
    return Lora(path, denoiser=denoiser)


def with_paths(given: object, change: Callable[[str], str]) -> tuple[str, ...]:
    """The values of `--lora` with other paths.

    Raises:
        UserError: if a value is no text.
    """
    names = list(given) if isinstance(given, list | tuple) else [given]
    for name in names:
        check_option("lora", name, TEXT)
    return tuple(with_path(str(name), change) for name in names)


def with_path(text: str, change: Callable[[str], str]) -> str:
    """A value of `--lora` with another path."""
    path = str(_parsed(text).path)
    start = text.index(path)
    return text[:start] + change(path) + text[start + len(path) :]


def load_lora(
    pipe: DiffusionPipeline, given: Loras, record: LoraRecord | None, *, everywhere: bool
) -> None:
    """Load LoRAs into the denoisers of their records; without a record, into all.

    Args:
        pipe: the pipeline.
        given: the value of `--lora`.
        record: the result of `read_lora_record`.
        everywhere: keep the LoRAs on in calls that they were not trained for.

    Raises:
        UserError: if there is no LoRA at a path, or a LoRA does not fit the model.
    """
    from diffattn.lora.errors import LoraError
    from diffattn.lora.loading import load_factors

    try:
        for lora, own in _with_records(given, record):
            load_factors(
                pipe,
                Path(lora.path).expanduser(),
                own,
                everywhere=everywhere,
                scale=lora.scale,
                denoiser=lora.denoiser,
            )
    except LoraError as error:
        raise UserError(error) from None


def _with_records(given: Loras, record: LoraRecord | None) -> list[tuple[Lora, LoraRecord | None]]:
    """The LoRAs with their records; `record` is that of a LoRA alone, which is not read again."""
    loras = loras_of(given)
    return [(lora, record if len(loras) == 1 else _read(lora)) for lora in loras]


def _read(lora: Lora) -> LoraRecord | None:
    from diffattn.lora.adapter import read_record
    from diffattn.lora.errors import LoraError
    from diffattn.lora.loading import find_file

    try:
        return read_record(find_file(Path(lora.path).expanduser()))
    except LoraError as error:
        raise UserError(error) from None


def read_lora_record(given: Loras, *, agreeing: bool = False) -> LoraRecord | None:
    """How the first LoRA of `diffattn lora train` in `--lora` was trained; None without any.

    Args:
        given: the value of `--lora`.
        agreeing: whether the LoRAs choose the method, and must have been trained under one.

    Raises:
        UserError: if there is no LoRA at a path, a file is not one that is read, or the LoRAs do
            not agree.
    """
    from diffattn.lora.errors import LoraError
    from diffattn.lora.loading import check_method_weights, one_method

    loras = loras_of(given)
    records = [_read(lora) for lora in loras]
    try:
        if agreeing:
            one_method(loras, records)
        check_method_weights(loras, records)
    except LoraError as error:
        raise UserError(error) from None
    return next((record for record in records if record is not None), None)


def load_weights_of_method(
    pipe: DiffusionPipeline, method: Method, given: Loras, record: LoraRecord
) -> None:
    """Load the weights of an attached method that were trained together with LoRAs.

    Nothing is loaded for a LoRA of another method than the attached one.
    """
    from diffattn.lora.adapter import load_method_weights
    from diffattn.lora.errors import LoraError

    try:
        for lora, own in _with_records(given, record):
            if own is not None and own.method["type"] == method.type:
                load_method_weights(pipe, Path(lora.path).expanduser(), own)
    except LoraError as error:
        raise UserError(error) from None


def where_all_are_on(
    method: str, given: Loras, record: LoraRecord, dense_steps: int, *, everywhere: bool
) -> list[str]:
    """Lines that say where LoRAs are off, or on without having been trained for it."""
    lines = []
    several = len(loras_of(given)) > 1
    for lora, own in _with_records(given, record):
        line = own and where_on(method, own, dense_steps, everywhere=everywhere)
        if line:
            lines.append(line.replace("the LoRA", f"the LoRA {lora.path}", 1) if several else line)
    return lines


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
