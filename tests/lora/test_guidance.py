"""The guidance scale that a guidance-distilled denoiser is told in training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from made_lora import NEARBY
from tiny_complete import COMPLETE

from diffattn.lora.draws import draw_batch
from diffattn.lora.losses import Student
from diffattn.lora.recipes import recipe_for
from diffattn.lora.recipes.flux import FluxRecipe
from diffattn.lora.settings import TrainSettings
from diffattn.lora.trainer import Trainer

# What their pipelines tell them, in the unit in which their denoisers take it.
SAMPLING = {"flux": 3.5, "flux.2": 4.0, "hunyuanvideo": 6000.0}
UNIT = {"flux": 1.0, "flux.2": 1.0, "hunyuanvideo": 1000.0}


def trainer(name: str, folder: Path, **changes: Any) -> Trainer:
    case = COMPLETE[name]
    pipe = case.build()
    recipe = recipe_for(pipe, text_length=case.text_length)
    height, width, num_frames = case.size
    pixels = torch.zeros(1, 3, num_frames, height, width)
    latents = recipe.encode_clip(pipe, pixels, None)[0]
    empty = {key: value[0] for key, value in recipe.encode_prompt(pipe, [""]).items()}
    clip = {"latents": latents, "conditions": empty, "key": "clip"}
    settings = TrainSettings(attention=NEARBY, rank=2, steps=2, learning_rate=1e-2, **changes)
    return Trainer(pipe, tiny_training.Clips([clip]), empty, settings, folder, recipe=recipe)


def told(made: Trainer) -> list[float]:
    """The scales that the denoiser is told in a forward, in the order of its calls."""
    scales: list[float] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        scales.extend(kwargs["guidance"].tolist())

    hook = made.model.register_forward_pre_hook(note, with_kwargs=True)
    made.loss([0])
    hook.remove()
    return scales


@pytest.mark.parametrize("name", SAMPLING)
class TestScales:
    def test_clips_are_not_guided(self, name: str, tmp_path: Path) -> None:
        assert told(trainer(name, tmp_path)) == [UNIT[name]]

    def test_the_dense_model_is_imitated_at_the_scale_of_sampling(
        self, name: str, tmp_path: Path
    ) -> None:
        made = trainer(name, tmp_path, objective=0, prediction=1)
        assert told(made) == [SAMPLING[name]] * 2
        made = trainer(name, tmp_path, objective=0, attention_output=1, teacher_guidance=2.5)
        assert told(made) == [2.5 * UNIT[name]] * 2

    def test_losses_of_both_kinds_have_a_scale_each(self, name: str, tmp_path: Path) -> None:
        both = {"objective": 1, "prediction": 0.5, "attention_output": 0.5}
        made = trainer(name, tmp_path, **both)
        assert told(made) == [SAMPLING[name], SAMPLING[name], UNIT[name]]
        losses = made.loss([0])
        assert list(losses) == ["objective", "prediction", "attention", "loss"]
        made.train()
        assert any(p.abs().max() > 0 for n, p in made.model.named_parameters() if "lora_B" in n)

    def test_with_one_scale_for_both_the_denoiser_is_called_once(
        self, name: str, tmp_path: Path
    ) -> None:
        same = {"objective": 1, "prediction": 0.5, "guidance": 2, "teacher_guidance": 2}
        assert told(trainer(name, tmp_path, **same)) == [2 * UNIT[name]] * 2


class Guided(FluxRecipe):
    """A denoiser into which guidance is distilled, and which has nothing else to learn."""

    def predict(self, model: Any, noisy: Any, times: Any, conditions: Any) -> torch.Tensor:
        assert self.guidance is not None
        conditioned, alone = conditions["conditioned"], conditions["alone"]
        return alone + self.guidance * (conditioned - alone)


def test_a_guided_model_that_has_nothing_to_learn_learns_nothing(tmp_path: Path) -> None:
    made = trainer("flux", tmp_path)
    own = {f.name: getattr(made.recipe, f.name) for f in dataclasses.fields(made.recipe)}
    recipe = Guided(**own)
    batch = draw_batch(made._clips, made._empty, recipe, made.pipe.scheduler, made.settings, [0, 1])
    conditioned = recipe.target(made.pipe.scheduler, batch.latents, batch.noise, batch.times)
    alone = torch.randn(conditioned.shape, generator=torch.Generator().manual_seed(0))
    batch = dataclasses.replace(batch, conditions={"conditioned": conditioned, "alone": alone})

    def loss(**changes: Any) -> float:
        settings = dataclasses.replace(made.settings, **changes)
        student = Student(made.model, recipe, made.pipe.scheduler, made.attachment, settings)
        return float(student(batch)["objective"])

    assert loss() < 1e-10
    assert loss(guidance=3.5) > 1


class TestRefused:
    @pytest.mark.parametrize("name", ["guidance", "teacher_guidance"])
    def test_a_model_that_is_told_no_scale(self, name: str, tmp_path: Path) -> None:
        message = rf"^{name} is 2, but this wan model has no guidance scale among its inputs"
        with pytest.raises(ValueError, match=message):
            tiny_training.trainer(tmp_path, **{name: 2})
        schnell = COMPLETE["flux"].build()
        schnell.transformer.register_to_config(guidance_embeds=False)
        assert recipe_for(schnell).guidance is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"guidance": 2.0, "objective": 0, "prediction": 1},
                "guidance is 2, but objective is 0, so that nothing is told it: leave it out",
            ),
            (
                {"teacher_guidance": 2.0},
                "teacher_guidance is 2, but prediction and attention_output are 0, so that",
            ),
            ({"guidance": -1}, "guidance is -1, but must be a number of at least 0 and at most"),
        ],
    )
    def test_a_scale_that_nothing_is_told(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TrainSettings(**changes)
