"""Every method by every way in: dictionaries, pipelines, plans, pictures, LoRA settings."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_wan
import torch

import diffattn
from diffattn import TokenGrid, draw
from diffattn.grid import Reference
from diffattn.lora.settings import TrainSettings
from diffattn.methods import METHODS, Method, Site, from_dict
from diffattn.methods.base import StaticMaskMethod

GRID = TokenGrid(3, 8, 8)
every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_dictionaries_copies_and_pickles(name: str) -> None:
    method = METHODS[name]()
    assert method.type == name
    assert method.paper or name == "dense"
    written = json.loads(json.dumps(method.to_dict()))
    for other in (from_dict(written), copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert other == method
        assert type(other) is type(method)
    namespace = {cls.__name__: cls for cls in METHODS.values()}
    assert eval(repr(method), namespace) == method


@every_method
def test_attached_and_taken_off(name: str) -> None:
    model = tiny_wan.transformer()
    inputs = {
        "hidden_states": torch.randn(1, model.config.in_channels, 3, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 4, model.config.text_dim),
        "return_dict": False,
    }
    with torch.no_grad():
        before = model(**inputs)[0]
        attachment = diffattn.set_attn_processor(model, METHODS[name]())
        assert attachment is not None
        assert model(**inputs)[0].isfinite().all()
        described = attachment.describe(GRID, 10)
        # AutoAttn is described as the method that it chooses.
        assert (described.method.type if name == "auto" else name) in str(described).lower()
        diffattn.set_attn_processor(model, None)
        assert torch.equal(model(**inputs)[0], before)


@every_method
def test_planned_and_drawn(name: str) -> None:
    method: Method = METHODS[name]()
    cost = diffattn.plan(GRID, method, heads=2, head_dim=16, layers=4)
    assert cost.tokens == GRID.tokens
    if isinstance(method, StaticMaskMethod):
        picture = draw.picture(method.for_model("wan2.1", GRID), GRID)
        assert draw.png(picture).startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:references='local'")
@pytest.mark.parametrize("policy", ["exact", "visible", "local"])
@every_method
def test_references(name: str, policy: str) -> None:
    method = METHODS[name](references=policy)
    assert f"references={policy!r}" in repr(method) or policy == "visible"
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    grid = TokenGrid(3, 8, 8, 5, 200, references=(Reference(199, 3, 8, 8), Reference(393, 1, 2, 2)))
    cost = diffattn.plan(grid, method, heads=2, head_dim=16, layers=4)
    assert cost.tokens == 5 + 192 + 200
    assert f"{policy}, " in str(cost)
    query, key, value = torch.randn(3, 1, grid.tokens, 2, 16).unbind(0)
    gate: Any = SimpleNamespace(text_gate=torch.zeros(2))
    projection: Any = SimpleNamespace(project=lambda x, dtype: 0 * x)
    module = torch.nn.Module()
    module.heads, module.head_dim = 2, 16  # type: ignore[assignment]
    router = METHODS["sla2"]().site_weights(module, joint=True)
    weights = {"linfusion": gate, "sla": projection, "sla2": router}.get(name)
    site = Site("wan2.1", 0, 1, grid, weights=weights)
    out = method.for_model("wan2.1", grid.alone).attend(query, key, value, site)
    assert out.shape == query.shape
    assert out.isfinite().all()
    if isinstance(method, StaticMaskMethod):
        assert draw.png(draw.picture(method, grid)).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dense", "auto")])
def test_settings_of_a_lora(name: str) -> None:
    settings = TrainSettings(attention={"type": name})
    assert settings.to_dict()["attention"]["type"] == name
