"""LoRAs in other layouts: the numbers stay, and diffusers' own readers agree."""

import json
import types
from pathlib import Path
from typing import Any

import diffusers
import made_lora
import pytest
import torch
from made_lora import CELLS, NEARBY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_complete import COMPLETE

from diffattn.lora import LoraError, load_lora
from diffattn.lora.adapter import LORA_FILE, METHOD_FILE, read_record
from diffattn.lora.convert import convert
from diffattn.lora.describe import describe
from diffattn.lora.layer_names import names_of
from diffattn.lora.lora_file import Pair, fuse, read_contents, split
from diffattn.models import denoisers

SD = {"type": "gna", "window": "full", "dense_layers": 0, "dense_steps": 0}


def trained(name: str, folder: Path, **settings: Any) -> Path:
    """A LoRA of diffattn for a tiny pipeline, whose record names the family."""
    pipe = COMPLETE[name].build()
    made_lora.make(pipe, folder, SD if name.startswith("sd") else NEARBY, **settings)
    return folder


def deltas(pipe: Any, given: Any) -> dict[str, torch.Tensor]:
    """The changes of weights that stock diffusers makes of a file, by layer."""
    pipe.load_lora_weights(given, adapter_name="one")
    model = next(iter(denoisers(pipe).values()))
    found = {
        layer: module.get_delta_weight("one")
        for layer, module in model.named_modules()
        if "one" in getattr(module, "lora_A", {})
    }
    assert found
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without(file: Path, part: str, kept: Path) -> Path:
    """A LoRA's file without the layers whose names have a part."""
    tensors = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    with safe_open(file, framework="pt") as opened:
        save_file(tensors, kept, metadata={"diffattn": opened.metadata()["diffattn"]})
    return kept


# In tiny models: the numbers of diffusers' single blocks are those of the published models.
ROUND_TRIPS = [
    ("wan", "comfyui"), ("wan", "musubi"), ("wan", "diffsynth"), ("wan-two-experts", "comfyui"),
    ("hunyuanvideo", "comfyui"), ("hunyuanvideo", "musubi"),
    ("flux", "comfyui"), ("flux", "kohya"), ("flux", "musubi"),
    ("ltx", "comfyui"),
    ("sd1.5", "kohya"), ("sdxl", "kohya"), ("sdxl", "comfyui"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), ROUND_TRIPS)
def test_there_and_back_gives_the_same_bits(name: str, layout: str, tmp_path: Path) -> None:
    folder = trained(name, tmp_path / "own")
    there = convert(folder, tmp_path / "there.safetensors", layout)
    back = convert(there, tmp_path / "back", "diffusers")
    assert back == tmp_path / "back" / LORA_FILE
    assert equal(load_file(folder / LORA_FILE), load_file(back))
    assert read_record(there) == read_record(back) == read_record(folder)
    assert read_contents(there, read_record(there).family).layout in (layout, "kohya")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("wan", "comfyui"), ("hunyuanvideo", "comfyui"), ("flux", "comfyui"), ("flux", "kohya"),
        ("ltx", "comfyui"), ("sd1.5", "kohya"), ("sdxl", "comfyui"),
    ],
)  # fmt: skip
def test_stock_diffusers_reads_the_same_weights(name: str, layout: str, tmp_path: Path) -> None:
    folder = trained(name, tmp_path / "own")
    file = without(folder / LORA_FILE, "single_", tmp_path / "own.safetensors")
    there = convert(file, tmp_path / "there.safetensors", layout)
    wanted = deltas(COMPLETE[name].build(), file)
    found = deltas(COMPLETE[name].build(), there)
    assert found.keys() == wanted.keys()
    for layer, delta in found.items():
        torch.testing.assert_close(delta, wanted[layer], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "layout"), [("wan", "musubi"), ("wan", "diffsynth"), ("hunyuanvideo", "musubi")]
)
def test_diffattn_reads_layouts_that_diffusers_does_not(
    name: str, layout: str, tmp_path: Path
) -> None:
    folder = trained(name, tmp_path / "own")
    there = convert(folder, tmp_path / "there.safetensors", layout)
    changes = []
    for path in (folder, there):
        pipe = COMPLETE[name].build()
        load_lora(pipe, path)
        model = next(iter(denoisers(pipe).values()))
        changes.append(
            {
                layer: module.get_delta_weight("diffattn_gna")
                for layer, module in model.named_modules()
                if hasattr(module, "get_delta_weight")
            }
        )
    assert changes[0]
    assert equal(*changes)


