"""Checks for loading published weights of any method: names, shapes, and presence in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch

from diffattn.models import denoisers


def models_in(target: Any) -> Iterable[torch.nn.Module]:
    """The denoisers of a pipeline; `target` itself if it is a model."""
    return [target] if isinstance(target, torch.nn.Module) else denoisers(target).values()


def parameters_by_own_name(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a module, by their names without a LoRA.

    A LoRA moves a layer's own weights into a submodule `base_layer` of the layer.
    """
    return {name.replace(".base_layer.", "."): p for name, p in module.named_parameters()}


def shapes_in(file: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in an open safetensors file; no tensor is read."""
    return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def check_names(
    what: str,
    given: Set[str],
    wanted: Set[str],
    *,
    strange: str,
    missing: str,
    advice: str = "",
) -> None:
    """Compare the names in a checkpoint with the wanted names.

    Args:
        what: the beginning of the message.
        given: the names in the checkpoint.
        wanted: the names that the checkpoint must have.
        strange: the phrase of the message for names that are given but not wanted.
        missing: the phrase of the message for names that are wanted but not given.
        advice: the end of the message.

    Raises:
        ValueError: if the two sets of names differ.
    """
    for names, problem in ((given - wanted, strange), (wanted - given, missing)):
        if names:
            raise ValueError(
                f"{what}: it has {problem}, {len(names)} in all, such as {min(names)}{advice}"
            )


def check_shapes(
    what: str,
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Mapping[str, torch.nn.Parameter],
) -> None:
    """Compare the shapes in a checkpoint with the parameters to load.

    Args:
        what: the beginning of the message about a shape.
        shapes: the shapes of the checkpoint's tensors, by key; must cover the keys of `parameters`.
        parameters: the parameters to load, by the checkpoint's keys.

    Raises:
        ValueError: if a shape differs, or offloading has moved a parameter away.
    """
    for key, parameter in parameters.items():
        if shapes[key] != tuple(parameter.shape):
            raise ValueError(
                f"{what}: {key} has shape {shapes[key]}, but the model's {tuple(parameter.shape)}"
            )
        check_at_hand(key, parameter, "load the checkpoint")


def check_at_hand(name: str, parameter: torch.nn.Parameter, what: str) -> None:
    """Raise ValueError if offloading has moved a parameter away, before the step called `what`."""
    if parameter.is_meta:
        raise ValueError(f"{name} has been moved away by offloading; {what} before enabling it")
