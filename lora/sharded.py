"""A training whose weights FSDP 2 spreads over processes: each process holds a part of each weight.

accelerate's own checkpoints of such a run hold the whole model, frozen weights included, in pickled
files that can run code when they are read. The state that is written here is that of the trained
weights alone, in the files of a run whose processes hold all weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from diffattn.lora.errors import LoraError
from diffattn.lora.optimizers import USUAL

_OPTIMIZER = "optimizer.bin"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP spreads the weights over processes."""
    return bool(accelerator.distributed_type.value == "FSDP")


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse launchers' ways of spreading a model that this library has not been run with.

    Args:
        environment: the environment that `accelerate launch` has set.

    Raises:
        LoraError: for DeepSpeed, Megatron-LM, and FSDP 1.
    """

    def asked(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1")

    for name, variable in (
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"),
        ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM"),
    ):
        if asked(variable):
            raise LoraError(
                f"{name} is asked for, but lora train has never been run with it: spread the model"
                f" by FSDP 2 (accelerate launch --use_fsdp --fsdp_version 2, see docs/lora.md)"
            )
    version = environment.get("FSDP_VERSION", "1")
    if asked("ACCELERATE_USE_FSDP") and version != "2":
        raise LoraError(
            f"FSDP is asked for in version {version}, but must be version 2: accelerate launch"
            f" --use_fsdp --fsdp_version 2"
        )


def check_sharding(accelerator: Accelerator, environment: Mapping[str, str]) -> None:
    """Check that a run that was asked to spread its weights does so, and can.

    Args:
        accelerator: the accelerator of the run.
        environment: the environment that `accelerate launch` has set.

    Raises:
        LoraError: if FSDP is asked for on a device that accelerate has no FSDP for, in another
            version than 2, with weights that only the first process reads, with activation
            checkpointing of its own, or with mixed precision; or for DeepSpeed and Megatron-LM.
    """
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        check_launch({f"ACCELERATE_USE_{kind}": "true"})
    if kind != "FSDP":
        if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise LoraError(
                f"FSDP is asked for, but on {accelerator.device.type} accelerate gives each process"
                f" a copy of the model instead: leave --use_fsdp out, or train on accelerators"
            )
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        check_launch({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(plugin.fsdp_version)})
    if plugin.cpu_ram_efficient_loading:
        raise LoraError(
            "FSDP is asked to load weights in the first process alone, which leaves the text"
            " encoders of the others empty: give --fsdp_cpu_ram_efficient_loading false"
        )
    if accelerator.mixed_precision != "no":
        raise LoraError(
            f"mixed_precision is {accelerator.mixed_precision}, by which FSDP casts all weights,"
            f" the LoRA's too: give no, and --dtype for what the frozen model computes in"
        )
    if plugin.activation_checkpointing:
        raise LoraError(
            "FSDP is asked for activation checkpointing, which renames the layers: give"
            " --gradient-checkpointing to lora train instead of --fsdp_activation_checkpointing"
        )


def check_weights(model: torch.nn.Module, optimizer: str) -> None:
    """Check that FSDP can spread a model's weights, and that its run with the optimiser was tried.

    Raises:
        LoraError: if a weight is a single number, or stored in fewer than 16 bits, or if the
            optimiser is another than the usual.
    """
    if optimizer != USUAL:
        raise LoraError(
            f"optimizer is {optimizer}, but under FSDP no other than {USUAL} was ever run: leave"
            " optimizer out, or train without --use_fsdp"
        )
    small = [
        name for name, weight in model.named_parameters()
        if type(weight.data) is not torch.Tensor or weight.element_size() < 2
    ]  # fmt: skip
    if small:
        raise LoraError(
            "FSDP was never run with weights stored in fewer than 16 bits, such as"
            f" {small[0]}: leave base_dtype out, or train without --use_fsdp"
        )
    single = [name for name, weight in model.named_parameters() if weight.ndim == 0]
    if single:
        raise LoraError(
            f"FSDP cannot spread a weight that is a single number, and {type(model).__name__} has"
            f" {len(single)}, such as {single[0]}: train it without --use_fsdp"
        )


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight with the parts of all processes; every process must call this for it."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def save_sharded(
    accelerator: Accelerator,
    student: torch.nn.Module,
    optimizer: Any,
    trained: Mapping[str, torch.nn.Parameter],
    folder: Path,
    file: str,
) -> None:
    """Write the state of a run into a folder; every process calls this.

    Args:
        accelerator: the accelerator of the run.
        student, optimizer: the prepared module and optimiser.
        trained: the trained weights by name.
        folder: the folder, which exists.
        file: the name of the file of the trained weights.
    """
    tensors = {name: whole(weight).cpu().contiguous() for name, weight in trained.items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(student, optimizer.optimizer, options=options)
    if accelerator.is_main_process:
        save_file(tensors, folder / file)
        torch.save(state, folder / _OPTIMIZER)
    save_accelerator_state(
        str(folder), [], [], [], [], accelerator.process_index, accelerator.step, accelerator.scaler
    )


def load_sharded(
    accelerator: Accelerator,
    student: torch.nn.Module,
    optimizer: Any,
    trained: Mapping[str, torch.nn.Parameter],
    folder: Path,
    file: str,
) -> None:
    """Put a run into the state that `save_sharded` has written; every process calls this."""
    saved = load_file(folder / file)
    with torch.no_grad():
        for name, weight in trained.items():
            value = saved[name].to(weight.device)
            if isinstance(weight, DTensor):
                value = distribute_tensor(value, weight.device_mesh, weight.placements)
            weight.copy_(value)
    state = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(student, optimizer.optimizer, state, options=options)
    load_accelerator_state(
        str(folder), [], [], [], [], accelerator.process_index, accelerator.scaler
    )
