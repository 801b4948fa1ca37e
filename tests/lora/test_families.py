"""Every family with a recipe: data of its own teacher, a short training, and back to stock."""

from pathlib import Path
from typing import Any

import pytest
import torch
from made_lora import NEARBY
from tiny_complete import COMPLETE

import diffattn
from diffattn.lora.adapter import read_record
from diffattn.lora.recipes import recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.lora.teacher import teach
from diffattn.lora.trainer import Trainer
from diffattn.models import denoisers, family_of


def latents(case: Any, pipe: Any) -> torch.Tensor:
    out = case.run(pipe, "a cat", output_type="latent")
    return out if isinstance(out, torch.Tensor) else torch.as_tensor(out)


# One pipeline of each, and those whose adapter is particular: two experts, two text encoders.
PIPELINES = (
    "wan", "wan-two-experts", "hunyuanvideo", "cogvideox-2b", "ltx", "mochi", "flux",
    "flux.2-klein", "qwen-image", "sd3.5", "sd1.5", "sdxl",
)  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_train_save_and_load_in_stock_diffusers(name: str, tmp_path: Path) -> None:
    case = COMPLETE[name]
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    recipe = recipe_for(pipe, text_length=case.text_length)
    clips = teach(pipe, recipe, ["a cat"], tmp_path / "clips", *case.size, samples=2, steps=2)
    settings = TrainSettings(
        attention={"type": "linfusion"} if recipe.family == "unet" else NEARBY,
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
    assert reports[-1].losses.keys() == {"objective", "prediction", "attention", "loss"}
    factors = {n: p for n, p in trainer.model.named_parameters() if "lora_B" in n}
    assert len(factors) == _projections(denoisers(case.build())[recipe.denoiser])
    assert all(factor.abs().max() > 0 for factor in factors.values())

    diffattn.set_attn_processor(pipe, None)
    trained = latents(case, pipe)
    stock = case.build()
    untrained = latents(case, stock)
    second = {"load_into_transformer_2": True} if recipe.denoiser == "transformer_2" else {}
    stock.load_lora_weights(tmp_path, **second)
    assert torch.equal(latents(case, stock), trained)
    assert not torch.equal(untrained, trained)
    record = read_record(tmp_path)
    assert record is not None
    assert record.denoiser == recipe.denoiser


def _projections(model: torch.nn.Module) -> int:
    """Projections of the attention sites; blocks of one stream have none of their own behind."""
    modules = dict(model.named_modules())
    names = [
        f"{site}.{target}"
        for site in family_of(model).layers(model)
        for target in ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "to_out")
    ]
    return sum(isinstance(modules.get(name), torch.nn.Linear) for name in names)
