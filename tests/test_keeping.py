"""What is kept of an attached model: its state, its copies, and why it cannot be pickled."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_lora
import pytest
import tiny_wan
import torch

import diffattn
from diffattn.lora import load_lora
from diffattn.methods import from_dict

METHODS: dict[str, dict[str, Any]] = {
    "gna": {"window": [3, 3, 3]},
    "clear": {"radius": 2, "frame_radius": 1, "down_factor": 2},
    "linfusion": {},
    "sla": {"keep": 0.3, "block_q": 16, "block_kv": 16},
    "sla2": {"keep": 0.3, "block_q": 16, "block_kv": 16},
    "agent": {"k_scale2": [0.1, 0.2, 0.3]},
    "vmoba": {},
}
WITH_WEIGHTS = ("clear", "linfusion", "sla", "sla2")
REFUSAL = (
    "a pipeline or model with a method of diffattn attached cannot be pickled: the method is an"
    " attention backend of this process. Call set_attn_processor(None) before pickle.dumps or"
    " torch.save, and attach the method again after loading. state_dict(), save_pretrained() and"
    " copy.deepcopy() work as it is"
)
INPUTS = {
    "hidden_states": torch.randn(1, 16, 3, 12, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([900]),
    "encoder_hidden_states": torch.ones(1, 6, tiny_wan.TEXT_DIM),
}


def attached(name: str, seed: int = 0) -> torch.nn.Module:
    """A denoiser with a method whose own weights are no longer those of the start."""
    model = tiny_wan.transformer(seed)
    settings = METHODS[name] | {"type": name, "dense_layers": 0, "dense_steps": 0}
    diffattn.set_attn_processor(model, from_dict(settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if f".{name}." in key:
                weight += torch.randn(weight.shape, generator=generator)
    return model


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).sample


@pytest.mark.filterwarnings("ignore:.*without a pipeline")
@pytest.mark.parametrize("name", METHODS)
class TestState:
    def test_it_loads_back(self, name: str) -> None:
        model, other = attached(name), attached(name, seed=1)
        assert not torch.equal(output(model), output(other))
        other.load_state_dict(model.state_dict())
        assert torch.equal(output(model), output(other))

    def test_it_survives_a_file(self, name: str, tmp_path: Path) -> None:
        model, other = attached(name), attached(name, seed=1)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(output(model), output(other))

    def test_it_has_the_method_s_own_weights(self, name: str) -> None:
        own = [key for key in attached(name).state_dict() if f".{name}." in key]
        assert bool(own) == (name in WITH_WEIGHTS)

    def test_a_copy_is_the_same(self, name: str) -> None:
        model = attached(name)
        assert torch.equal(output(copy.deepcopy(model)), output(model))


def _saved(it: Any) -> bytes:
    file = io.BytesIO()
    torch.save(it, file)
    return file.getvalue()


@pytest.mark.parametrize("dump", [pickle.dumps, _saved], ids=["pickle", "torch.save"])
class TestPickling:
    def test_an_attached_model_says_why_not(self, dump: Callable[[Any], bytes]) -> None:
        model = attached("gna")
        expected = output(model)
        pipe = tiny_wan.PIPELINES["t2v"]()
        pipe.set_attn_processor(from_dict({"type": "radial"}))
        for it in (model, pipe, pipe.transformer, pipe.scheduler):
            with pytest.raises(TypeError) as error:
                dump(it)
            assert str(error.value) == REFUSAL
        assert torch.equal(output(model), expected)

    def test_a_detached_one_comes_back_with_its_lora(
        self, dump: Callable[[Any], bytes], tmp_path: Path
    ) -> None:
        method = {"type": "gna", "window": [3, 3, 3], "dense_layers": 0, "dense_steps": 0}
        made_lora.make(tiny_wan.PIPELINES["t2v"](), tmp_path, method)
        pipe = tiny_wan.PIPELINES["t2v"]()
        load_lora(pipe, tmp_path)
        sparse = output(pipe.transformer)
        pipe.set_attn_processor(None)
        data = dump(pipe.transformer)
        loaded = (
            pickle.loads(data)
            if dump is pickle.dumps
            else torch.load(io.BytesIO(data), weights_only=False)
        )
        assert torch.equal(output(loaded), output(tiny_wan.transformer()))
        diffattn.set_attn_processor(loaded, from_dict(method))
        torch.testing.assert_close(output(loaded), sparse, atol=1e-4, rtol=1e-4)
