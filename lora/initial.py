"""A training that starts from another LoRA, of any program, instead of from nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffattn.lora.adapter import ADAPTER
from diffattn.lora.convert import refuse_others
from diffattn.lora.errors import LoraError
from diffattn.lora.layer_names import names_of
from diffattn.lora.loading import find_file
from diffattn.lora.lora_file import Contents, read_contents
from diffattn.lora.settings import TrainSettings


def read_initial(settings: TrainSettings, family: str) -> Contents | None:
    """The LoRA that a training starts from; None without one.

    Args:
        settings: the settings of the training.
        family: the family of the model.

    Raises:
        LoraError: if there is no LoRA, or the file holds more than pairs for a denoiser.
    """
    if settings.init_lora is None:
        return None
    file = find_file(Path(settings.init_lora).expanduser())
    contents = read_contents(file, family if names_of(family) else None)
    refuse_others(contents)
    return contents


def with_its_rank(settings: TrainSettings, initial: Contents | None) -> TrainSettings:
    """The settings with the rank of the LoRA that the training starts from, unless one is given.

    Raises:
        LoraError: if the given rank is smaller, or the training is that of a DoRA.
    """
    if initial is None:
        return settings
    if settings.dora:
        raise LoraError(
            "init_lora and dora do not go together: a DoRA's magnitudes are those of the model"
            " without any LoRA; leave one of them out"
        )
    rank = max(pair.rank for pair in initial.pairs.values())
    if settings.rank is None:
        return dataclasses.replace(settings, rank=rank)
    if settings.rank < rank:
        raise LoraError(
            f"rank is {settings.rank}, but init_lora, {settings.init_lora}, is of rank {rank}: give"
            f" a rank of at least {rank}, or none"
        )
    return settings


def initialise(model: Any, trained: Mapping[str, torch.nn.Parameter], initial: Contents) -> None:
    """Give a new adapter the factors of another LoRA, with the same change of each weight.

    Where the adapter has a larger rank, the rows of `down` beyond stay random, and the columns of
    `up` stay zero. Layers that the other LoRA lacks start from nothing.

    Args:
        model: the denoiser with the adapter.
        trained: the parameters of the adapter by name, in float32.
        initial: the other LoRA.

    Raises:
        LoraError: if the other LoRA has layers that are not trained, or of another size.
    """
    config = model.peft_config[ADAPTER]
    strength = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    for layer, pair in initial.pairs.items():
        names = [f"{layer}.lora_{side}.{ADAPTER}.weight" for side in "AB"]
        if any(name not in trained for name in names):
            raise LoraError(
                f"init_lora, {initial.path}, has a layer {layer}, which is not trained here: name"
                f" its target, or merge that LoRA into the model first (diffattn lora merge)"
            )
        down, up = (trained[name] for name in names)
        if pair.down.shape[1:] != down.shape[1:] or pair.up.shape[0] != up.shape[0]:
            raise LoraError(
                f"init_lora, {initial.path}, is for a model of another width: {layer} has"
                f" {down.shape[1]} inputs and {up.shape[0]} outputs, the LoRA is for"
                f" {pair.down.shape[1]} and {pair.up.shape[0]}"
            )
        with torch.no_grad():
            down[: pair.rank] = pair.down.to(down)
            up.zero_()
            up[:, : pair.rank] = (pair.up.double() * (pair.strength / strength)).to(up)
