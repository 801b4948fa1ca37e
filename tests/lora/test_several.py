"""Several LoRAs in one pipeline, each with a scale, for one denoiser or for both experts."""

from pathlib import Path
from typing import Any

import made_lora
import pytest
import torch
from made_lora import CELLS, NEARBY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_complete import COMPLETE

import diffattn
from diffattn.lora import Lora, LoraError, load_lora, load_loras
from diffattn.lora.adapter import LORA_FILE
from diffattn.methods import from_dict

CASE = COMPLETE["wan"]


def latents(pipe: Any, case: Any = CASE) -> torch.Tensor:
    return torch.as_tensor(case.run(pipe, "a cat", output_type="latent"))


def made(
    folder: Path, seed: int, method: dict[str, Any] = NEARBY, name: str = "wan", **more: Any
) -> Path:
    """A LoRA of diffattn; another seed gives other numbers."""
    made_lora.make(COMPLETE[name].build(), folder, method, **more)
    file = next(folder.rglob(LORA_FILE))
    with safe_open(file, framework="pt") as opened:
        header = {"diffattn": opened.metadata()["diffattn"]}
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(file)
    for key, tensor in tensors.items():
        tensors[key] = torch.randn(tensor.shape, generator=generator) * 0.3
    save_file(tensors, file, metadata=header)
    return folder


def foreign(folder: Path, seed: int, **more: Any) -> Path:
    """The same without diffattn's record."""
    file = folder.with_suffix(".safetensors")
    save_file(load_file(made(folder, seed, **more) / LORA_FILE), file)
    return file


def stock_with(*loras: tuple[Path, float]) -> Any:
    """The pipeline with LoRAs and scales by diffusers alone."""
    pipe = CASE.build()
    for number, (path, _) in enumerate(loras):
        pipe.load_lora_weights(path, adapter_name=f"lora{number}")
    pipe.set_adapters([f"lora{n}" for n in range(len(loras))], [scale for _, scale in loras])
    return pipe


def test_scales_are_those_of_diffusers(tmp_path: Path) -> None:
    one, other = foreign(tmp_path / "a", 1), foreign(tmp_path / "b", 2)
    pipe = CASE.build()
    assert load_loras(pipe, [Lora(one, 0.8), Lora(other, -0.5)]) == [None, None]
    found = latents(pipe)
    assert torch.equal(found, latents(stock_with((one, 0.8), (other, -0.5))))
    assert not torch.equal(found, latents(stock_with((one, 0.8))))
    assert not torch.equal(found, latents(stock_with((one, 1.0), (other, -0.5))))


def test_a_second_call_leaves_the_first_lora_on(tmp_path: Path) -> None:
    one, other = foreign(tmp_path / "a", 1), foreign(tmp_path / "b", 2)
    pipe = CASE.build()
    load_lora(pipe, one, scale=0.8)
    load_lora(pipe, other)
    assert torch.equal(latents(pipe), latents(stock_with((one, 0.8), (other, 1.0))))


def test_two_of_a_method_are_on_under_it_and_off_elsewhere(tmp_path: Path) -> None:
    one, other = made(tmp_path / "a", 1), made(tmp_path / "b", 2)
    stock = latents(CASE.build())
    pipe = CASE.build()
    records = load_loras(pipe, [Lora(one, 0.8), Lora(other, 0.5)])
    assert [record and record.method["type"] for record in records] == ["gna", "gna"]
    wanted = stock_with((one, 0.8), (other, 0.5))
    diffattn.set_attn_processor(wanted, from_dict(NEARBY))
    assert torch.equal(latents(pipe), latents(wanted))
    diffattn.set_attn_processor(pipe, None)
    assert torch.equal(latents(pipe), stock)


def test_one_from_elsewhere_stays_on_where_one_of_a_method_is_off(tmp_path: Path) -> None:
    mask, style = made(tmp_path / "a", 1), foreign(tmp_path / "b", 2)
    pipe = CASE.build()
    load_loras(pipe, [Lora(mask), Lora(style, 0.7)])
    diffattn.set_attn_processor(pipe, None)
    assert torch.equal(latents(pipe), latents(stock_with((style, 0.7))))


class TestExperts:
    def on(self, pipe: Any) -> tuple[bool, bool]:
        models = (pipe.transformer, pipe.transformer_2)
        one, other = (
            any(getattr(module, "lora_A", None) for module in model.modules()) for model in models
        )
        return one, other

    def test_each_lora_of_diffattn_goes_where_it_was_trained(self, tmp_path: Path) -> None:
        build = COMPLETE["wan-two-experts"].build
        high = made(tmp_path / "a", 1, name="wan-two-experts", denoiser="transformer")
        low = made(tmp_path / "b", 2, name="wan-two-experts", denoiser="transformer_2")
        pipe = build()
        load_loras(pipe, [Lora(low)])
        assert self.on(pipe) == (False, True)
        load_loras(pipe, [Lora(high, denoiser="transformer")])
        assert self.on(pipe) == (True, True)
        with pytest.raises(LoraError) as error:
            load_loras(build(), [Lora(high, denoiser="transformer_2")])
        assert str(error.value) == (
            f"LoRA {high} was trained for the transformer, not for the transformer_2: give it to"
            f" the other expert, or to none by name"
        )

    def test_one_from_elsewhere_goes_where_it_is_sent(self, tmp_path: Path) -> None:
        file = foreign(tmp_path / "a", 1, name="wan-two-experts", denoiser="transformer_2")
        pipe = COMPLETE["wan-two-experts"].build()
        load_loras(pipe, [Lora(file, denoiser="transformer_2")])
        assert self.on(pipe) == (False, True)
        load_loras(pipe, [Lora(file)])
        assert self.on(pipe) == (True, True)
        with pytest.raises(LoraError, match="is for the transformer_2, which WanPipeline lacks"):
            load_loras(CASE.build(), [Lora(file, denoiser="transformer_2")])


class TestMethodsThatDiffer:
    def test_they_are_refused_unless_one_is_attached(self, tmp_path: Path) -> None:
        one, other = made(tmp_path / "a", 1), made(tmp_path / "b", 2, CELLS)
        pipe = CASE.build()
        with pytest.raises(LoraError) as error:
            load_loras(pipe, [Lora(one), Lora(other)])
        assert str(error.value) == (
            f"LoRAs {one} and {other} were trained under gna and under clear, and a run has one"
            f" method: choose it by --attn (in Python, attach it before); LoRAs of another method"
            f" are off"
        )
        assert not getattr(pipe.transformer, "peft_config", None)
        diffattn.set_attn_processor(pipe, from_dict(NEARBY))
        load_loras(pipe, [Lora(one), Lora(other)])
        wanted = stock_with((one, 1.0))
        diffattn.set_attn_processor(wanted, from_dict(NEARBY))
        assert torch.equal(latents(pipe), latents(wanted))

    def test_parameters_count(self, tmp_path: Path) -> None:
        one, other = made(tmp_path / "a", 1), made(tmp_path / "b", 2, {**NEARBY, "window": "full"})
        with pytest.raises(
            LoraError, match=r"were trained with window=\[3, 3, 3\] and window=full"
        ):
            load_loras(CASE.build(), [Lora(one), Lora(other)])

    def test_weights_of_a_method_for_one_denoiser_twice(self, tmp_path: Path) -> None:
        one, other = made(tmp_path / "a", 1, CELLS), made(tmp_path / "b", 2, CELLS)
        with pytest.raises(LoraError, match="both have weights of their method for the tra"):
            load_loras(CASE.build(), [Lora(one), Lora(other)])
