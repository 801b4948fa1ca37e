"""Where the parts of a pipeline are: on the device while they work, and otherwise in main memory.

A text encoder of 11 GB and a second expert of 28 GB would lie beside the denoiser that is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache

_HOST = torch.device("cpu")


def parts_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The models of a pipeline by their names as its components."""
    parts = pipe.components
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


@contextmanager
def on_demand(
    pipe: Any,
    device: torch.device,
    *,
    together: Collection[str] = (),
    resident: str | None = None,
) -> Iterator[None]:
    """Have parts of a pipeline on the device only while they work, as long as the block runs.

    A part that begins to work comes to the device, and sends the parts there to main memory.

    Args:
        pipe: the pipeline.
        device: the device.
        together: names of parts that do not send each other away.
        resident: name of a part that is on the device and stays there.
    """
    parts = parts_of(pipe)
    for name, part in parts.items():
        own = {name, resident, *(together if name in together else ())}
        others = [part for other, part in parts.items() if other not in own]
        add_hook_to_module(part, _Guest(device, others))
    try:
        yield
    finally:
        for name, part in parts.items():
            remove_hook_from_module(part)
            if name != resident:
                move(part, _HOST)
        clear_device_cache()


def drop_all_but(pipe: Any, name: str) -> None:
    """Let go of all parts of a pipeline but one, so that their memory is free."""
    for other in parts_of(pipe):
        if other != name:
            setattr(pipe, other, None)


def move(part: torch.nn.Module, device: torch.device) -> bool:
    """Move a part to a device; returns whether it was elsewhere."""
    weight = next(part.parameters(), None)
    if weight is None or weight.device == device:
        return False
    part.to(device)
    return True


class _Guest(ModelHook):
    """Brings a part to the device before it works; pipelines read `execution_device`."""

    def __init__(self, device: torch.device, others: Sequence[torch.nn.Module]) -> None:
        self.execution_device = device
        self.others = others

    def pre_forward(
        self, module: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        moved = [move(other, _HOST) for other in self.others]
        if any(moved):
            clear_device_cache()
        move(module, self.execution_device)
        return (
            send_to_device(args, self.execution_device),
            send_to_device(kwargs, self.execution_device),
        )
