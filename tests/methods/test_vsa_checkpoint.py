"""Checkpoints of VSA, made by hand: gates in every layout, and files of changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_video_models
import tiny_wan
import torch
from safetensors.torch import save_file

import diffattn
from diffattn import RadialAttn, VSAAttn, load_vsa_checkpoint
from diffattn.methods.vsa.gate import VSAGate

Tensors = dict[str, torch.Tensor]


def wan(**parameters: Any) -> torch.nn.Module:
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, VSAAttn(coarse=True, **parameters))
    return model


def h3() -> torch.nn.Module:
    model = tiny_video_models.minimax_h3()
    diffattn.set_attn_processor(model, VSAAttn(coarse=True))
    return model


def gates(model: torch.nn.Module) -> list[Any]:
    found = [module for module in model.modules() if isinstance(module, VSAGate)]
    return [gate.to_gate_compress for gate in found]


def saved(folder: Path, tensors: Tensors, name: str = "gates.safetensors") -> Path:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def gate_tensors(model: torch.nn.Module, layout: str, form: str = "weight") -> Tensors:
    out = {}
    for layer, gate in enumerate(gates(model)):
        home = layout.format(layer)
        out[f"{home}.to_gate_compress.{form}"] = torch.randn(gate.weight.shape)
        if gate.bias is not None and form == "weight":
            out[f"{home}.to_gate_compress.bias"] = torch.randn(gate.bias.shape)
    return out


@pytest.mark.parametrize(
    ("build", "layout"),
    [
        (wan, "blocks.{}"),
        (wan, "blocks.{}.attn1"),
        (h3, "transformer_blocks.{}.attn"),
        (h3, "blocks.{}.attn"),
        (h3, "diffusion_model.blocks.{}.attn"),
    ],
)
def test_gates_of_every_layout(tmp_path: Path, build: Any, layout: str) -> None:
    model = build()
    own = {key: value.clone() for key, value in model.state_dict().items() if ".vsa." not in key}
    tensors = gate_tensors(model, layout)
    load_vsa_checkpoint(model, saved(tmp_path, tensors))
    for layer, gate in enumerate(gates(model)):
        home = f"{layout.format(layer)}.to_gate_compress"
        assert torch.equal(gate.weight, tensors[f"{home}.weight"])
        if gate.bias is not None:
            assert torch.equal(gate.bias, tensors[f"{home}.bias"])
    for key, value in own.items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_whole_model_in_several_files_gives_its_gates(tmp_path: Path, prefix: str) -> None:
    model = wan()
    tensors = gate_tensors(model, "blocks.{}")
    others = tiny_wan.transformer(seed=3).state_dict()
    others = {prefix + key: tensor for key, tensor in others.items()}
    saved(tmp_path, others, "diffusion_pytorch_model-00001-of-00002.safetensors")
    saved(tmp_path, tensors, "diffusion_pytorch_model-00002-of-00002.safetensors")
    before = model.proj_out.weight.clone()
    load_vsa_checkpoint(model, tmp_path)
    assert torch.equal(gates(model)[2].weight, tensors["blocks.2.to_gate_compress.weight"])
    assert torch.equal(model.proj_out.weight, before)


def test_loaded_gates_are_used_and_what_was_saved_is_loaded_again(tmp_path: Path) -> None:
    model = wan(keep=0.3)
    inputs = {
        "hidden_states": torch.randn(1, 16, 5, 12, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 4, tiny_wan.TEXT_DIM),
        "return_dict": False,
    }
    with torch.no_grad():
        before = model(**inputs)[0]
        load_vsa_checkpoint(model, saved(tmp_path, gate_tensors(model, "blocks.{}")))
        after = model(**inputs)[0]
        assert not torch.allclose(after, before, atol=1e-4)
        path = saved(tmp_path, model.state_dict(), "own.safetensors")
        again = wan(keep=0.3)
        load_vsa_checkpoint(again, path)
        assert torch.equal(again(**inputs)[0], after)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_files_of_changes(
    tmp_path: Path, prefix: str, strength: float, names: tuple[str, str]
) -> None:
    model = h3()
    layout = prefix + "transformer_blocks.{}.attn"
    tensors = gate_tensors(model, layout, "set_weight")
    down, up = torch.randn(4, 32), torch.randn(32, 4)
    second = torch.randn(4, 32), torch.randn(32, 4)
    home = prefix + "transformer_blocks.0.attn"
    tensors |= {
        f"{home}.to_k.{names[0]}.weight": down,
        f"{home}.to_k.{names[1]}.weight": up,
        f"{home}.to_k.alpha": torch.tensor(2.0),
        f"{home}.to_v.{names[0]}.default.weight": second[0],
        f"{home}.to_v.{names[1]}.default.weight": second[1],
        f"{home}.to_q.diff": torch.randn(32, 32),
        f"{prefix}proj_in.diff_b": torch.randn(32),
    }
    attention = model.transformer_blocks[0].attn
    old = {name: getattr(attention, name).weight.clone() for name in ("to_q", "to_k", "to_v")}
    bias = model.proj_in.bias.clone()
    load_vsa_checkpoint(model, saved(tmp_path, tensors), strength=strength)
    for layer, gate in enumerate(gates(model)):
        whole = tensors[f"{layout.format(layer)}.to_gate_compress.set_weight"]
        torch.testing.assert_close(gate.weight, strength * whole)
    # An alpha of 2 for a rank of 4 is half of the product.
    want = {
        "to_k": old["to_k"] + strength * 0.5 * up @ down,
        "to_v": old["to_v"] + strength * second[1] @ second[0],
        "to_q": old["to_q"] + strength * tensors[f"{home}.to_q.diff"],
    }
    for name, weight in want.items():
        torch.testing.assert_close(getattr(attention, name).weight, weight)
    torch.testing.assert_close(
        model.proj_in.bias, bias + strength * tensors[f"{prefix}proj_in.diff_b"]
    )


def test_additions_to_weights_of_16_bits_are_rounded_once(tmp_path: Path) -> None:
    model = h3().to(torch.bfloat16)
    tensors = gate_tensors(model, "transformer_blocks.{}.attn", "set_weight")
    tensors["transformer_blocks.1.attn.to_q.diff"] = torch.randn(32, 32)
    old = model.transformer_blocks[1].attn.to_q.weight.clone()
    load_vsa_checkpoint(model, saved(tmp_path, tensors))
    want = (old.float() + tensors["transformer_blocks.1.attn.to_q.diff"]).to(torch.bfloat16)
    assert torch.equal(model.transformer_blocks[1].attn.to_q.weight, want)


SQUARE = torch.zeros(32, 32)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"transformer_blocks.9.attn.to_q.diff": SQUARE, "strange.weight": SQUARE},
            "keys that reach nothing in the model, 2 in all, such as strange.weight",
        ),
        ({"transformer_blocks.0.attn.to_q.diff_b": SQUARE[0]}, "reach nothing.*to_q.diff_b"),
        ({"transformer_blocks.0.attn.to_q.set_weight": SQUARE}, "reach nothing.*to_q.set_weight"),
        ({"transformer_blocks.0.attn.to_q.alpha": SQUARE[0, 0]}, "reach nothing.*to_q.alpha"),
        ({"something": SQUARE}, "reach nothing in the model, 1 in all, such as something;"),
        (
            {"transformer_blocks.0.attn.to_q.lora_A.weight": SQUARE},
            "to_q.lora_A.weight is half of a low-rank pair, without the other",
        ),
        (
            {"blocks.0.attn.to_gate_compress.set_weight": SQUARE},
            "blocks.0.attn.to_gate_compress.set_weight and"
            " transformer_blocks.0.attn.to_gate_compress.set_weight are both for",
        ),
        (
            {"transformer_blocks.0.attn.to_gate_compress.weight": SQUARE},
            "to_gate_compress.weight and .*to_gate_compress.set_weight are both for",
        ),
        (
            {"transformer_blocks.0.attn.to_q.diff": SQUARE[:4]},
            r"to_q.diff has shape \(4, 32\), but the model's weight \(32, 32\)",
        ),
        (
            {
                "transformer_blocks.0.attn.to_q.lora_A.weight": SQUARE[:4],
                "transformer_blocks.0.attn.to_q.lora_B.weight": SQUARE[:, :8],
            },
            r"lora_A.weight and .*lora_B.weight has shape \(4, 32\) and \(32, 8\), but",
        ),
    ],
)
def test_misfits_are_named_and_change_nothing(tmp_path: Path, more: Tensors, message: str) -> None:
    model = h3()
    tensors = gate_tensors(model, "transformer_blocks.{}.attn", "set_weight") | more
    old = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"gates.safetensors does not fit MiniMax.*{message}"):
        load_vsa_checkpoint(model, saved(tmp_path, tensors))
    for key, value in model.state_dict().items():
        assert torch.equal(value, old[key])


def test_a_site_without_a_gate_is_named(tmp_path: Path) -> None:
    model = wan()
    tensors = gate_tensors(model, "blocks.{}")
    del tensors["blocks.1.to_gate_compress.weight"]
    with pytest.raises(ValueError, match=r"no gate for 1 of 3 sites .* such as blocks.1.attn1"):
        load_vsa_checkpoint(model, saved(tmp_path, tensors))


def test_models_without_gates_and_files_that_are_not_there(tmp_path: Path) -> None:
    model = wan()
    path = saved(tmp_path, gate_tensors(model, "blocks.{}"))
    for method in (VSAAttn(dense_steps=0), RadialAttn(dense_steps=0)):
        diffattn.set_attn_processor(model, method)
        with pytest.raises(ValueError, match=r"WanTransformer3DModel has no gates; call set_attn"):
            load_vsa_checkpoint(model, path)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nowhere"):
        load_vsa_checkpoint(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="strength is nan, but must be a finite number"):
        load_vsa_checkpoint(model, path, strength=float("nan"))
