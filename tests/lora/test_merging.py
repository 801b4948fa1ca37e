"""LoRAs merged into weights, and joined to one, against diffusers' own fusing and loading."""

import json
from pathlib import Path
from typing import Any

import made_lora
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from made_lora import CELLS, NEARBY
from safetensors.torch import load_file, save_file
from tiny_complete import COMPLETE

from diffattn.lora import LoraError
from diffattn.lora.adapter import LORA_FILE, METHOD_FILE, read_record
from diffattn.lora.convert import convert
from diffattn.lora.merging import Scaled, join, merge


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pipeline whose transformer is in several shards."""
    folder = tmp_path / "base"
    COMPLETE["wan"].build().save_pretrained(folder, max_shard_size="60KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    return folder


def lora(folder: Path, seed: int, method: dict[str, Any] = NEARBY, **settings: Any) -> Path:
    """A LoRA of Wan; one of another seed has other numbers."""
    made_lora.make(COMPLETE["wan"].build(), folder, method, **settings)
    file = folder / LORA_FILE
    header = made_header(file)
    generator = torch.Generator().manual_seed(seed)
    changed = {
        name: torch.randn(tensor.shape, generator=generator) * 0.2
        for name, tensor in load_file(file).items()
    }
    save_file(changed, file, metadata=header)
    return folder


def made_header(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {"diffattn": opened.metadata()["diffattn"]}


def fused(base: Path, *loras: tuple[Path, float]) -> dict[str, torch.Tensor]:
    """The weights that diffusers fuses."""
    pipe = WanPipeline.from_pretrained(base)
    for number, (path, scale) in enumerate(loras):
        pipe.load_lora_weights(path, adapter_name=f"lora{number}")
        pipe.fuse_lora(adapter_names=[f"lora{number}"], lora_scale=scale)
        pipe.unload_lora_weights()
    return pipe.transformer.state_dict()


class TestMerge:
    def test_the_weights_are_those_that_diffusers_fuses(self, base: Path, tmp_path: Path) -> None:
        one, other = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2, rank=3)
        foreign = convert(other, tmp_path / "b.safetensors", "comfyui")
        lines: list[str] = []
        out = tmp_path / "merged"
        given = [Scaled(one, 0.8), Scaled(foreign, -0.5)]
        assert merge(base, given, out, warn=lines.append) == 12
        found = WanTransformer3DModel.from_pretrained(out).state_dict()
        wanted = fused(base, (one, 0.8), (other, -0.5))
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
        stock = WanPipeline.from_pretrained(base).transformer.state_dict()
        changed = {name for name in stock if not torch.equal(stock[name], found[name])}
        assert changed == {f"blocks.{i}.attn1.{p}.weight" for i in range(3) for p in (
            "to_q", "to_k", "to_v", "to_out.0")}  # fmt: skip
        assert lines[0] == (
            f"{one} was trained under gna, and is now in every step: attach the method without"
            f" dense steps, or use --lora instead"
        )

    def test_the_files_are_named_and_split_as_the_model_s(self, base: Path, tmp_path: Path) -> None:
        out = tmp_path / "merged"
        merge(base, [Scaled(lora(tmp_path / "a", 1))], out)
        files = {file.name: file.stat().st_size for file in out.iterdir()}
        assert files == {
            file.name: file.stat().st_size for file in (base / "transformer").iterdir()
        }

    def test_half_precision_is_rounded_once(self, base: Path, tmp_path: Path) -> None:
        pipe = WanPipeline.from_pretrained(base, torch_dtype=torch.bfloat16)
        pipe.save_pretrained(tmp_path / "half")
        path, out = lora(tmp_path / "a", 1), tmp_path / "merged"
        merge(tmp_path / "half", [Scaled(path)], out)
        found = load_file(out / "diffusion_pytorch_model.safetensors")
        factors = load_file(path / LORA_FILE)
        layer = "blocks.1.attn1.to_k"
        a, b = (factors[f"transformer.{layer}.lora_{s}.weight"].double() for s in "AB")
        exact = pipe.transformer.state_dict()[f"{layer}.weight"].double() + b @ a
        assert torch.equal(found[f"{layer}.weight"], exact.to(torch.bfloat16))

    def refusal(self, *arguments: Any, **more: Any) -> str:
        with pytest.raises(LoraError) as error:
            merge(*arguments, **more)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_lora_and_model_that_do_not_fit(self, base: Path, tmp_path: Path) -> None:
        out, file = tmp_path / "merged", tmp_path / "x.safetensors"
        for layer, width, words in (
            ("blocks.9.attn1.to_q", 48, "it has no weight blocks.9.attn1.to_q.weight"),
            ("blocks.0.attn1.to_q", 40, "is of shape [48, 48], the LoRA is for [40, 40]"),
        ):
            factors = {"lora_A": torch.ones(1, width), "lora_B": torch.ones(width, 1)}
            save_file({f"transformer.{layer}.{n}.weight": t for n, t in factors.items()}, file)
            assert words in self.refusal(base, [Scaled(file)], out)
        assert not out.exists()

    def test_weights_of_the_method(self, base: Path, tmp_path: Path) -> None:
        path = lora(tmp_path / "a", 1, CELLS)
        assert "for which a merged model has no place: --without-method-weights" in self.refusal(
            base, [Scaled(path)], tmp_path / "merged"
        )
        merge(base, [Scaled(path)], tmp_path / "merged", without_method_weights=True)

    def test_outputs_that_exist_and_parts_that_are_missing(
        self, base: Path, tmp_path: Path
    ) -> None:
        path = lora(tmp_path / "a", 1)
        assert self.refusal(base, [Scaled(path)], tmp_path) == (
            f"{tmp_path} exists: give another name, or remove it first"
        )
        shard = sorted((base / "transformer").glob("*.safetensors"))[0]
        shard.unlink()
        assert self.refusal(base, [Scaled(path)], tmp_path / "merged") == (
            f"{base / 'transformer'} lacks {shard.name}, which its index names"
        )
        assert "is no folder of a pipeline with a transformer" in self.refusal(
            tmp_path / "a", [Scaled(path)], tmp_path / "merged"
        )

    def test_a_damaged_shard_leaves_nothing(self, base: Path, tmp_path: Path) -> None:
        path, out = lora(tmp_path / "a", 1), tmp_path / "merged"
        shard = sorted((base / "transformer").glob("*.safetensors"))[-1]
        shard.write_bytes(shard.read_bytes()[:-8])
        assert self.refusal(base, [Scaled(path)], out).startswith(f"cannot write {out}: ")
        assert {file.name for file in tmp_path.iterdir()} == {"base", "a"}


class TestJoin:
    def test_the_change_is_the_sum_to_diffusers(self, base: Path, tmp_path: Path) -> None:
        one = lora(tmp_path / "a", 1)
        other = lora(tmp_path / "b", 2, rank=3, targets=("to_q", "to_v"))
        out = tmp_path / "both"
        record = join([Scaled(one, 0.5), Scaled(other, 2.0)], out)
        assert record == read_record(out)
        assert record is not None
        assert (record.steps, record.settings["rank"], record.family) == (2, 5, "wan")
        wanted, found = fused(base, (one, 0.5), (other, 2.0)), fused(base, (out, 1.0))
        for name, weight in wanted.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)

    def test_a_lora_alone_keeps_its_bits(self, tmp_path: Path) -> None:
        one = lora(tmp_path / "a", 1)
        join([Scaled(one)], tmp_path / "b.safetensors")
        kept, given = load_file(tmp_path / "b.safetensors"), load_file(one / LORA_FILE)
        assert kept.keys() == given.keys()
        assert all(torch.equal(kept[name], given[name]) for name in given)

    def test_layouts_and_weights_of_a_method(self, tmp_path: Path) -> None:
        one = lora(tmp_path / "a", 1, CELLS)
        other = convert(one, tmp_path / "b.safetensors", "musubi", without_method_weights=True)
        join([Scaled(one), Scaled(other)], tmp_path / "both")
        weights = (tmp_path / "both" / METHOD_FILE).read_bytes()
        assert weights == (one / METHOD_FILE).read_bytes()
        with pytest.raises(LoraError, match=r"cannot be joined, since both\.safetensors is a file"):
            join([Scaled(one), Scaled(other)], tmp_path / "both.safetensors")

    def test_several_methods(self, tmp_path: Path) -> None:
        one, other = lora(tmp_path / "a", 1), lora(tmp_path / "b", 1, CELLS)
        with pytest.raises(LoraError, match="the LoRAs have several methods, gna and clear: load"):
            join([Scaled(one), Scaled(other)], tmp_path / "both")
        bare = tmp_path / "bare.safetensors"
        save_file(load_file(one / LORA_FILE), bare)
        with pytest.raises(LoraError, match="load them beside each other instead, by diffattn"):
            join([Scaled(one), Scaled(bare)], tmp_path / "both")


def test_ranks_that_differ_are_in_the_header(tmp_path: Path) -> None:
    one = lora(tmp_path / "a", 1)
    other = lora(tmp_path / "b", 2, rank=3, targets=("to_q",))
    join([Scaled(one), Scaled(other)], tmp_path / "both")
    from safetensors import safe_open

    with safe_open(tmp_path / "both" / LORA_FILE, framework="pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert config["transformer.rank_pattern"]["blocks.0.attn1.to_q"] == 5
    assert config["transformer.alpha_pattern"]["blocks.0.attn1.to_k"] == 2
