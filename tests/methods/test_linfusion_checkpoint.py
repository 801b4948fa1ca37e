"""Checkpoints in the published layout, made for tiny U-Nets."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_files
import numpy as np
import pytest
import tiny_families
import tiny_wan
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import diffattn
from diffattn import LinFusionAttn, load_linfusion_checkpoint, save_linfusion_checkpoint

GOLDENS = golden_files.GOLDENS / "linfusion"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CASE = tiny_families.CASES["sd1.5"]


def forward(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**CASE.inputs(), return_dict=False)[0]


def published(folder: Path, mid_dim: int | None = 5) -> dict[str, torch.Tensor]:
    """A checkpoint as the public code writes it, for the tiny U-Net."""
    model, generator = CASE.build(), torch.Generator().manual_seed(5)
    tensors, modules = {}, []
    for i, name in enumerate(CASE.sites):
        attn: Any = model.get_submodule(name)
        width = attn.to_q.in_features
        middle = width if mid_dim is None else mid_dim
        modules.append(
            {"module_name": name, "dim_n": width, "heads": attn.heads,
             "projection_mid_dim": mid_dim}
        )  # fmt: skip
        shapes = {f"{part}.weight": (width, width) for part in ("to_q", "to_k", "to_v", "to_out.0")}
        shapes["to_out.0.bias"] = (width,)
        for part in ("to_q_", "to_k_") if mid_dim != -1 else ():
            shapes |= {f"{part}.0.weight": (middle, width), f"{part}.0.bias": (middle,)}
            shapes |= {f"{part}.1.weight": (middle,), f"{part}.1.bias": (middle,)}
            shapes |= {f"{part}.3.weight": (width, middle), f"{part}.3.bias": (width,)}
        for key, shape in shapes.items():
            tensors[f"{i}.{key}"] = torch.randn(shape, generator=generator)
    config = {"_class_name": "LinFusion", "_diffusers_version": "0.30.0", "modules_list": modules}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return tensors


def attached(mid_dim: float | None = 5) -> torch.nn.Module:
    model = CASE.build()
    diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=mid_dim))
    return model


@pytest.mark.parametrize("mid_dim", [None, 5, -1])
def test_weights_arrive_where_the_list_says_and_go_when_taken_off(
    tmp_path: Path, mid_dim: int | None
) -> None:
    tensors = published(tmp_path, mid_dim)
    model = CASE.build()
    want, before = forward(model), {k: v.clone() for k, v in model.state_dict().items()}
    diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=mid_dim))
    for _ in range(2):  # the second time must not take what it has loaded for the model's own
        load_linfusion_checkpoint(model, str(tmp_path))
    state = model.state_dict()
    for key, tensor in tensors.items():
        place, _, name = key.partition(".")
        own = "linfusion." if "_." in name else ""
        assert torch.equal(state[f"{CASE.sites[int(place)]}.{own}{name}"], tensor), key
    touched = {f"{CASE.sites[int(k.split('.')[0])]}.{k.partition('.')[2]}" for k in tensors}
    for name in before.keys() - touched:
        assert torch.equal(state[name], before[name]), name
    assert not torch.allclose(forward(model), want, atol=1e-3)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        diffattn.set_attn_processor(each, None)
        assert each.state_dict().keys() == before.keys()
        assert all(torch.equal(each.state_dict()[name], before[name]) for name in before)
        assert torch.equal(forward(each), want)


def test_the_public_codes_unet(tmp_path: Path) -> None:
    with np.load(GOLDENS / "3_unet_tiny_io.npz") as file:
        want = {key: torch.from_numpy(file[key]) for key in file.files if key[:6] != "module"}
        sizes = file["module_dim_heads"].tolist()
        names = file["module_names"].tolist()
    modules = [
        {"module_name": name, "dim_n": width, "heads": heads, "projection_mid_dim": None}
        for name, (width, heads) in zip(names, sizes, strict=True)
    ]
    (tmp_path / "config.json").write_text(json.dumps({"modules_list": modules}))
    save_file(
        {k[3:]: v.contiguous() for k, v in want.items() if k[:3] == "lf."}, tmp_path / WEIGHTS
    )
    model = tiny_families.unet(
        sample_size=8,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    with np.load(GOLDENS / "3_unet_tiny_weights.npz") as file:
        model.load_state_dict({key[2:]: torch.from_numpy(file[key]) for key in file.files})
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).to_q.weight.zero_()  # the checkpoint has its own
    diffattn.set_attn_processor(model, LinFusionAttn())
    load_linfusion_checkpoint(model, tmp_path)
    inputs = {name: want[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    with torch.no_grad():
        out = model(**inputs).sample
    torch.testing.assert_close(out, want["out_linfusion"], atol=2e-6, rtol=0)


def test_what_is_saved_is_what_was_loaded(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "new" / "ours"
    theirs.mkdir()
    tensors, model = published(theirs), attached()
    load_linfusion_checkpoint(model, theirs)
    save_linfusion_checkpoint(model, ours)
    saved = load_file(ours / WEIGHTS)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in tensors.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (theirs, ours)]
    assert configs[0]["modules_list"] == configs[1]["modules_list"]
    other = attached()
    load_linfusion_checkpoint(other, ours)
    assert torch.equal(forward(other), forward(model))


def test_layers_with_lora_get_and_lose_their_own_weights(tmp_path: Path) -> None:
    tensors, model = published(tmp_path), attached()
    name = f"{CASE.sites[1]}.to_q"
    before = model.get_parameter(f"{name}.weight").clone()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    load_linfusion_checkpoint(model, tmp_path)
    weight = model.get_parameter(f"{name}.base_layer.weight")
    assert torch.equal(weight, tensors["1.to_q.weight"])
    diffattn.set_attn_processor(model, None)
    assert torch.equal(weight, before)


def without(key: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda config, tensors: [tensors.pop(k) for k in list(tensors) if key in k]


def one_more_key(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["9.to_q.weight"] = torch.zeros(8, 8)


def reshaped(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["0.to_q_.0.weight"] = torch.zeros(5, 7)


def other(place: int, **changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda config, tensors: config["modules_list"][place].update(changes)


def one_less(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    del config["modules_list"][-1]


def one_more(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["modules_list"].append(config["modules_list"][0] | {"module_name": "mid.attn1"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("0.to_v"), r"no key for parameters of the model, 1 in all, such as 0\.to_v\.wei"),
        (one_more_key, r"keys that the model has no parameter for, 1 in all, such as 9\.to_q\.we"),
        (reshaped, r"0\.to_q_\.0\.weight has shape \(5, 7\), but the model's \(5, 8\)"),
        (other(1, dim_n=320), "has 320 channels and 2 heads in it, but 16 and 2 in the model"),
        (other(0, heads=8), "has 8 channels and 8 heads in it, but 8 and 2 in the model"),
        (one_less, r"no entry for modules .*, 1 in all, such as mid_block.* attached to all of it"),
        (one_more, r"modules that the method is not attached to, 1 in all, such as mid\.attn1"),
    ],
)
def test_other_checkpoints_are_refused_whole(
    tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    tensors = published(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS)
    model = attached()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"does not fit UNet2DConditionModel: .*{message}"):
        load_linfusion_checkpoint(model, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(("theirs", "ours"), [(5, 4), (-1, None), (None, -1), (3, None)])
def test_the_width_must_be_that_of_the_method(
    tmp_path: Path, theirs: int | None, ours: int | None
) -> None:
    published(tmp_path, theirs)
    found = 8 if ours is None else ours
    message = (
        rf"is for LinFusionAttn\(mid_dim={theirs}\), but down_blocks\.0.* mid_dim={found} where"
    )
    with pytest.raises(ValueError, match=message):
        load_linfusion_checkpoint(attached(ours), tmp_path)


@pytest.mark.parametrize(
    ("widths", "method"),
    [
        (lambda width: width // 4, r"LinFusionAttn\(mid_dim=0\.25\)"),
        (
            lambda width: 3 if width == 8 else 4,
            "a mapping of patterns to LinFusionAttn of different",
        ),
    ],
)
def test_widths_that_differ_from_layer_to_layer(
    tmp_path: Path, widths: Callable[[int], int], method: str
) -> None:
    """As in the published weights for XL, which have a sixteenth of each layer's."""
    published(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for entry in config["modules_list"]:
        entry["projection_mid_dim"] = widths(entry["dim_n"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"is for {method}"):
        load_linfusion_checkpoint(attached(1), tmp_path)
    model = attached(0.25)
    save_linfusion_checkpoint(model, tmp_path / "saved")
    load_linfusion_checkpoint(model, tmp_path / "saved")


def test_other_models_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json in .*; download"):
        load_linfusion_checkpoint(attached(), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"there is no diffusion_pytorch_model\.safetensors"
    ):
        load_linfusion_checkpoint(attached(), tmp_path)
    published(tmp_path)
    with pytest.raises(ValueError, match="UNet2DConditionModel is not attached to LinFusionAttn"):
        load_linfusion_checkpoint(CASE.build(), tmp_path)
    wan = tiny_wan.transformer()
    diffattn.set_attn_processor(wan, LinFusionAttn())
    for call in (load_linfusion_checkpoint, save_linfusion_checkpoint):
        with pytest.raises(ValueError, match=r"for the U-Nets of .* WanTransformer3DModel is none"):
            call(wan, tmp_path)
    model = attached().to("meta")
    with pytest.raises(ValueError, match="moved away by offloading; load the checkpoint before"):
        load_linfusion_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match="moved away by offloading; save the checkpoint before"):
        save_linfusion_checkpoint(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for text in ("{}", "no json", '{"modules_list": [{"name": "x"}]}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"config\.json is not the configuration of a LinFusion"
        ):
            load_linfusion_checkpoint(attached(), tmp_path)


def test_weights_that_offloading_has_moved_away_stay(tmp_path: Path) -> None:
    published(tmp_path)
    model = attached()
    load_linfusion_checkpoint(model, tmp_path)
    model.to("meta")
    with pytest.warns(UserWarning, match="projections of a LinFusion checkpoint stay in the model"):
        diffattn.set_attn_processor(model, None)
