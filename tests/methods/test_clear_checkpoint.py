"""Loading checkpoints with the keys of the published ones, made for a tiny Flux."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import tiny_wan
import torch
from safetensors.torch import save_file

import diffattn
from diffattn import CLEARAttn, load_clear_checkpoint

PROJECTIONS = ("attn.to_q.", "attn.to_k.", "attn.to_v.", "attn.to_out.")
Tensors = dict[str, torch.Tensor]


def published(down_factor: int = 1) -> Tensors:
    """A checkpoint as the public code writes it: all whose name has one of these in it."""
    torch.manual_seed(5)
    out = {
        name: torch.randn(weight.shape)
        for name, weight in tiny_families.flux().state_dict().items()
        if any(part in name for part in PROJECTIONS)
    }
    if down_factor > 1:
        for kind in ("transformer_blocks", "single_transformer_blocks"):
            for i in range(2):
                shape = (1, 1, 1, down_factor, 1, down_factor, 1)
                out[f"{kind}.{i}.attn.processor.spatial_weight"] = torch.randn(shape)
    return out


def saved(folder: Path, tensors: Tensors) -> Path:
    path = folder / "clear.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("down_factor", [1, 4])
def test_weights_arrive_where_their_names_say(tmp_path: Path, down_factor: int) -> None:
    tensors = published(down_factor)
    # 2 dual-stream blocks with four linears, 2 single-stream blocks with three.
    assert len(tensors) == (2 * 4 + 2 * 3) * 2 + (4 if down_factor > 1 else 0)
    model = tiny_families.flux()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    diffattn.set_attn_processor(model, CLEARAttn(radius=3, down_factor=down_factor))
    load_clear_checkpoint(model, saved(tmp_path, tensors))
    after = model.state_dict()
    for name, weight in tensors.items():
        name = name.replace(".processor.", ".clear.")
        assert torch.equal(after[name].flatten(), weight.flatten()), name
    for name in before.keys() - tensors.keys():
        assert torch.equal(after[name], before[name]), name
    # Row a, column c of a cell.
    if down_factor > 1:
        name = "transformer_blocks.1.attn.processor.spatial_weight"
        ours = model.transformer_blocks[1].attn.clear.spatial_weight
        assert ours[1, 2] == tensors[name][0, 0, 0, 1, 0, 2, 0]


def test_a_checkpoint_without_pooled_keys_needs_no_method(tmp_path: Path) -> None:
    model, tensors = tiny_families.flux().to(torch.bfloat16), published()
    load_clear_checkpoint(model, str(saved(tmp_path, tensors)))
    for name, weight in tensors.items():
        assert torch.equal(model.get_parameter(name), weight.bfloat16())


def test_layers_with_lora_get_their_own_weights(tmp_path: Path) -> None:
    from peft import LoraConfig

    model, tensors = tiny_families.flux(), published()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    load_clear_checkpoint(model, saved(tmp_path, tensors))
    name = "transformer_blocks.0.attn.to_q"
    base = model.get_parameter(f"{name}.base_layer.weight")
    assert torch.equal(base, tensors[f"{name}.weight"])


def without(key: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if key in name]:
            del tensors[name]

    return change


def renamed(tensors: Tensors) -> None:
    tensors["transformer_blocks.7.attn.to_q.weight"] = torch.zeros(32, 32)


def reshaped(tensors: Tensors) -> None:
    tensors["transformer_blocks.0.attn.to_q.weight"] = torch.zeros(32, 31)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("to_v"), r"no key for parameters.*, 8 in all, such as .*to_v\.bias; it must be"),
        (renamed, r"keys that the model has no .*, 1 in all, such as transformer_blocks\.7"),
        (reshaped, r"to_q\.weight has shape \(32, 31\), but the model's \(32, 32\)"),
    ],
)
def test_other_checkpoints_are_refused_whole(
    tmp_path: Path, change: Callable[[Tensors], Any], message: str
) -> None:
    model, tensors = tiny_families.flux(), published()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    change(tensors)
    with pytest.raises(ValueError, match=f"clear.safetensors does not fit FluxTr.*{message}"):
        load_clear_checkpoint(model, saved(tmp_path, tensors))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(("theirs", "ours"), [(4, 1), (1, 4), (4, 2)])
def test_the_down_factor_must_be_that_of_the_method(tmp_path: Path, theirs: int, ours: int) -> None:
    model = tiny_families.flux()
    diffattn.set_attn_processor(model, CLEARAttn(down_factor=ours))
    message = rf"is for CLEARAttn with down_factor={theirs}, but .* with {ours}; attach CLEARAttn"
    with pytest.raises(ValueError, match=message):
        load_clear_checkpoint(model, saved(tmp_path, published(theirs)))


def test_other_models_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nowhere"):
        load_clear_checkpoint(tiny_families.flux(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not fit WanTransformer3DModel"):
        load_clear_checkpoint(tiny_wan.transformer(), saved(tmp_path, published()))
    model = tiny_families.flux().to("meta")
    with pytest.raises(ValueError, match="moved away by offloading; load the checkpoint before"):
        load_clear_checkpoint(model, saved(tmp_path, published()))
