"""What is trained, and that stock diffusers reads what is written."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import tiny_wan
import torch
from made_lora import CELLS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffattn
from diffattn.lora.adapter import (
    LORA_FILE,
    METHOD_FILE,
    load_method_weights,
    read_record,
    save_adapter,
)
from diffattn.lora.errors import LoraError
from diffattn.lora.loading import load_lora
from diffattn.methods import from_dict


def pipeline(dtype: torch.dtype = torch.float32) -> Any:
    pipe = tiny_wan.PIPELINES["t2v"]()
    pipe.transformer.to(dtype)
    return pipe


class TestWhatIsTrained:
    def test_the_projections_of_every_site_in_float32(self, tmp_path: Path) -> None:
        made = tiny_training.trainer(tmp_path, pipe=pipeline(torch.bfloat16))
        expected = {
            f"blocks.{layer}.attn1.{target}.lora_{side}.default.weight"
            for layer in range(tiny_wan.LAYERS)
            for target in ("to_q", "to_k", "to_v", "to_out.0")
            for side in "AB"
        }
        parameters = dict(made.model.named_parameters())
        assert {name for name, p in parameters.items() if p.requires_grad} == expected
        assert {parameters[name].dtype for name in expected} == {torch.float32}
        frozen = [p for name, p in parameters.items() if name not in expected]
        assert {p.dtype for p in frozen} == {torch.bfloat16}

    def test_a_method_s_own_weights_too(self, tmp_path: Path) -> None:
        made = tiny_training.trainer(tmp_path, attention=CELLS, pipe=pipeline(torch.bfloat16))
        own = {name: p for name, p in made.model.named_parameters() if "spatial_weight" in name}
        assert own.keys() == {f"blocks.{i}.attn1.clear.spatial_weight" for i in range(3)}
        before = {name: p.detach().clone() for name, p in own.items()}
        made.train(until=1)
        for name, parameter in own.items():
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, before[name])

    def test_the_start_is_the_base_model_and_the_seed_s(self, tmp_path: Path) -> None:
        factors = []
        for number, seed in enumerate((0, 0, 1)):
            pipe = tiny_wan.PIPELINES["t2v"]()
            torch.manual_seed(100 + number)
            state = torch.get_rng_state()
            made = tiny_training.trainer(tmp_path / str(number), seed=seed, pipe=pipe)
            assert torch.equal(torch.get_rng_state(), state)
            factors.append(tiny_training.trained(made))
        one, again, other = factors
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert all((weight == 0).all() for name, weight in one.items() if "lora_B" in name)
        assert any(not torch.equal(one[name], other[name]) for name in one)

    def test_targets_that_match_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(LoraError) as error:
            tiny_training.trainer(tmp_path, targets=("to_q", "qkv"))
        assert str(error.value) == (
            "target 'qkv' matches no layer of the 3 attention sites of WanTransformer3DModel: those"
            " of blocks.0.attn1 are to_q, to_k, to_v, to_out.0"
        )

    def test_a_model_with_a_lora(self, tmp_path: Path) -> None:
        pipe = tiny_training.trainer(tmp_path / "one").pipe
        with pytest.raises(LoraError, match=r"^WanTransformer3DModel has a LoRA already: fuse it"):
            tiny_training.trainer(tmp_path / "two", pipe=pipe)


class TestStockDiffusers:
    """Written here, read by `pipe.load_lora_weights` of a pipeline that diffattn never saw."""

    @pytest.mark.parametrize("variant", [{}, {"dora": True}, {"rslora": True, "alpha": 5}])
    def test_it_loads_what_is_written(self, variant: dict[str, Any], tmp_path: Path) -> None:
        made = tiny_training.trainer(tmp_path, steps=2, rank=2, **variant)
        made.train()
        diffattn.set_attn_processor(made.pipe, None)
        trained = tiny_wan.run(made.pipe)
        fresh = pipeline()
        untrained = tiny_wan.run(fresh)
        fresh.load_lora_weights(tmp_path)
        # The factor is in the weights of the file, which rounds otherwise than a product.
        torch.testing.assert_close(tiny_wan.run(fresh), trained, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(untrained, trained, atol=1e-3)

    def test_a_checkpoint_is_a_lora_too(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path, steps=2).train()
        final = load_file(tmp_path / LORA_FILE)
        fresh = pipeline()
        fresh.load_lora_weights(tmp_path / "checkpoints" / "step-000002")
        loaded = fresh.transformer.state_dict()
        for name, weight in final.items():
            key = name.removeprefix("transformer.").replace(".weight", ".default_0.weight")
            assert torch.equal(loaded[key], weight)

    def test_the_second_expert_s_goes_to_the_second_expert(self, tmp_path: Path) -> None:
        pipe = tiny_wan.PIPELINES["two experts"]()
        made = tiny_training.trainer(tmp_path, pipe=pipe, steps=1, denoiser="transformer_2")
        assert made.recipe.noise_range == (0.0, 0.9)
        made.train()
        assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())
        record = read_record(tmp_path)
        assert record is not None
        assert record.denoiser == "transformer_2"
        fresh = tiny_wan.PIPELINES["two experts"]()
        fresh.load_lora_weights(tmp_path / "transformer_2", load_into_transformer_2=True)
        loaded = fresh.transformer_2.state_dict()
        for name, weight in tiny_training.trained(made).items():
            assert torch.equal(loaded[name.replace("default", "default_0")], weight)

    def test_stock_diffusers_does_not_take_the_second_expert_s_for_the_first_s(
        self, tmp_path: Path
    ) -> None:
        pipe = tiny_wan.PIPELINES["two experts"]()
        tiny_training.trainer(tmp_path, pipe=pipe, steps=1, denoiser="transformer_2").train()
        fresh = tiny_wan.PIPELINES["two experts"]()
        for folder in (tmp_path, tmp_path / "checkpoints" / "step-000001"):
            with contextlib.suppress(OSError):
                fresh.load_lora_weights(folder)
            assert not any("lora" in name for name, _ in fresh.transformer.named_parameters())
        with pytest.raises(OSError, match="no file named pytorch_lora_weights"):
            fresh.load_lora_weights(tmp_path)

    @pytest.mark.parametrize("inside", ["", "transformer_2", "checkpoints/step-000001"])
    def test_the_second_expert_s_is_found_with_its_method_s_weights(
        self, inside: str, tmp_path: Path
    ) -> None:
        pipe = tiny_wan.PIPELINES["two experts"]()
        cells = {"attention": CELLS, "denoiser": "transformer_2", "steps": 1}
        made = tiny_training.trainer(tmp_path, pipe=pipe, **cells)
        made.train()
        fresh = tiny_wan.PIPELINES["two experts"]()
        record = load_lora(fresh, tmp_path / inside)
        assert record is not None
        assert record.denoiser == "transformer_2"
        assert not any("lora" in name for name, _ in fresh.transformer.named_parameters())
        loaded = fresh.transformer_2.state_dict()
        weights = tiny_training.trained(made)
        assert any("lora" not in name for name in weights)
        for name, weight in weights.items():
            assert torch.equal(loaded[name.replace("default", "diffattn_clear")], weight)

    def test_a_folder_with_both_experts_s_does_not_say_which(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "transformer_2"):
            folder.mkdir(exist_ok=True)
            (folder / LORA_FILE).touch()
        message = rf"holds the LoRAs of two experts: name one, .*{LORA_FILE} or .*transformer_2/"
        with pytest.raises(LoraError, match=message):
            load_lora(tiny_wan.PIPELINES["two experts"](), tmp_path)


class TestRecord:
    def test_it_says_the_method_and_the_settings(self, tmp_path: Path) -> None:
        made = tiny_training.trainer(tmp_path, steps=1)
        made.train()
        record = read_record(tmp_path)
        assert record is not None
        assert record == read_record(tmp_path / LORA_FILE)
        assert from_dict(record.method) == from_dict(tiny_training.ATTENTION)
        assert (record.denoiser, record.steps) == ("transformer", 1)
        assert tuple(record.latents) == tiny_training.LATENTS
        assert record.settings == made.settings.to_dict()

    def test_a_lora_from_elsewhere_says_nothing(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / LORA_FILE)
        assert read_record(tmp_path) is None
        assert read_record(tmp_path / "nothing") is None
        (tmp_path / "lora.bin").write_bytes(b"x")
        assert read_record(tmp_path / "lora.bin") is None

    def test_a_broken_file(self, tmp_path: Path) -> None:
        (tmp_path / LORA_FILE).write_bytes(b"no safetensors")
        with pytest.raises(LoraError, match=f"^cannot read LoRA {tmp_path}: "):
            read_record(tmp_path)

    def test_a_header_of_another_version(self, tmp_path: Path) -> None:
        metadata = {"diffattn": json.dumps({"denoiser": "transformer"})}
        save_file({"a": torch.ones(1)}, tmp_path / LORA_FILE, metadata=metadata)
        with pytest.raises(LoraError) as error:
            read_record(tmp_path)
        assert str(error.value) == (
            f"LoRA {tmp_path} was written by another version of diffattn: its header lacks 'method'"
        )


class TestMethodWeights:
    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A LoRA with trained cells."""
        folder = tmp_path_factory.mktemp("cells")
        tiny_training.trainer(folder, attention=CELLS, steps=2).train()
        return folder

    def test_they_come_back(self, folder: Path) -> None:
        record = read_record(folder)
        assert record is not None
        pipe = pipeline()
        pipe.load_lora_weights(folder)
        diffattn.set_attn_processor(pipe, from_dict(record.method))
        assert load_method_weights(pipe, folder / LORA_FILE, record) == 3
        with safe_open(folder / METHOD_FILE, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name)
                assert torch.equal(pipe.transformer.get_parameter(name), weight)
                assert not torch.equal(weight, torch.full((2, 2), 0.25))

    def test_layers_that_begin_as_nothing_are_trained_and_come_back(self, tmp_path: Path) -> None:
        method = {"type": "sla", "keep": 0.3, "block_q": 16, "block_kv": 16}
        made = tiny_training.trainer(
            tmp_path, attention=method, steps=2, pipe=pipeline(torch.bfloat16)
        )
        made.train()
        record = read_record(tmp_path)
        assert record is not None
        pipe = pipeline()
        diffattn.set_attn_processor(pipe, from_dict(record.method))
        assert load_method_weights(pipe, tmp_path, record) == tiny_wan.LAYERS
        for layer in range(tiny_wan.LAYERS):
            for part in ("weight", "bias"):
                name = f"blocks.{layer}.attn1.sla.proj_l.{part}"
                loaded = pipe.transformer.get_parameter(name)
                assert loaded.any()
                assert torch.equal(loaded, made.model.get_parameter(name))

    def test_there_are_none_beside_a_mask_s_lora(self, tmp_path: Path) -> None:
        made = tiny_training.trainer(tmp_path, steps=1)
        made.train()
        record = read_record(tmp_path)
        assert record is not None
        assert load_method_weights(made.pipe, tmp_path, record) == 0

    def test_a_method_with_other_weights(self, folder: Path) -> None:
        record = read_record(folder)
        assert record is not None
        pipe = pipeline()
        diffattn.set_attn_processor(pipe, from_dict(CELLS | {"down_factor": 3}))
        with pytest.raises(LoraError) as error:
            load_method_weights(pipe, folder, record)
        assert str(error.value) == (
            f"{folder / METHOD_FILE} does not fit the attached method: 3 weights differ in name or"
            f" shape, such as blocks.0.attn1.clear.spatial_weight; attach it with the parameters"
            f" that the LoRA was trained with: {record.method}"
        )


def test_a_file_that_cannot_be_written_leaves_the_one_that_was(tmp_path: Path) -> None:
    made = tiny_training.trainer(tmp_path, steps=1)
    made.train()
    before = (tmp_path / LORA_FILE).read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    made.pipe.save_lora_weights = fail
    with pytest.raises(LoraError) as error:
        made.save()
    assert str(error.value) == (
        f"cannot write to {tmp_path}: [Errno 28] No space left on device; kept:"
        f" {tmp_path / 'checkpoints' / 'step-000001'}"
    )
    assert (tmp_path / LORA_FILE).read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_saving_makes_the_folder(tmp_path: Path) -> None:
    made = tiny_training.trainer(tmp_path / "run", steps=1)
    save_adapter(made.pipe, made._record(), tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / LORA_FILE).is_file()
