"""Training of a LoRA that adapts a pipeline to its sparse attention.

    settings = TrainSettings(attention=RadialAttn().to_dict(), steps=500)
    recipe = recipe_for(pipe)
    clips = prepare(pipe, recipe, clips_with_captions, folder, height, width, num_frames)
    Trainer(pipe, clips, clips.empty, settings, output).train()

`diffattn lora train` runs all these steps. `load_lora(pipe, folder)` loads the LoRA and attaches
its method; stock `pipe.load_lora_weights` loads the LoRA alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffattn.lora.errors import LoraError

if TYPE_CHECKING:
    from diffattn.lora.adapter import LoraRecord, load_method_weights, read_record
    from diffattn.lora.cache import CachedClips
    from diffattn.lora.encoding import prepare
    from diffattn.lora.loading import Lora, load_lora, load_loras
    from diffattn.lora.recipes import recipe_for
    from diffattn.lora.settings import TrainSettings
    from diffattn.lora.teacher import teach
    from diffattn.lora.trainer import StepReport, Trainer

# These modules import peft, accelerate and diffusers, which takes seconds: they load when needed.
_HOMES = {
    "CachedClips": "cache",
    "Lora": "loading",
    "LoraRecord": "adapter",
    "StepReport": "trainer",
    "TrainSettings": "settings",
    "Trainer": "trainer",
    "load_lora": "loading",
    "load_loras": "loading",
    "load_method_weights": "adapter",
    "prepare": "encoding",
    "read_record": "adapter",
    "recipe_for": "recipes",
    "teach": "teacher",
}

__all__ = [
    "CachedClips",
    "Lora",
    "LoraError",
    "LoraRecord",
    "StepReport",
    "TrainSettings",
    "Trainer",
    "load_lora",
    "load_loras",
    "load_method_weights",
    "prepare",
    "read_record",
    "recipe_for",
    "teach",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffattn.lora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffattn.lora.{_HOMES[name]}"), name)