def random_pairs(layers: dict[str, tuple[int, int]], rank: int) -> dict[str, torch.Tensor]:
    """Factors in diffusers' layout by layer, from (inputs, outputs)."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer, (inputs, outputs) in layers.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(
            rank, inputs, generator=generator
        )
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(
            outputs, rank, generator=generator
        )
    return tensors


def products(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """up @ down by layer, of some rows; zeros are left out."""
    found = {
        name.removesuffix(".lora_B.weight"): up.double()[::97]
        @ state[name.replace("lora_B", "lora_A")].double()
        for name, up in state.items()
        if name.endswith("lora_B.weight")
    }
    return {layer: product for layer, product in found.items() if product.any()}


# Layers that have a name elsewhere, at the widths of published models where diffusers needs them.
WIDE = 3072
BLOCKS = {
    "flux": {
        **{f"transformer_blocks.1.attn.{p}": (WIDE, WIDE) for p in (
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
            "to_add_out",
        )},
        "transformer_blocks.1.ff.net.0.proj": (WIDE, 4 * WIDE),
        "transformer_blocks.1.ff.net.2": (4 * WIDE, WIDE),
        "transformer_blocks.1.ff_context.net.0.proj": (WIDE, 4 * WIDE),
        "transformer_blocks.1.ff_context.net.2": (4 * WIDE, WIDE),
        "transformer_blocks.1.norm1.linear": (WIDE, 6 * WIDE),
        "transformer_blocks.1.norm1_context.linear": (WIDE, 6 * WIDE),
        **{f"single_transformer_blocks.3.attn.{p}": (WIDE, WIDE) for p in ("to_q", "to_k", "to_v")},
        "single_transformer_blocks.3.proj_mlp": (WIDE, 4 * WIDE),
        "single_transformer_blocks.4.attn.to_q": (WIDE, WIDE),
        "single_transformer_blocks.4.attn.to_v": (WIDE, WIDE),
        "single_transformer_blocks.4.proj_out": (5 * WIDE, WIDE),
        "single_transformer_blocks.4.norm.linear": (WIDE, 3 * WIDE),
    },
    "wan": {
        **{f"blocks.{i}.{attn}.{p}": (48, 48) for i in range(2) for attn in ("attn1", "attn2")
           for p in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"blocks.{i}.attn2.{p}": (48, 48) for i in range(2)
           for p in ("add_k_proj", "add_v_proj")},
        **{f"blocks.{i}.ffn.net.0.proj": (48, 96) for i in range(2)},
        **{f"blocks.{i}.ffn.net.2": (96, 48) for i in range(2)},
    },
    "qwen-image": {
        **{f"transformer_blocks.7.attn.{p}": (32, 32) for p in (
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
            "to_add_out",
        )},
        "transformer_blocks.7.img_mlp.net.0.proj": (32, 128),
        "transformer_blocks.7.img_mlp.net.2": (128, 32),
        "transformer_blocks.7.txt_mlp.net.2": (128, 32),
        "transformer_blocks.7.img_mod.1": (32, 192),
        "transformer_blocks.7.txt_mod.1": (32, 192),
    },
}  # fmt: skip
BLOCKS["hunyuanvideo"] = BLOCKS["flux"]
PIPELINES = {
    "flux": diffusers.FluxPipeline,
    "wan": diffusers.WanPipeline,
    "qwen-image": diffusers.QwenImagePipeline,
    "hunyuanvideo": diffusers.HunyuanVideoPipeline,
}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("flux", "comfyui"), ("flux", "kohya"), ("wan", "comfyui"), ("wan", "musubi"),
        ("qwen-image", "comfyui"), ("qwen-image", "musubi"), ("hunyuanvideo", "comfyui"),
    ],
)  # fmt: skip
def test_every_layer_is_what_diffusers_converter_makes_of_it(
    family: str, layout: str, tmp_path: Path
) -> None:
    own = random_pairs(BLOCKS[family], 2)
    save_file(own, tmp_path / "own.safetensors")
    there = tmp_path / "there.safetensors"
    convert(tmp_path / "own.safetensors", there, layout, family=family)
    read: Any = PIPELINES[family].lora_state_dict(there)
    theirs, wanted = products(read), products(own)
    assert theirs.keys() == wanted.keys()
    for layer, product in wanted.items():
        torch.testing.assert_close(theirs[layer], product, rtol=1e-12, atol=1e-12)
    convert(there, tmp_path / "back.safetensors", "diffusers", family=family)
    assert equal(load_file(tmp_path / "back.safetensors"), own)


@pytest.mark.parametrize(
    ("family", "layout"),
    [("flux", "kohya"), ("wan", "musubi"), ("qwen-image", "musubi")],
)
def test_files_of_others_with_alphas_are_read_as_diffusers_reads_them(
    family: str, layout: str, tmp_path: Path
) -> None:
    save_file(random_pairs(BLOCKS[family], 4), tmp_path / "own.safetensors")
    there = tmp_path / "there.safetensors"
    convert(tmp_path / "own.safetensors", there, layout, family=family)
    generator = torch.Generator().manual_seed(2)
    # As another trainer writes it: an alpha of its own, and no zeros between fused layers.
    foreign = {
        name: torch.tensor(1.5)
        if name.endswith("alpha")
        else torch.randn(t.shape, generator=generator)
        for name, t in load_file(there).items()
    }
    save_file(foreign, tmp_path / "foreign.safetensors")
    convert(
        tmp_path / "foreign.safetensors", tmp_path / "read.safetensors", "diffusers", family=family
    )
    ours = products(load_file(tmp_path / "read.safetensors"))
    theirs = products(PIPELINES[family].lora_state_dict(tmp_path / "foreign.safetensors"))
    assert ours.keys() == theirs.keys()
    for layer, product in theirs.items():
        torch.testing.assert_close(ours[layer], product, rtol=1e-5, atol=1e-5)


def test_names_of_sdxls_original_u_net(tmp_path: Path) -> None:
    layers = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0",
        "input_blocks_8_1_transformer_blocks_0_attn1_to_q": "down_blocks.2.attentions.1",
        "middle_block_1_transformer_blocks_0_attn1_to_q": "mid_block.attentions.0",
        "output_blocks_5_1_transformer_blocks_0_attn1_to_q": "up_blocks.1.attentions.2",
    }
    tensors = {}
    for number, layer in enumerate(layers, 1):
        tensors[f"lora_unet_{layer}.lora_down.weight"] = torch.full((2, 4), float(number))
        tensors[f"lora_unet_{layer}.lora_up.weight"] = torch.full((4, 2), 1.0)
        tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    convert(tmp_path / "kohya.safetensors", tmp_path / "read.safetensors", "diffusers")
    read = load_file(tmp_path / "read.safetensors")
    published = types.SimpleNamespace(layers_per_block=2)
    theirs, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        tmp_path / "kohya.safetensors", unet_config=published
    )
    for number, block in enumerate(layers.values(), 1):
        name = f"unet.{block}.transformer_blocks.0.attn1.to_q"
        assert read[f"{name}.lora_A.weight"].eq(number).all()
        # alpha / rank is a half, and in the upper factor.
        assert read[f"{name}.lora_B.weight"].eq(0.5).all()
        key = f"unet.{block}.transformer_blocks.0.attn1.processor.to_q_lora"
        assert theirs[f"{key}.down.weight"].eq(number).all()
    assert set(alphas.values()) == {1.0}


class TestFusedLayers:
    QKV = names_of("flux").rule_of("transformer_blocks.0.attn.to_q")
    STREAM = names_of("flux").rule_of("single_transformer_blocks.0.attn.to_q")

    def pairs(self, *ranks: int, alpha: float = 3.0) -> list[Pair]:
        torch.manual_seed(0)
        return [Pair(torch.randn(rank, 5), torch.randn(7, rank), alpha) for rank in ranks]

    @pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3), (4, 1, 1)])
    def test_the_change_is_that_of_the_parts_one_below_the_other(self, ranks: Any) -> None:
        pairs = dict(zip("qkv", self.pairs(*ranks), strict=True))
        fused = fuse(self.QKV, pairs, ("q", "k", "v"))
        whole = fused.strength * fused.up.double() @ fused.down.double()
        rows = torch.cat([p.strength * p.up.double() @ p.down.double() for p in pairs.values()])
        torch.testing.assert_close(whole, rows, rtol=1e-5, atol=1e-6)

    def test_parts_that_share_the_lower_factor_keep_the_rank(self) -> None:
        (pair,) = self.pairs(2)
        pairs = {name: Pair(pair.down, pair.up + i, 2.0) for i, name in enumerate("qkv")}
        fused = fuse(self.QKV, pairs, ("q", "k", "v"))
        assert fused.rank == 2
        back = split(Path("x"), "layer", fused, self.QKV, ("q", "k", "v"))
        for name, one in pairs.items():
            assert torch.equal(back[name].up, one.up)
            assert torch.equal(back[name].down, one.down)

    def test_missing_parts_have_zeros_and_are_missing_again(self) -> None:
        first, last = self.pairs(2, 2)
        names = ("q", "k", "v", "mlp")
        fused = fuse(self.STREAM, {"q": first, "v": last}, names)
        assert fused.up.shape == (7 * 7, 4)
        assert not fused.up[7:14].any()
        assert not fused.up[21:].any()
        back = split(Path("x"), "layer", fused, self.STREAM, names)
        assert back.keys() == {"q", "v"}
        assert torch.equal(back["v"].up, last.up)
        assert back["v"].strength == pytest.approx(last.strength)

    def test_outputs_that_cannot_be_parted(self) -> None:
        pair = Pair(torch.ones(1, 4), torch.ones(10, 1), 1.0)
        with pytest.raises(LoraError, match="has 10 outputs, which are not those of 3 layers"):
            split(Path("x"), "layer", pair, self.QKV, ("q", "k", "v"))


class TestRefusals:
    @pytest.fixture
    def wan(self, tmp_path: Path) -> Path:
        return trained("wan", tmp_path / "own")

    def refusal(self, *arguments: Any, **more: Any) -> str:
        with pytest.raises(LoraError) as error:
            convert(*arguments, **more)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_families_without_a_known_layout(self, tmp_path: Path) -> None:
        folder = trained("mochi", tmp_path / "own")
        assert self.refusal(folder, tmp_path / "x.safetensors", "comfyui") == (
            "diffattn knows no other layout for family 'mochi' than diffusers' own: layouts are"
            " known for wan, hunyuanvideo, flux, ltx, qwen-image, unet"
        )

    def test_layouts_that_nobody_reads(self, wan: Path, tmp_path: Path) -> None:
        assert self.refusal(wan, tmp_path / "x.safetensors", "kohya") == (
            "no program is known to read Wan LoRAs in the kohya layout: choose diffusers or comfyui"
            " or musubi or diffsynth"
        )
        assert "layout 'comfy' is unknown" in self.refusal(wan, tmp_path / "x", "comfy")

    def test_a_family_that_cannot_be_told(self, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        save_file(random_pairs({"transformer_blocks.0.attn.to_q": (4, 4)}, 1), file)
        assert self.refusal(file, tmp_path / "y.safetensors", "comfyui") == (
            f"LoRA {file} does not say which family it is for, and its names do not tell: give"
            f" --family hunyuanvideo or flux or qwen-image"
        )
        assert "knows no other layout for family 'flx'; did you mean" in self.refusal(
            file, tmp_path / "y.safetensors", "comfyui", family="flx"
        )

    def test_layers_without_a_name(self, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        save_file(random_pairs({"proj_out": (4, 4), "blocks.0.attn1.to_q": (4, 4)}, 1), file)
        assert "layer proj_out of Wan has no name in the comfyui layout" in self.refusal(
            file, tmp_path / "y.safetensors", "comfyui", family="wan"
        )

    def test_weights_of_the_method(self, tmp_path: Path) -> None:
        folder = tmp_path / "own"
        made_lora.make(COMPLETE["wan"].build(), folder, CELLS)
        target = tmp_path / "there.safetensors"
        assert self.refusal(folder, target, "comfyui") == (
            f"LoRA {folder} has weights of its method beside it, {METHOD_FILE}, for which the"
            f" comfyui layout has no place: --without-method-weights leaves them out"
        )
        lines: list[str] = []
        convert(folder, target, "comfyui", without_method_weights=True, warn=lines.append)
        assert lines == [
            f"the weights of the method are left out; {folder / METHOD_FILE} holds them"
        ]
        convert(folder, tmp_path / "copy", "diffusers")
        assert equal(load_file(folder / METHOD_FILE), load_file(tmp_path / "copy" / METHOD_FILE))

    def test_text_encoders(self, wan: Path, tmp_path: Path) -> None:
        tensors = load_file(wan / LORA_FILE) | {"text_encoder.x.lora_A.weight": torch.ones(1, 1)}
        file = tmp_path / "x.safetensors"
        save_file(tensors, file)
        target = tmp_path / "y.safetensors"
        assert (
            "holds 1 tensors for text encoders, which are not converted or merged: lora convert"
            in (self.refusal(file, target, "comfyui"))
        )
        convert(file, target, "comfyui", denoiser_only=True)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("transformer.blocks.0.attn1.to_q.lora_B.bias", "1 biases"),
            ("transformer.blocks.0.attn1.to_q.lokr_w1", "1 LoKr factors"),
            ("transformer.norm.weight", "1 tensors of another kind"),
        ],
    )
    def test_tensors_that_are_no_factors(
        self, name: str, kind: str, wan: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "x.safetensors"
        save_file(load_file(wan / LORA_FILE) | {name: torch.ones(1)}, file)
        assert self.refusal(file, tmp_path / "y.safetensors", "comfyui") == (
            f"LoRA {file} holds {kind} beside its factors, which cannot be converted or merged"
        )

    def test_a_dora(self, tmp_path: Path) -> None:
        folder = trained("wan", tmp_path / "own", dora=True)
        assert "is a DoRA: its 12 magnitudes cannot be converted or merged" in self.refusal(
            folder, tmp_path / "x.safetensors", "comfyui"
        )

    def test_a_file_that_exists_is_left_alone(self, wan: Path, tmp_path: Path) -> None:
        target = tmp_path / "x.safetensors"
        target.write_bytes(b"mine")
        assert self.refusal(wan, target, "comfyui") == (
            f"{target} exists: give another name, or remove it first"
        )
        assert target.read_bytes() == b"mine"

    def test_a_disk_that_fails_leaves_nothing(
        self, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffattn.lora import convert as module

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "save_file", fail)
        target = tmp_path / "new" / "x.safetensors"
        assert self.refusal(wan, target, "comfyui") == (
            f"cannot write {target}: No space left on device"
        )
        assert list(target.parent.iterdir()) == []

    def test_halves_and_files_without_factors(self, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 2)}, file)
        assert "is half a LoRA: 1 of its 1 layers lack a factor" in self.refusal(
            file, tmp_path / "y.safetensors", "diffusers"
        )
        save_file({"model.weight": torch.ones(1)}, file)
        assert "holds no pair of a LoRA's factors: 1 tensors of another kind" in self.refusal(
            file, tmp_path / "y.safetensors", "diffusers"
        )

    def test_names_that_the_told_family_lacks(self, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        save_file(
            {
                f"lora_unet_blocks_0_self_attn_q.lora_{s}.weight": torch.ones(2, 2)
                for s in ("up", "down")
            },
            file,
        )
        assert "does not fit Flux: diffattn knows no layer blocks_0_self_attn_q of it" in (
            self.refusal(file, tmp_path / "y.safetensors", "diffusers", family="flux")
        )


def test_strengths_of_a_config_in_the_header(tmp_path: Path) -> None:
    own = random_pairs({"blocks.0.attn1.to_q": (4, 4), "blocks.1.attn1.to_q": (4, 4)}, 2)
    config = {
        "transformer.r": 2,
        "transformer.lora_alpha": 4,
        "transformer.alpha_pattern": {"blocks.1.attn1.to_q": 1},
    }
    file = tmp_path / "x.safetensors"
    save_file(own, file, metadata={"lora_adapter_metadata": json.dumps(config)})
    pairs = read_contents(file).pairs
    assert [pair.strength for pair in pairs.values()] == [2.0, 0.5]
    convert(file, tmp_path / "y.safetensors", "comfyui")
    there = load_file(tmp_path / "y.safetensors")
    up = "diffusion_model.blocks.1.self_attn.q.lora_B.weight"
    assert torch.equal(there[up], own["transformer.blocks.1.attn1.to_q.lora_B.weight"] * 0.5)


class TestDescribe:
    def facts(self, path: Path) -> Any:
        (found,) = describe(path)
        return found

    def test_a_lora_of_diffattn(self, tmp_path: Path) -> None:
        folder = tmp_path / "own"
        made_lora.make(COMPLETE["wan"].build(), folder, CELLS, rank=3)
        (folder / "losses.jsonl").write_text(
            "".join(json.dumps({"step": i, "loss": 2.0 - i / 10}) + "\n" for i in range(20))
        )
        facts = self.facts(folder)
        assert (facts.layout, facts.family, facts.component) == ("diffusers", "wan", "transformer")
        assert facts.layers == 12
        assert facts.targets == {f"attn1.{p}": 3 for p in ("to_q", "to_k", "to_v", "to_out.0")}
        assert (facts.ranks, facts.strengths, facts.dtypes) == ({3: 12}, {1.0: 12}, {"float32": 24})
        assert facts.parameters == 12 * 2 * 3 * 48
        assert facts.method["type"] == "clear"
        assert facts.method_weights == 3
        assert facts.figures == {"loss": (pytest.approx(1.95), pytest.approx(0.15))}
        assert facts.bytes == (folder / LORA_FILE).stat().st_size

    def test_both_experts(self, tmp_path: Path) -> None:
        for denoiser in ("transformer", "transformer_2"):
            pipe = COMPLETE["wan-two-experts"].build()
            place = tmp_path / ("transformer_2" if denoiser == "transformer_2" else "")
            made_lora.make(pipe, place, NEARBY, denoiser=denoiser)
        assert [facts.component for facts in describe(tmp_path)] == ["transformer", "transformer_2"]

    @pytest.mark.parametrize("layout", ["comfyui", "kohya"])
    def test_one_of_another_program(self, layout: str, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        save_file(random_pairs(BLOCKS["flux"], 2), tmp_path / "own.safetensors")
        convert(tmp_path / "own.safetensors", file, layout, family="flux")
        tensors = {
            name: torch.tensor(1.0) if name.endswith("alpha") else tensor
            for name, tensor in load_file(file).items()
        }
        header = {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"}
        save_file(tensors, file, metadata=header)
        facts = self.facts(file)
        assert (facts.layout, facts.family) == (layout, "flux")
        assert facts.model == "flux-1-dev/lora"
        assert facts.method is None
        assert sum(facts.strengths.values()) == facts.layers == len(BLOCKS["flux"])

    def test_names_that_two_families_share(self, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        for number, family in ((18, None), (19, "hunyuanvideo")):
            name = f"lora_unet_double_blocks_{number}_img_attn_qkv"
            save_file({f"{name}.lora_{s}.weight": torch.ones(3, 3) for s in ("up", "down")}, file)
            assert self.facts(file).family == family
            assert self.facts(file).layers == 3
            assert bool(self.facts(file).could_be) == (family is None)

    def test_names_that_no_family_has(self, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        tensors = {
            f"diffusion_model.{layer}.lora_{side}.weight": torch.ones(1, 1)
            for layer in ("blocks.0.self_attn.q", "head.head")
            for side in "AB"
        }
        save_file(tensors, file)
        facts = self.facts(file)
        assert (facts.family, facts.layers) == ("wan", 2)
        assert facts.extras == ("1 layers without a name in diffusers",)
        with pytest.raises(LoraError, match=r"diffattn knows no layer head\.head of it"):
            convert(file, tmp_path / "y.safetensors", "diffusers")
