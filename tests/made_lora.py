"""A LoRA of random weights for a pipeline, as a training under a method would write it."""

from pathlib import Path
from typing import Any

import torch

import diffattn
from diffattn.lora.adapter import LoraRecord, add_adapter, save_adapter
from diffattn.lora.settings import TrainSettings
from diffattn.methods import from_dict
from diffattn.models import denoisers, family_of

# Methods without dense layers and steps: one that is a mask alone, one with weights of its own.
NEARBY = {"type": "gna", "window": [3, 3, 3], "dense_layers": 0, "dense_steps": 0}
CELLS = {
    "type": "clear",
    "radius": 2,
    "frame_radius": 1,
    "down_factor": 2,
    "dense_layers": 0,
    "dense_steps": 0,
}


def make(
    pipe: Any, folder: Path, method: dict[str, Any], *, denoiser: str | None = None, **settings: Any
) -> dict[str, torch.Tensor]:
    """Write a LoRA for `pipe`, which gets it and the method, into a folder.

    Returns:
        The change of each adapted layer's weight, by the layer's name, from peft's own sum.
    """
    name = denoiser or next(iter(denoisers(pipe)))
    model: Any = getattr(pipe, name)
    given = TrainSettings(attention=method, **{"rank": 2, **settings})
    diffattn.set_attn_processor(pipe, from_dict(method))
    trained = add_adapter(model, given)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    record = LoraRecord(
        method=from_dict(method).to_dict(),
        denoiser=name,
        steps=1,
        latents=(1,),
        settings=given.to_dict(),
        family=family_of(model).name,
    )
    save_adapter(pipe, record, folder)
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
