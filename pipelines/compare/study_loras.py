"""The LoRAs of a study of the bundled model: one for each method, from rendered clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffattn.lora import LoraError, Trainer, TrainSettings, recipe_for
from diffattn.lora.adapter import LORA_FILE
from diffattn.lora.checkpoint import alone_in
from diffattn.lora.trainer import check_output
from diffattn.samples.moving_shapes import MODEL_DIR
from diffattn.samples.moving_shapes.adaptation import RenderedClips
from diffattn.samples.moving_shapes.evaluate import load_pipeline

from ..errors import UserError
from ..run.machine import quiet_libraries

# As in benchmarks/lora.py, whose table says what they recover.
_STEPS = 200
_RANK = 64
_RATE = 4e-3
_CLIPS = 1024


def train(method: dict[str, Any], folder: Path, say: Callable[[str], None]) -> None:
    """Train a LoRA under a method, unless the folder holds it; a stopped training goes on.

    Raises:
        UserError: if the training fails.
    """
    if (folder / LORA_FILE).is_file():
        return
    quiet_libraries()
    settings = TrainSettings(
        attention=method,
        rank=_RANK,
        alpha=_RANK,
        steps=_STEPS,
        learning_rate=_RATE,
        schedule="cosine",
        warmup_steps=min(10, _STEPS // 2),
        objective=1.0,
        prediction=1.0,
        attention_output=0.0,
        checkpoint_every=25,
        keep_checkpoints=1,
    )
    try:
        check_output(folder, resume=True)
        with alone_in(folder):
            pipe = load_pipeline(MODEL_DIR)
            recipe = recipe_for(pipe)
            clips = RenderedClips(pipe, recipe, _CLIPS)
            trainer = Trainer(
                pipe, clips, clips.empty, settings, folder, recipe=recipe, resume=True
            )
            say(f"{folder}: training a LoRA under {method['type']}, {_STEPS} steps")
            trainer.train()
    except LoraError as error:
        raise UserError(error) from None
