"""A LoRA that is loaded by `load_lora`: files of every age, and one line for every bad file."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_lora
import pytest
import tiny_training
import tiny_wan
import torch
from made_lora import CELLS, NEARBY
from safetensors.torch import load_file, save_file
from tiny_complete import COMPLETE

from diffattn.attach.denoiser import attached_to
from diffattn.lora import LoraError, load_lora
from diffattn.lora.adapter import LORA_FILE, METHOD_FILE
from diffattn.lora.loading import find_file
from diffattn.methods import from_dict

SITE = "transformer.blocks.0.attn1.to_q"


def wan() -> Any:
    return tiny_wan.PIPELINES["t2v"]()


def factors(width: int = 48, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"{SITE}.lora_A.weight": torch.full((rank, width), 0.1),
        f"{SITE}.lora_B.weight": torch.full((width, rank), 0.1),
    }


def refusal(path: Path) -> str:
    with pytest.raises(LoraError) as error:
        load_lora(wan(), path)
    assert "\n" not in str(error.value)
    return str(error.value)


class Evil:
    """A pickle of it makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


class TestPickledFiles:
    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".BIN"])
    def test_they_are_refused_by_name(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"lora{suffix}"
        torch.save(factors(), path)
        message = (
            f"LoRA {path} is a pickled file ({suffix}), which can run code when it is read: only"
            f" .safetensors files are read; ask its author for one"
        )
        assert refusal(path) == message
        assert refusal(tmp_path) == message

    def test_none_is_run(self, tmp_path: Path) -> None:
        for name in ("a.bin", "b.safetensors"):
            (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
            refusal(tmp_path / name)
        assert not (tmp_path / "mark").exists()

    def test_one_beside_a_good_file_is_not_looked_at(self, tmp_path: Path) -> None:
        save_file(factors(), tmp_path / LORA_FILE)
        (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"pickled")
        assert load_lora(wan(), tmp_path) is None


class TestFiles:
    def test_what_is_not_there(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "none") == f"there is no LoRA at {tmp_path / 'none'}"

    def test_a_folder_without_one(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / METHOD_FILE)
        assert refusal(tmp_path) == (
            f"cannot read LoRA {tmp_path}: the folder holds no .safetensors file"
        )

    def test_a_folder_with_one_of_another_name(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / METHOD_FILE)
        save_file(factors(), tmp_path / "style.safetensors")
        assert find_file(tmp_path) == tmp_path / "style.safetensors"

    def test_a_folder_with_several(self, tmp_path: Path) -> None:
        for name in "ab":
            save_file(factors(), tmp_path / f"{name}.safetensors")
        assert refusal(tmp_path) == (
            f"folder {tmp_path} holds 2 .safetensors files, none of them called {LORA_FILE}: name"
            f" the file of the LoRA, such as {tmp_path / 'a.safetensors'}"
        )

    @pytest.mark.parametrize("name", ["lora.txt", "lora"])
    def test_another_kind_of_file(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text("x")
        ending = Path(name).suffix or "nothing"
        assert refusal(tmp_path / name) == (
            f"LoRA {tmp_path / name} is no .safetensors file: its name ends in {ending!r}"
        )


def _half(path: Path) -> str:
    kept = factors()
    del kept[f"{SITE}.lora_B.weight"]
    save_file(kept | {"transformer.blocks.1.attn1.to_q.lora_B.weight": torch.ones(48, 2)}, path)
    return (
        f"LoRA {path} is half a LoRA: 2 of its 2 tensors have no counterpart, such as"
        f" {SITE}.lora_A.weight, which needs {SITE}.lora_B.weight; get the whole file"
    )


def _half_of_kohya(path: Path) -> str:
    name = "lora_unet_blocks_0_self_attn_q"
    save_file({f"{name}.lora_up.weight": torch.ones(48, 2), f"{name}.alpha": torch.ones(())}, path)
    return (
        f"LoRA {path} is half a LoRA: 1 of its 2 tensors have no counterpart, such as"
        f" {name}.lora_up.weight, which needs {name}.lora_down.weight; get the whole file"
    )


def _of_stable_diffusion(path: Path) -> str:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)},
        path,
    )
    return (
        f"LoRA {path} is not for WanTransformer3DModel: diffusers cannot place its tensors, such as"
        f" {name}.lora_down.weight ("
    )


def _with(value: float) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        broken = factors()
        broken[f"{SITE}.lora_B.weight"][3, 1] = value
        save_file(broken, path)
        return (
            f"LoRA {path} holds NaN or infinity in 1 of its 2 tensors, such as"
            f" {SITE}.lora_B.weight: the file is damaged or its training has diverged; take an"
            f" earlier checkpoint"
        )

    return make


def _of_two_ranks(path: Path) -> str:
    save_file(factors() | {f"{SITE}.lora_B.weight": torch.ones(48, 3)}, path)
    return (
        f"LoRA {path} is damaged: the factors of blocks.0.attn1.to_q are of rank 2 and 3, but must"
        f" be of one rank"
    )


