"""Blocks whose frozen weights wait in main memory, by diffusers' group offloading.

The weights of a waiting block come layer by layer, the next one while the present one works, and go
when the layer is done. A backward pass reads them, too. Under gradient checkpointing the block runs
once more before its backward pass, and what that run has read stays until the pass is over. That
holds for linear layers, which save a view of their weight. Autograd saves the factors of norms, and
the like, as the parameters themselves, which would be elsewhere by then. They are small, and stay.

diffusers follows the order in which layers run from the entry of the module that is offloaded. A
backward pass enters the blocks in reverse order. So each block is offloaded by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffattn._compat import is_group_offloaded
from diffattn.lora.errors import LoraError
from diffattn.lora.frozen import block_names


def swap_blocks(model: Any, count: int, device: torch.device) -> None:
    """Put a denoiser onto a device, but for the weights of its last `count` blocks.

    Args:
        model: the denoiser in main memory, without a method and without a LoRA.
        count: number of blocks whose weights wait in main memory.
        device: the device of the training.

    Raises:
        LoraError: if the denoiser has fewer blocks.
    """
    from diffusers.hooks import apply_group_offloading

    names = block_names(model)
    if count > len(names):
        raise LoraError(
            f"swap_blocks is {count}, but {type(model).__name__} has {len(names)} blocks: give at"
            f" most as many"
        )
    waiting = names[len(names) - count :]
    _move(model, device, waiting)
    streams = device.type == "cuda"
    for name in waiting:
        block = model.get_submodule(name)
        # What belongs to a packed weight, and does not come and go with it, is on the device.
        block.to(device)
        with _linear_layers_only(block):
            apply_group_offloading(
                block,
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=streams,
                # Backward passes read weights that have gone for others: their memory must not be
                # taken for the next ones before.
                record_stream=streams,
            )


@contextmanager
def _linear_layers_only(block: torch.nn.Module) -> Iterator[None]:
    """Have what is in no linear layer out of sight while the block of code runs."""
    others = [part for part in block.modules() if not isinstance(part, torch.nn.Linear)]
    hidden = [(part, part._parameters, part._buffers) for part in others]
    for part in others:
        part._parameters, part._buffers = {}, {}
    try:
        yield
    finally:
        for part, parameters, buffers in hidden:
            part._parameters, part._buffers = parameters, buffers


def is_swapped(model: torch.nn.Module) -> bool:
    """Whether blocks of a denoiser wait in main memory."""
    return is_group_offloaded(model.get_submodule(block_names(model)[-1]))


def _move(module: torch.nn.Module, device: torch.device, waiting: Iterable[str]) -> None:
    """Move a module but for some of its descendants, given by their names."""
    waiting = list(waiting)
    if not waiting:
        module.to(device)
        return
    for name, child in module.named_children():
        if name in waiting:
            continue
        inside = f"{name}."
        _move(child, device, [n.removeprefix(inside) for n in waiting if n.startswith(inside)])
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.data.to(device)


def move_added(module: torch.nn.Module, before: set[int], device: torch.device) -> None:
    """Move the parameters and buffers that a module has been given since a moment.

    Args:
        module: the module.
        before: ids of the parameters and buffers of that moment.
        device: where they go.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in before:
            tensor.data = tensor.data.to(device)


def tensors_of(module: torch.nn.Module) -> set[int]:
    """The ids of a module's parameters and buffers, see `move_added`."""
    return {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
