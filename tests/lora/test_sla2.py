"""SLA2 is trained in two stages: the router and alpha alone, then alpha and a LoRA."""

from pathlib import Path
from typing import Any

import pytest
import tiny_training
import tiny_wan
import torch

from diffattn import load_sla_checkpoint, set_attn_processor
from diffattn.lora import load_lora
from diffattn.lora.adapter import METHOD_FILE
from diffattn.lora.errors import LoraError
from diffattn.lora.trainer import Trainer
from diffattn.methods import from_dict

HARD: dict[str, Any] = {"type": "sla2", "keep": 0.3, "block_q": 16, "block_kv": 16}
SOFT = HARD | {"selecting": "soft", "tau": 10.0}


def own_weights(made: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in made.model.named_parameters() if ".sla2." in n}


def lora_weights(made: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in made.model.named_parameters() if ".lora_" in n}


def first_stage(output: Path, **changes: Any) -> Trainer:
    made = tiny_training.trainer(
        output,
        **{
            "attention": SOFT,
            "method_only": True,
            "objective": 0.0,
            "prediction": 0.0,
            "attention_output": 1.0,
            "attention_every": 1,
            "steps": 12,
            "learning_rate": 1e-2,
        }
        | changes,
    )
    # Tokens that differ: with the tiny model's small projections all keys are alike.
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "attn1.to" in name and "lora" not in name:
                parameter.mul_(6)
    return made


def test_the_two_stages(tmp_path: Path) -> None:
    one = first_stage(tmp_path / "one")
    assert {name.rsplit(".", 1)[1] for name in tiny_training.trained(one)} == {
        "router_q",
        "router_k",
        "alpha_logits",
    }
    start, lora = own_weights(one), lora_weights(one)
    before = one.loss(range(8))["attention"]
    one.train()
    assert one.loss(range(8))["attention"] < before
    learnt = own_weights(one)
    assert all(not torch.equal(learnt[name], start[name]) for name in start)
    for name, factor in lora_weights(one).items():
        assert torch.equal(factor, lora[name])
    assert all(p.grad is None for n, p in one.model.named_parameters() if ".lora_" in n)

    two = tiny_training.trainer(
        tmp_path / "two", attention=HARD, method_weights=str(tmp_path / "one"), steps=3
    )
    for name, weight in own_weights(two).items():
        assert torch.equal(weight, learnt[name])
    lora = lora_weights(two)
    two.train()
    for name, weight in own_weights(two).items():
        assert torch.equal(weight, learnt[name]) == ("router" in name)
    assert all(not torch.equal(factor, lora[name]) for name, factor in lora_weights(two).items())

    pipe = tiny_wan.PIPELINES["t2v"]()
    load_lora(pipe, tmp_path / "two")
    for name, weight in own_weights(two).items():
        assert torch.equal(pipe.transformer.get_parameter(name), weight)
    model = tiny_wan.transformer()
    set_attn_processor(model, from_dict(HARD))
    load_sla_checkpoint(model, tmp_path / "one" / METHOD_FILE)
    for name, weight in learnt.items():
        assert torch.equal(model.get_parameter(name), weight)


def test_the_second_stage_may_start_from_another_expert(tmp_path: Path) -> None:
    experts = tiny_wan.PIPELINES["two experts"]
    one = first_stage(tmp_path / "one", pipe=experts(), denoiser="transformer_2", steps=1)
    one.train()
    for denoiser in ("transformer", "transformer_2"):
        two = tiny_training.trainer(
            tmp_path / denoiser,
            pipe=experts(),
            attention=HARD,
            method_weights=str(tmp_path / "one"),
            denoiser=denoiser,
        )
        learnt = own_weights(one)
        assert learnt
        for name, weight in own_weights(two).items():
            assert torch.equal(weight, learnt[name])


def test_a_run_that_goes_on_is_the_run_that_did_not_stop(tmp_path: Path) -> None:
    whole = first_stage(tmp_path / "whole", steps=3, checkpoint_every=1)
    whole.train()
    first_stage(tmp_path / "parts", steps=3, checkpoint_every=1).train(until=2)
    rest = first_stage(tmp_path / "parts", steps=3, checkpoint_every=1, resume=True)
    assert rest.step == 2
    rest.train()
    for name, weight in own_weights(whole).items():
        assert torch.equal(own_weights(rest)[name], weight)


def test_a_method_without_weights_has_nothing_to_train_alone(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="method_only is true, but gna with these parameters has n"):
        tiny_training.trainer(tmp_path, method_only=True)


def test_weights_to_start_from_must_be_there_and_fit(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"method_weights is .*nowhere, but must be the output fol"):
        tiny_training.trainer(
            tmp_path / "a", attention=HARD, method_weights=str(tmp_path / "nowhere")
        )
    first_stage(tmp_path / "one", steps=1).train()
    with pytest.raises(LoraError, match="does not fit the attached method: 3 weights differ in na"):
        tiny_training.trainer(
            tmp_path / "b",
            attention=HARD | {"positions": 2},
            method_weights=str(tmp_path / "one"),
        )
    with pytest.raises(LoraError, match="method_weights is '', but must be the path of a folder"):
        tiny_training.settings(method_weights="")
