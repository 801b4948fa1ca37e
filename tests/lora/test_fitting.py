"""Trainings that fit: few bytes for frozen weights, blocks in main memory, small optimisers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import tiny_wan
import torch
from diffusers.hooks import group_offloading

from diffattn.lora.errors import LoraError
from diffattn.lora.frozen import store_in_fp8, stored_layers
from diffattn.lora.trainer import Trainer

SWAPPED = {"gradient_checkpointing": True, "swap_blocks": 2}


def weights_after(made: Trainer, steps: int | None = None) -> dict[str, torch.Tensor]:
    made.train(until=steps)
    return tiny_training.trained(made)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Waiting weights are NaN until they come back; the list has an entry for each coming."""
    comings: list[str] = []
    kept: dict[int, torch.Tensor] = {}
    group_class = group_offloading.ModuleGroup

    def tensors(group: Any) -> list[torch.Tensor]:
        inside = [t for m in group.modules for t in (*m.parameters(), *m.buffers())]
        return [*inside, *group.parameters, *group.buffers]

    def come(group: Any) -> None:
        for tensor in tensors(group):
            if id(tensor) in kept:
                tensor.data = kept.pop(id(tensor))
                comings.append("")

    def go(group: Any) -> None:
        for tensor in tensors(group):
            if id(tensor) not in kept:
                kept[id(tensor)] = tensor.data
                tensor.data = torch.full_like(tensor, float("nan"))

    monkeypatch.setattr(group_class, "onload_", come)
    monkeypatch.setattr(group_class, "offload_", go)
    return comings


class TestSwapping:
    @pytest.mark.parametrize("offload_activations", [False, True])
    def test_no_bit_changes_and_no_waiting_weight_is_read(
        self, poisoned: list[str], offload_activations: bool, tmp_path: Path
    ) -> None:
        plain = weights_after(tiny_training.trainer(tmp_path / "plain"))
        assert poisoned == []
        changes = SWAPPED | {"offload_activations": offload_activations}
        made = tiny_training.trainer(tmp_path / "swapped", **changes)
        waiting = made.model.blocks[-1].ffn.net[2].weight
        assert waiting.isnan().all()
        assert not made.model.blocks[0].ffn.net[2].weight.isnan().any()
        assert equal(weights_after(made), plain)
        assert len(poisoned) > 100
        assert waiting.isnan().all()

    def test_a_run_may_go_on_with_more_or_fewer_blocks(self, tmp_path: Path) -> None:
        whole = weights_after(tiny_training.trainer(tmp_path / "whole"))
        tiny_training.trainer(tmp_path / "run").train(until=2)
        tiny_training.trainer(tmp_path / "run", resume=True, **SWAPPED).train(until=4)
        changes = SWAPPED | {"swap_blocks": 1}
        last = tiny_training.trainer(tmp_path / "run", resume=True, **changes)
        assert equal(weights_after(last), whole)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"swap_blocks": 4}, "swap_blocks is 4, but WanTransformer3DModel has 3 blocks"),
            ({"swap_blocks": 0}, "swap_blocks is 0, but must be"),
            ({"dora": True}, "dora reads the weights of layers while these wait"),
            (
                {"gradient_checkpointing": False},
                "swap_blocks is 2, but gradient_checkpointing is off",
            ),
            (
                {
                    "swap_blocks": None,
                    "offload_activations": True,
                    "gradient_checkpointing": False,
                },
                "offload_activations is True, but gradient_checkpointing is off",
            ),
        ],
    )
    def test_what_is_refused(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(LoraError, match=message):
            tiny_training.trainer(tmp_path, **(SWAPPED | changes))


def in_fp8() -> Any:
    pipe = tiny_wan.PIPELINES["t2v"]()
    store_in_fp8(pipe.transformer, torch.float32)
    return pipe


def in_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    pipe = tiny_wan.PIPELINES["t2v"]()
    stored = set(stored_layers(pipe.transformer))
    quantize_(pipe.transformer, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in stored)
    return pipe


@pytest.mark.parametrize("base", [in_fp8, in_int8])
class TestFrozenWeights:
    def test_training_stops_and_goes_on_bit_for_bit(
        self, base: Callable[[], Any], tmp_path: Path
    ) -> None:
        whole = tiny_training.trainer(tmp_path / "whole", pipe=base())
        before = tiny_training.trained(whole)
        after = weights_after(whole)
        assert not equal(before, after)
        tiny_training.trainer(tmp_path / "run", pipe=base()).train(until=3)
        run = tiny_training.trainer(tmp_path / "run", pipe=base(), resume=True)
        assert equal(weights_after(run), after)

    def test_blocks_may_wait_in_main_memory(self, base: Callable[[], Any], tmp_path: Path) -> None:
        changes = {"gradient_checkpointing": True}
        whole = weights_after(tiny_training.trainer(tmp_path / "a", pipe=base(), **changes))
        swapped = tiny_training.trainer(tmp_path / "b", pipe=base(), **SWAPPED)
        assert equal(weights_after(swapped), whole)

    def test_a_run_does_not_go_on_with_other_weights(
        self, base: Callable[[], Any], tmp_path: Path
    ) -> None:
        tiny_training.trainer(tmp_path, pipe=base()).train(until=2)
        with pytest.raises(LoraError, match=r"cannot go on from .*: its model is"):
            tiny_training.trainer(tmp_path, resume=True)


OPTIMIZERS = [
    ("torch.Adafactor", {}),
    ("torch.SGD", {"momentum": 0.9}),
    ("torchao.AdamW8bit", {}),
    ("schedulefree.AdamWScheduleFree", {"warmup_steps": 2}),
]


class TestOptimizers:
    @pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
    def test_training_stops_and_goes_on_bit_for_bit(
        self, name: str, options: dict[str, Any], tmp_path: Path
    ) -> None:
        changes = {"optimizer": name, "optimizer_args": options, "held_out": 1}
        usual = weights_after(tiny_training.trainer(tmp_path / "usual", held_out=1))
        whole = weights_after(tiny_training.trainer(tmp_path / "whole", **changes))
        assert not equal(usual, whole)
        tiny_training.trainer(tmp_path / "run", **changes).train(until=3)
        run = tiny_training.trainer(tmp_path / "run", resume=True, **changes)
        assert equal(weights_after(run), whole)
        with pytest.raises(LoraError, match="its optimizer is"):
            tiny_training.trainer(tmp_path / "run", resume=True, held_out=1)
