"""The losses against their definitions, on a model of its own that is dense and has no LoRA."""

import copy
from typing import Any

import pytest
import tiny_training
import tiny_wan
import torch

from diffattn.lora.attention_distance import attention_outputs
from diffattn.lora.draws import draw_batch
from diffattn.lora.losses import Batch, dense_teacher
from diffattn.lora.trainer import Trainer

SITES = [f"blocks.{index}.attn1" for index in range(tiny_wan.LAYERS)]


@pytest.fixture
def trainer(tmp_path: Any) -> Trainer:
    """A training whose LoRA has learnt something."""
    made = tiny_training.trainer(tmp_path, dropout=0.0, attention_every=2)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return made


def a_batch(trainer: Trainer, numbers: tuple[int, ...] = (0, 1, 2)) -> Batch:
    clips = tiny_training.clips()
    scheduler = trainer.pipe.scheduler
    return draw_batch(
        clips, tiny_training.EMPTY, trainer.recipe, scheduler, trainer.settings, numbers
    )


def call(model: Any, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a denoiser of Wan predicts, and the outputs of its first and third attention."""
    level = batch.times.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * batch.latents + level * batch.noise
    with attention_outputs([model.get_submodule(SITES[0]), model.get_submodule(SITES[2])]) as kept:
        out = model(noisy, batch.times * 1000, batch.conditions["prompt_embeds"], return_dict=False)
    return out[0], kept


def squares(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a.double() - b.double()) ** 2).mean())


def test_they_are_what_their_definitions_say(trainer: Trainer) -> None:
    batch = a_batch(trainer)
    losses = trainer._student(batch)
    with torch.no_grad():
        predicted, outputs = call(trainer.model, batch)
        taught, references = call(tiny_wan.transformer(), batch)
    expected = {
        "objective": squares(predicted, batch.noise - batch.latents),
        "prediction": squares(predicted, taught),
        "attention": sum(map(squares, outputs, references)) / 2,
    }
    assert len(references) == 2
    assert {name: losses[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)
    total = expected["objective"] + 0.5 * expected["prediction"] + 0.5 * expected["attention"]
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


def test_the_teacher_is_the_stock_model(trainer: Trainer) -> None:
    batch = a_batch(trainer)
    stock = tiny_wan.transformer()
    with torch.no_grad():
        sparse_before, _ = call(trainer.model, batch)
        with dense_teacher(trainer.model, trainer.attachment):
            taught, _ = call(trainer.model, batch)
        sparse_after, _ = call(trainer.model, batch)
    assert torch.equal(taught, call(stock, batch)[0])
    assert torch.equal(sparse_before, sparse_after)
    assert not torch.allclose(taught, sparse_after, atol=1e-3)


def test_only_losses_with_a_weight_are_computed(tmp_path: Any) -> None:
    made = tiny_training.trainer(tmp_path, prediction=0.0, attention_output=0.0)
    calls = []
    made.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert made._student(a_batch(made)).keys() == {"objective", "loss"}
    assert calls == [True]


def test_gradients_do_not_change_with_checkpointing(trainer: Trainer) -> None:
    batch = a_batch(trainer)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            trainer.model.enable_gradient_checkpointing()
        trainer._student(batch)["loss"].backward()
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        gradients.append([copy.deepcopy(p.grad) for p in parameters])
        trainer._optimizer.zero_grad()
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, again)


def test_a_finished_denoising_run_leaves_training_sparse(tmp_path: Any) -> None:
    """A method's dense steps are of denoising runs: one in between must not make training dense."""
    attention = tiny_training.ATTENTION | {"dense_steps": 1.0}
    made = tiny_training.trainer(tmp_path, attention=attention, dropout=0.0)
    before = made.loss([0, 1])
    assert made.attachment.dense_calls > 0  # the teacher's
    tiny_wan.run(made.pipe)
    assert made.loss([0, 1]) == before
