"""What a training starts from, keeps an eye on, and leaves beside its LoRA."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from diffattn.lora import LoraError, load_lora
from diffattn.lora.adapter import LORA_FILE, LoraRecord, read_record
from diffattn.lora.card import card
from diffattn.lora.convert import convert
from diffattn.lora.describe import describe
from diffattn.lora.held_out import hold_out
from diffattn.lora.plot import plot_losses


def changes(made: Any) -> dict[str, torch.Tensor]:
    """The change of each adapted layer's weight."""
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in made.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training of rank 3 that has ended."""
    made = tiny_training.trainer(tmp_path_factory.mktemp("first"), rank=3, steps=2)
    made.train()
    return made


class TestInitLora:
    @pytest.mark.parametrize("more", [{}, {"rank": 5}, {"rank": 4, "alpha": 7.0, "rslora": True}])
    def test_the_change_is_that_of_the_other_lora(
        self, first: Any, more: dict[str, Any], tmp_path: Path
    ) -> None:
        made = tiny_training.trainer(
            tmp_path, **({"rank": None, "init_lora": str(first.output)} | more)
        )
        assert made.settings.rank == more.get("rank", 3)
        wanted, found = changes(first), changes(made)
        assert wanted.keys() == found.keys()
        for name, change in wanted.items():
            torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-7)
        made.train(until=1)
        assert any(not torch.allclose(changes(made)[name], wanted[name]) for name in wanted)

    def test_one_of_another_program(self, first: Any, tmp_path: Path) -> None:
        file = convert(first.output, tmp_path / "x.safetensors", "comfyui", family="wan")
        made = tiny_training.trainer(tmp_path / "run", rank=None, init_lora=str(file))
        for name, change in changes(first).items():
            torch.testing.assert_close(changes(made)[name], change, rtol=1e-5, atol=1e-7)

    def test_going_on_starts_from_the_checkpoint(self, first: Any, tmp_path: Path) -> None:
        settings = {"rank": None, "init_lora": str(first.output)}
        whole = tiny_training.trainer(tmp_path / "whole", **settings)
        whole.train()
        tiny_training.trainer(tmp_path / "parts", **settings).train(until=2)
        again = tiny_training.trainer(tmp_path / "parts", resume=True, **settings)
        again.train()
        one, other = tiny_training.trained(whole), tiny_training.trained(again)
        assert all(torch.equal(one[name], other[name]) for name in one)

    def refusal(self, folder: Path, **settings: Any) -> str:
        with pytest.raises(LoraError) as error:
            tiny_training.trainer(folder, **settings)
        return str(error.value)

    def test_bad_ones(self, first: Any, tmp_path: Path) -> None:
        place = str(first.output)
        assert self.refusal(tmp_path, rank=2, init_lora=place) == (
            f"rank is 2, but init_lora, {place}, is of rank 3: give a rank of at least 3, or none"
        )
        assert "has a layer blocks.0.attn1.to_k, which is not trained here: name its" in (
            self.refusal(tmp_path, rank=3, init_lora=place, targets=("to_q",))
        )
        missing = tmp_path / "none.safetensors"
        assert self.refusal(tmp_path, rank=3, init_lora=str(missing)) == (
            f"there is no LoRA at {missing}"
        )
        file = tmp_path / "x.safetensors"
        factors = {"lora_A": torch.ones(1, 7), "lora_B": torch.ones(7, 1)}
        save_file(
            {f"transformer.blocks.0.attn1.to_q.{n}.weight": t for n, t in factors.items()}, file
        )
        assert "is for a model of another width: blocks.0.attn1.to_q has 48 inputs" in (
            self.refusal(tmp_path, rank=3, init_lora=str(file))
        )
        assert "init_lora and dora do not go together" in (
            self.refusal(tmp_path, rank=3, init_lora=place, dora=True)
        )
        assert "init_lora is ' ', but must be a name" in self.refusal(tmp_path, init_lora=" ")


class TestMovingAverage:
    def test_it_is_the_mean_that_its_formula_says(self, tmp_path: Path) -> None:
        seen: list[dict[str, torch.Tensor]] = []
        made = tiny_training.trainer(tmp_path, ema=0.5, steps=4)
        seen.append(tiny_training.trained(made))
        made.train(between=lambda _: seen.append(tiny_training.trained(made)))
        average = {name: weight.double() for name, weight in seen[0].items()}
        for step, weights in enumerate(seen[1:], 1):
            kept = min(0.5, (1 + step) / (10 + step))
            for name, weight in weights.items():
                average[name] = kept * average[name] + (1 - kept) * weight.double()
        written = load_file(tmp_path / "ema" / LORA_FILE)
        last = load_file(tmp_path / LORA_FILE)
        assert written.keys() == last.keys()
        for name, weight in written.items():
            parameter = name.removeprefix("transformer.").replace(".weight", ".default.weight")
            torch.testing.assert_close(weight.double(), average[parameter], rtol=1e-5, atol=1e-7)
        assert any(not torch.equal(written[name], last[name]) for name in last)

    def test_it_is_a_lora_like_the_other(self, tmp_path: Path) -> None:
        made = tiny_training.trainer(tmp_path, ema=0.9, steps=2)
        made.train()
        assert read_record(tmp_path / "ema") == read_record(tmp_path)
        pipe = WanPipeline(**tiny_training.tiny_wan.PIPELINES["t2v"]().components)
        assert load_lora(pipe, tmp_path / "ema") is not None

    def test_going_on_gives_the_same_bits(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path / "whole", ema=0.9).train()
        tiny_training.trainer(tmp_path / "parts", ema=0.9).train(until=2)
        tiny_training.trainer(tmp_path / "parts", ema=0.9, resume=True).train()
        one, other = (load_file(tmp_path / name / "ema" / LORA_FILE) for name in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_the_training_is_the_same_without_it(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path / "with", ema=0.9, held_out=None).train()
        tiny_training.trainer(tmp_path / "without").train()
        one, other = (load_file(tmp_path / name / LORA_FILE) for name in ("with", "without"))
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert not (tmp_path / "without" / "ema").exists()

    def test_bad_values_and_a_checkpoint_without_it(self, tmp_path: Path) -> None:
        for value in (0, 1, 1.5, -0.1, True):
            with pytest.raises(
                LoraError, match=r"ema is .*, but must be a number above 0 and below 1"
            ):
                tiny_training.settings(ema=value)
        tiny_training.trainer(tmp_path, ema=0.9).train(until=2)
        (tmp_path / "checkpoints" / "step-000002" / "average.safetensors").unlink()
        with pytest.raises(LoraError, match=r"cannot read .*average\.safetensors: .*; remove the"):
            tiny_training.trainer(tmp_path, ema=0.9, resume=True)


class TestHeldOut:
    def looks(self, folder: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in (folder / "held-out.jsonl").read_text().splitlines()]

    def test_the_same_loss_at_every_look_of_an_unchanged_model(self, tmp_path: Path) -> None:
        made = tiny_training.trainer(tmp_path, held_out=2, learning_rate=1e-30)
        made.train()
        looks = self.looks(tmp_path)
        assert [look["step"] for look in looks] == [0, 2, 4, 5]
        assert looks[0].keys() == {"step", "objective", "prediction", "attention", "loss"}
        losses = [look["loss"] for look in looks]
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)

    def test_they_are_not_learnt_from(self, tmp_path: Path) -> None:
        clips = tiny_training.clips()
        learnt, held = hold_out(clips, 2, seed=0)
        assert held is not None
        assert sorted([*learnt.keys, *held.keys]) == clips.keys
        assert len(held) == 2
        assert hold_out(clips, 2, seed=0)[0].keys == learnt.keys
        assert {tuple(hold_out(clips, 2, seed=seed)[1].keys) for seed in range(9)} != {
            tuple(held.keys)
        }
        made = tiny_training.trainer(tmp_path, held_out=2, steps=1)
        made.train()
        record = read_record(tmp_path)
        assert record is not None
        assert record.clips == 3

    def test_looking_changes_nothing_in_the_training(self, tmp_path: Path) -> None:
        clips = tiny_training.clips()
        learnt, _ = hold_out(clips, 2, seed=0)
        made = tiny_training.trainer(tmp_path / "with", held_out=2)
        made.train()
        plain = tiny_training.Trainer(
            tiny_training.tiny_wan.PIPELINES["t2v"](),
            learnt,
            tiny_training.EMPTY,
            tiny_training.settings(),
            tmp_path / "without",
        )
        plain.train()
        one, other = tiny_training.trained(made), tiny_training.trained(plain)
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_going_on_repeats_no_look(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path / "whole", held_out=1).train()
        tiny_training.trainer(tmp_path / "parts", held_out=1).train(until=2)
        tiny_training.trainer(tmp_path / "parts", held_out=1, resume=True).train()
        assert self.looks(tmp_path / "whole") == self.looks(tmp_path / "parts")

    def test_too_many(self, tmp_path: Path) -> None:
        with pytest.raises(LoraError) as error:
            tiny_training.trainer(tmp_path, held_out=5)
        assert str(error.value) == (
            "held_out is 5, but there are 5 clips, of which one at least must be learnt from: hold"
            " out fewer"
        )


class TestPlot:
    def colours(self, file: Path) -> set[tuple[int, ...]]:
        return {tuple(row) for row in np.asarray(Image.open(file)).reshape(-1, 3).tolist()}

    def test_a_training_draws_it(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path, held_out=1).train()
        found = self.colours(tmp_path / "losses.png")
        assert {(198, 212, 230), (31, 78, 140), (192, 57, 43)} <= found
        assert not (tmp_path / ".losses.png").exists()

    def test_a_falling_loss_goes_down(self, tmp_path: Path) -> None:
        file = tmp_path / "x.png"
        plot_losses([(i, 2.0 - i / 100) for i in range(1, 101)], [], file)
        picture = np.asarray(Image.open(file))
        rows, columns = np.nonzero((picture == (31, 78, 140)).all(-1))
        in_plot = rows > 40
        rows, columns = rows[in_plot], columns[in_plot]
        assert rows[columns.argmax()] > rows[columns.argmin()] + 300

    @pytest.mark.parametrize(
        "losses",
        [[], [(1, 0.5)], [(1, 0.0), (2, -1.0)], [(1, math.inf), (2, math.nan)], [(1, 2.0)] * 3],
    )
    def test_losses_of_every_kind(self, losses: list[Any], tmp_path: Path) -> None:
        plot_losses(losses, losses, tmp_path / "x.png")
        assert Image.open(tmp_path / "x.png").size == (960, 540)


class TestCard:
    RECORD = LoraRecord(
        method={"type": "gna", "window": [3, 3, 3]},
        denoiser="transformer_2",
        steps=250,
        latents=(16, 3, 12, 8),
        settings={"rank": 4, "alpha": 8.0, "init_lora": None},
        family="wan",
        model="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        density=0.153,
        clips=12,
    )

    def test_what_it_says(self) -> None:
        text = card(self.RECORD, {"loss": (0.2, 0.1)})
        header, body = text.split("---\n")[1:3]
        assert 'base_model: "Wan-AI/Wan2.2-T2V-A14B-Diffusers"\n' in header
        assert "- gna\n" in header
        for line in (
            "| base model | Wan-AI/Wan2.2-T2V-A14B-Diffusers (wan) |",
            "| attention | gna (window=[3, 3, 3]) |",
            "| density | 15.3% of the token pairs, at the size of the training |",
            "| clips | 12 |",
            "| rank, alpha | 4, 8.0 |",
            "| loss | 0.2 | 0.1 |",
            "pipe.load_lora_weights(FOLDER, load_into_transformer_2=True)",
        ):
            assert line in body, line
        assert "started from" not in body

    def test_a_training_writes_it_and_keeps_another(self, tmp_path: Path) -> None:
        made = tiny_training.trainer(tmp_path, held_out=2, steps=2)
        made.train()
        text = (tmp_path / "README.md").read_text()
        assert "| loss on held-out clips | " in text
        assert "| clips | 3 |" in text
        assert describe(tmp_path)[0].figures.keys() == {"loss", "loss on held-out clips"}
        (tmp_path / "README.md").write_text("mine")
        made.save()
        assert (tmp_path / "README.md").read_text() == "mine"
