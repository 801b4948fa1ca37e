"""Checkpoints of SLA in the published layouts, made for tiny models of Wan."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_wan
import torch
from safetensors.torch import load_file, save_file

import diffattn
from diffattn import SLAAttn, load_sla_checkpoint, save_sla_checkpoint

WIDTH = 24
INPUTS = {
    "timestep": torch.tensor([500]),
    "encoder_hidden_states": torch.linspace(-1, 1, 4 * tiny_wan.TEXT_DIM).view(1, 4, -1),
    "return_dict": False,
}
SPELLINGS = {
    "turbodiffusion": "blocks.{}.self_attn.attn_op.local_attn.proj_l",
    "turbodiffusion, as trained": "net.blocks.{}.self_attn.attn_op.local_attn.proj_l",
    "fastvideo": "blocks.{}.attn1.attn_impl.proj_l",
    "diffusers": "blocks.{}.attn1.attn_op.local_attn.proj_l",
}


def published(spelling: str, layers: int = tiny_wan.LAYERS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tensors = {"blocks.0.ffn.0.weight": torch.zeros(2, 2), "head.head.bias": torch.zeros(3)}
    for layer in range(layers):
        name = SPELLINGS[spelling].format(layer)
        tensors[f"{name}.weight"] = torch.randn(WIDTH, WIDTH, generator=generator)
        tensors[f"{name}.bias"] = torch.randn(WIDTH, generator=generator)
    return tensors


def attached() -> torch.nn.Module:
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, SLAAttn(block_q=32, block_kv=16))
    return model


def forward(model: torch.nn.Module) -> torch.Tensor:
    video = torch.linspace(-1, 1, 16 * 3 * 8 * 8).sin().view(1, 16, 3, 8, 8)
    text = INPUTS["encoder_hidden_states"].to(model.dtype)
    inputs = INPUTS | {"encoder_hidden_states": text, "hidden_states": video.to(model.dtype)}
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_layers_arrive_at_their_sites(tmp_path: Path, spelling: str, ending: str) -> None:
    tensors, path = published(spelling), tmp_path / f"weights.{ending}"
    (torch.save if ending == "pth" else save_file)(tensors, path)
    model = attached()
    before = forward(model)
    load_sla_checkpoint(model, path)
    for layer in range(tiny_wan.LAYERS):
        own = model.get_submodule(f"blocks.{layer}.attn1.sla.proj_l")
        name = SPELLINGS[spelling].format(layer)
        assert torch.equal(own.weight, tensors[f"{name}.weight"])
        assert torch.equal(own.bias, tensors[f"{name}.bias"])
    assert not torch.allclose(forward(model), before, atol=1e-3)


def test_a_folder_of_parts_and_what_is_saved_can_be_loaded(tmp_path: Path) -> None:
    tensors = published("diffusers")
    names = sorted(tensors)
    for part in range(2):
        some = {name: tensors[name] for name in names[part::2]}
        save_file(some, tmp_path / f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors")
    model = attached()
    load_sla_checkpoint(model, str(tmp_path))
    saved = tmp_path / "new" / "sla.safetensors"
    save_sla_checkpoint(model, saved)
    layers = {name: tensor for name, tensor in tensors.items() if "proj_l" in name}
    written = load_file(saved)
    assert written.keys() == layers.keys()
    assert all(torch.equal(written[name], layers[name]) for name in layers)
    other = attached()
    load_sla_checkpoint(other, saved)
    assert torch.equal(forward(other), forward(model))
    own = tiny_wan.transformer()
    diffattn.set_attn_processor(model, None)
    assert model.state_dict().keys() == own.state_dict().keys()
    assert torch.equal(forward(model), forward(own))


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    path, model = tmp_path / "sla.safetensors", attached()
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*sla\.safetensors; dow"):
        load_sla_checkpoint(model, path)
    few, many = published("diffusers", 2), published("diffusers", 5)
    wide = published("diffusers")
    wide["blocks.1.attn1.attn_op.local_attn.proj_l.bias"] = torch.zeros(WIDTH + 1)
    for tensors, message in (
        (
            few,
            r"no layer for sites that the method is attached to, 2 in all, such as blocks\.2\.at",
        ),
        (many, r"layers at sites that the method is not attached to, 4 in all, such as blocks\.3"),
        (wide, r"blocks\.1\.attn1\.proj_l\.bias has shape \(25,\), but the model's \(24,\)"),
        ({"a": torch.zeros(1)}, r"has no layers of SLA, such as blocks\.0\.attn1\.attn_op\.local"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            load_sla_checkpoint(model, path)
    assert not any(p.any() for name, p in model.named_parameters() if ".sla." in name)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"sla\.safetensors is no checkpoint that can be read"):
        load_sla_checkpoint(model, path)
    broken = tmp_path / "sla.pth"
    broken.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"sla\.pth is no checkpoint that can be read"):
        load_sla_checkpoint(model, broken)
    torch.save([torch.zeros(1)], broken)
    with pytest.raises(ValueError, match=r"sla\.pth holds a list, but must hold named tensors"):
        load_sla_checkpoint(model, broken)


def test_models_without_the_method_and_pipelines_of_two(tmp_path: Path) -> None:
    path = tmp_path / "sla.safetensors"
    save_file(published("diffusers"), path)
    plain = tiny_wan.transformer()
    message = "WanTransformer3DModel is not attached to SLAAttn or SLA2Attn; call set_attn_pro"
    with pytest.raises(ValueError, match=f"sla.safetensors is a checkpoint of SLA: {message}"):
        load_sla_checkpoint(plain, path)
    with pytest.raises(ValueError, match=f"cannot save weights of SLA: {message}"):
        save_sla_checkpoint(plain, path)
    with pytest.raises(ValueError, match=r"the file is sla\.pth, but its name must end in \.safet"):
        save_sla_checkpoint(attached(), tmp_path / "sla.pth")
    experts = {"transformer": attached(), "transformer_2": attached()}
    pipe = SimpleNamespace(components=experts, **experts)
    with pytest.raises(ValueError, match="has 2 denoisers, and each has layers of its own: load a"):
        load_sla_checkpoint(pipe, path)


def test_compiled_models_give_what_eager_ones_do(tmp_path: Path) -> None:
    torch._dynamo.reset()
    path = tmp_path / "sla.safetensors"
    save_file(published("diffusers"), path)
    eager, model = attached(), attached()
    for each in (eager, model):
        load_sla_checkpoint(each, path)
    model.compile(backend="eager")
    torch.testing.assert_close(forward(model), forward(eager), atol=1e-5, rtol=1e-4)


def test_weights_move_with_the_model_and_are_trained(tmp_path: Path) -> None:
    model = attached()
    path = tmp_path / "sla.safetensors"
    save_file(published("diffusers"), path)
    load_sla_checkpoint(model, path)
    want = forward(model)
    layer = model.get_submodule("blocks.1.attn1.sla.proj_l")
    video = torch.randn(1, 16, 3, 8, 8)
    model(hidden_states=video, **INPUTS)[0].square().mean().backward()
    assert layer.weight.grad.abs().max() > 0
    assert layer.bias.grad.abs().max() > 0
    model.to(torch.float64)
    assert layer.weight.dtype == torch.float64
    torch.testing.assert_close(forward(model).float(), want, atol=1e-3, rtol=1e-3)