def _of_another_width(path: Path) -> str:
    save_file(factors(width=64), path)
    return (
        f"LoRA {path} does not fit WanTransformer3DModel: blocks.0.attn1.to_q has in_features 48,"
        f" the LoRA is for 64"
    )


def _of_vectors(path: Path) -> str:
    save_file(factors() | {f"{SITE}.lora_A.weight": torch.ones(48)}, path)
    return (
        f"LoRA {path} does not fit WanTransformer3DModel: blocks.0.attn1.to_q has in_features 48,"
        f" the LoRA is for (48,)"
    )


def _empty(path: Path) -> str:
    save_file({}, path)
    return f"LoRA {path} is empty: it holds no tensors"


def _cut_off(path: Path) -> str:
    save_file(factors(), path)
    path.write_bytes(path.read_bytes()[:-100])
    return f"cannot read LoRA {path}: "


def _with_header(entry: str, message: str, name: str = "diffattn") -> Callable[[Path], str]:
    def make(path: Path) -> str:
        save_file(factors(), path, metadata={name: entry})
        return f"LoRA {path} {message}"

    return make


_ENTRY = {"method": NEARBY, "denoiser": "transformer", "steps": 1, "latents": [], "settings": {}}
BAD: dict[str, Callable[[Path], str]] = {
    "half": _half,
    "half of kohya": _half_of_kohya,
    "Stable Diffusion's": _of_stable_diffusion,
    "NaN": _with(float("nan")),
    "infinity": _with(float("-inf")),
    "two ranks": _of_two_ranks,
    "another width": _of_another_width,
    "vectors": _of_vectors,
    "empty": _empty,
    "cut off": _cut_off,
    "header is text": _with_header(
        "{broken", "has a damaged header: its entry 'diffattn' is no JSON (Expecting property name"
    ),
    "header is deep": _with_header(
        "[" * 100_000, "has a damaged header: its entry 'diffattn' is no JSON ("
    ),
    **{
        f"config is {entry[:5]}": _with_header(
            entry,
            "has a damaged header: its entry 'lora_adapter_metadata' is no JSON object; write the",
            "lora_adapter_metadata",
        )
        for entry in ("{r: 2}", "[1]", "[" * 100_000)
    },
    "header is a list": _with_header(
        "[1]", "has a damaged header: its entry 'diffattn' is [1], but must be an object"
    ),
    "header of another version": _with_header(
        json.dumps(_ENTRY | {"latents": 1}).replace("steps", "epochs"),
        "was written by another version of diffattn: its header lacks 'steps'",
    ),
    "method is text": _with_header(
        json.dumps(_ENTRY | {"method": "gna"}),
        "has a damaged header: its method is 'gna', but must be an object with a \"type\"",
    ),
    "denoiser is a number": _with_header(
        json.dumps(_ENTRY | {"denoiser": 3}),
        "has a damaged header: its denoiser is 3, but must be the name of a component",
    ),
    "denoiser is missing": _with_header(
        json.dumps(_ENTRY | {"denoiser": "transformer_2"}),
        "is for the transformer_2, which WanPipeline lacks",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_files_get_one_line(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    expected = BAD[bad](path)
    assert refusal(path).startswith(expected)


def test_a_method_that_cannot_be_had(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    entry = _ENTRY | {"method": {"type": "of tomorrow"}}
    save_file(factors(), path, metadata={"diffattn": json.dumps(entry)})
    assert "'of tomorrow'" in refusal(path)


def test_nan_in_a_method_s_own_weights(tmp_path: Path) -> None:
    made_lora.make(wan(), tmp_path, CELLS)
    own = load_file(tmp_path / METHOD_FILE)
    broken = {name: weight * float("nan") for name, weight in own.items()}
    save_file(broken, tmp_path / METHOD_FILE)
    assert refusal(tmp_path).startswith(
        f"{tmp_path / METHOD_FILE} holds NaN or infinity in 3 of its 3 tensors, such as"
    )


def test_a_method_s_own_weights_are_loaded(tmp_path: Path) -> None:
    made_lora.make(wan(), tmp_path, CELLS)
    pipe = wan()
    load_lora(pipe, tmp_path)
    for name, weight in load_file(tmp_path / METHOD_FILE).items():
        assert torch.equal(pipe.transformer.get_parameter(name), weight)


def test_a_lora_from_elsewhere_is_on_and_attaches_nothing(tmp_path: Path) -> None:
    save_file(factors(), tmp_path / "style.safetensors")
    pipe, stock = wan(), wan()
    assert load_lora(pipe, tmp_path) is None
    stock.load_lora_weights(tmp_path / "style.safetensors")
    assert torch.equal(tiny_wan.run(pipe), tiny_wan.run(stock))
    assert not torch.equal(tiny_wan.run(pipe), tiny_wan.run(wan()))


class TestStrength:
    """The factor alpha / rank: in the weights now, in the header in files of before."""

    @pytest.mark.parametrize(
        "variant", [{}, {"alpha": 5}, {"alpha": 8, "rslora": True}, {"alpha": 3, "dora": True}]
    )
    @pytest.mark.parametrize("name", ["wan", "flux", "sd1.5"])
    def test_loaders_of_a_and_b_alone(
        self, name: str, variant: dict[str, Any], tmp_path: Path
    ) -> None:
        case = COMPLETE[name]
        deltas = made_lora.make(case.build(), tmp_path, NEARBY, **{"rank": 2, **variant})
        stored = load_file(tmp_path / LORA_FILE)
        part = "unet" if name == "sd1.5" else "transformer"
        assert deltas
        for layer, delta in deltas.items():
            a, b = (stored[f"{part}.{layer}.lora_{side}.weight"] for side in "AB")
            torch.testing.assert_close(b @ a, delta)
        assert not any(key.endswith(".alpha") for key in stored)

    @pytest.mark.parametrize("variant", [{"alpha": 5}, {"alpha": 8, "rslora": True}])
    def test_loaders_of_the_header(self, variant: dict[str, Any], tmp_path: Path) -> None:
        deltas = made_lora.make(wan(), tmp_path, NEARBY, **variant)
        pipe = wan()
        pipe.load_lora_weights(tmp_path)
        for layer, delta in deltas.items():
            loaded: Any = pipe.transformer.get_submodule(layer)
            torch.testing.assert_close(loaded.get_delta_weight("default_0"), delta)

    def test_files_of_before(self, tmp_path: Path) -> None:
        """B as trained, alpha in the header alone."""
        pipe = wan()
        config = {"r": 2, "lora_alpha": 10, "target_modules": ["blocks.0.attn1.to_q"]}
        pipe.save_lora_weights(
            tmp_path,
            transformer_lora_layers={
                name.removeprefix("transformer."): weight for name, weight in factors().items()
            },
            transformer_lora_adapter_metadata=config,
        )
        load_lora(pipe, tmp_path)
        layer = pipe.transformer.blocks[0].attn1.to_q
        (adapter,) = layer.active_adapters
        expected = 5 * factors()[f"{SITE}.lora_B.weight"] @ factors()[f"{SITE}.lora_A.weight"]
        torch.testing.assert_close(layer.get_delta_weight(adapter), expected)


class TestHeader:
    def test_equal_loras_are_equal_files(self, tmp_path: Path) -> None:
        for name in "ab":
            made_lora.make(wan(), tmp_path / name, NEARBY, alpha=3)
        one, other = ((tmp_path / name / LORA_FILE).read_bytes() for name in "ab")
        assert one == other

    def test_nothing_in_it_depends_on_the_order_of_a_set(self, tmp_path: Path) -> None:
        made_lora.make(wan(), tmp_path, NEARBY)
        data = (tmp_path / LORA_FILE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        assert list(metadata) == sorted(metadata)
        assert {"diffattn", "format", "lora_adapter_metadata"} == set(metadata)
        config = json.loads(metadata["lora_adapter_metadata"])
        targets = config["transformer.target_modules"]
        assert targets == sorted(targets)
        assert (config["transformer.lora_alpha"], config["transformer.r"]) == (2, 2)


def test_the_method_that_was_attached_stays(tmp_path: Path) -> None:
    made_lora.make(wan(), tmp_path, NEARBY)
    pipe = wan()
    wider = from_dict(NEARBY | {"window": [5, 5, 5]})
    pipe.set_attn_processor(wider)
    load_lora(pipe, tmp_path)
    attached: Any = attached_to(pipe.transformer)
    assert {group.chosen for group in attached.groups} == {wider}


def test_a_lora_that_was_trained_under_a_policy_brings_the_policy(tmp_path: Path) -> None:
    phases = [{"method": {"type": "dense"}, "until": 0.25}, {"method": tiny_training.ATTENTION}]
    policy = {"type": "policy", "rules": [{"layers": [1], "phases": phases}]}
    changes = {"attention": policy, "attention_output": 0.0}
    made = tiny_training.trainer(tmp_path, checkpoint_every=1, **changes)
    made.train()
    whole = tiny_training.trained(made)
    again = tiny_training.trainer(tmp_path, resume=True, checkpoint_every=1, **changes)
    assert again.step == tiny_training.STEPS
    assert all(torch.equal(whole[n], w) for n, w in tiny_training.trained(again).items())

    pipe = wan()
    record = load_lora(pipe, tmp_path)
    assert record is not None
    assert record.method["type"] == "policy"
    attached = attached_to(pipe.transformer)
    assert attached is not None
    assert {group.chosen.described_as for group in attached.groups} == {from_dict(policy)}
