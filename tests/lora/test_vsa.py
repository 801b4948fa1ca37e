"""The gate of VSA is trained with a LoRA, saved, and loaded again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_complete import COMPLETE

from diffattn.lora import load_lora
from diffattn.lora.recipes import recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.lora.teacher import teach
from diffattn.lora.trainer import Trainer
from diffattn.methods.vsa.gate import VSAGate


def gates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.detach()
        for name, module in model.named_modules()
        if isinstance(module, VSAGate)
        for key, value in module.named_parameters()
    }


@pytest.mark.parametrize("name", ["wan", "hunyuanvideo"])
def test_the_gate_is_trained_saved_and_loaded(name: str, tmp_path: Path) -> None:
    case = COMPLETE[name]
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    recipe = recipe_for(pipe, text_length=case.text_length)
    clips = teach(pipe, recipe, ["a cat"], tmp_path / "clips", *case.size, samples=2, steps=2)
    settings = TrainSettings(
        attention={"type": "vsa", "coarse": True, "keep": 0.5},
        rank=2,
        steps=2,
        batch_size=2,
        learning_rate=0.01,
        prediction=0.5,
        attention_output=0.5,
        attention_every=1,
        gradient_checkpointing=True,
    )
    trainer = Trainer(pipe, clips, clips.empty, settings, tmp_path, recipe=recipe)
    reports: list[Any] = []
    trainer.train(report=reports.append)
    assert all(torch.tensor(list(report.losses.values())).isfinite().all() for report in reports)
    trained = gates(trainer.model)
    assert len(trained) > 2
    assert all(weight.abs().max() > 0 for weight in trained.values())

    fresh = case.build()
    load_lora(fresh, tmp_path)
    loaded = gates(getattr(fresh, recipe.denoiser))
    assert loaded.keys() == trained.keys()
    for key, weight in loaded.items():
        assert torch.equal(weight, trained[key])
