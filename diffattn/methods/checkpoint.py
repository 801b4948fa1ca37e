"""What loading published weights of any method needs: whose they are, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch

from diffattn.models import denoisers


def models_in(target: Any) -> Iterable[torch.nn.Module]:
    """The denoisers of a pipeline, or a model itself."""
    return [target] if isinstance(target, torch.nn.Module) else denoisers(target).values()


def parameters_by_own_name(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a module, by the names that they have without a LoRA.

    A LoRA puts a layer's own weights aside, as a `base_layer` in the layer.
    """
    return {name.replace(".base_layer.", "."): p for name, p in module.named_parameters()}


def shapes_in(file: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in an open safetensors file, which are not read."""
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
    """Raise ValueError unless the names in a checkpoint are those that are wanted.

    Args:
        what: how the message begins.
        given, wanted: the names.
        strange, missing: what the checkpoint has if it has more names, or fewer, than are wanted.
        advice: how the message ends.
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
    """Raise ValueError unless each parameter is at hand, and of the shape in the checkpoint.

    Args:
        what: how the message about a shape begins.
        shapes: of the checkpoint's tensors, at least those that are to be loaded.
        parameters: those to load into, by the checkpoint's keys.
    """
    for key, parameter in parameters.items():
        if shapes[key] != tuple(parameter.shape):
            raise ValueError(
                f"{what}: {key} has shape {shapes[key]}, but the model's {tuple(parameter.shape)}"
            )
        check_at_hand(key, parameter, "load the checkpoint")


def check_at_hand(name: str, parameter: torch.nn.Parameter, what: str) -> None:
    """Raise ValueError if a parameter has been moved away, before `what` is done to it."""
    if parameter.is_meta:
        raise ValueError(f"{name} has been moved away by offloading; {what} before enabling it")
