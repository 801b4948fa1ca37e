"""calibrate_agent against a search over the stock model's own attention calls."""

import json
from pathlib import Path

import pytest
import torch
from stock import recorded
from tiny_families import CASES
from tiny_pipelines import PIPELINES

import diffattn
from diffattn import AgentAttn
from diffattn.methods import Site

CELL = (2, 3, 4)


def test_factors_are_the_best_of_the_search() -> None:
    case = "cogvideox-5b"
    pipe = PIPELINES[case].build()
    calls = recorded(
        pipe.transformer, CASES[case].sites, lambda: PIPELINES[case].run(pipe, steps=5)
    )
    method = AgentAttn(cell=CELL)
    candidates = (0.0, 0.25, 0.5, 1.0)
    want = PIPELINES[case].run(pipe, steps=5)
    seen: list[torch.Tensor] = []
    found = diffattn.calibrate_agent(
        pipe,
        lambda: seen.append(PIPELINES[case].run(pipe, steps=5)),
        method,
        k_scale2=candidates,
    )
    # Meanwhile attention is dense, and afterwards nothing is attached.
    torch.testing.assert_close(seen[0], want, atol=1e-4, rtol=1e-3)
    assert torch.equal(PIPELINES[case].run(pipe, steps=5), want)
    assert isinstance(found.k_scale2, tuple)
    assert isinstance(found.k_shortcut, tuple)
    grid = CASES[case].grid_of(calls[CASES[case].sites[0]][0][0].shape[1])
    for layer, name in enumerate(CASES[case].sites):
        errors = {}
        for k_scale2 in candidates:
            plain = AgentAttn(cell=CELL, k_scale2=k_scale2, k_shortcut=0)
            residuals, values = [], []
            for q, k, v in calls[name][:2]:  # of five steps, two have agents
                out = plain.attend(q, k, v, Site("cogvideox", layer, 2, grid))
                dense = AgentAttn(cell=(1, 1, 1)).attend(q, k, v, Site("cogvideox", 0, 2, grid))
                residuals.append((dense - out)[:, grid.video].double())
                values.append(v[:, grid.video].double())
            a, b = torch.cat(values).flatten(), torch.cat(residuals).flatten()
            shortcut = torch.linalg.lstsq(a[:, None], b[:, None]).solution.item()
            errors[(b - shortcut * a).square().sum().item()] = k_scale2, shortcut
        best = errors[min(errors)]
        assert found.k_scale2[layer] == best[0]
        assert found.k_shortcut[layer] == pytest.approx(best[1], abs=1e-4)
    assert len(set(found.k_shortcut)) == 2


def test_what_is_found_can_be_saved_and_attached(tmp_path: Path) -> None:
    pipe = PIPELINES["sd1.5"].build()
    found = diffattn.calibrate_agent(pipe, lambda: PIPELINES["sd1.5"].run(pipe, steps=3))
    assert isinstance(found.k_shortcut, tuple)
    # The grids of 6 x 8 have no agents: their blocks keep what they had.
    layers = [name.split("attn")[0] for name in CASES["sd1.5"].sites]
    assert len(found.k_shortcut) == len(layers) == 7
    assert sum(value == 0.075 for value in found.k_shortcut) == 4
    path = tmp_path / "agent.json"
    path.write_text(json.dumps(found.to_dict()))
    again = diffattn.methods.from_dict(json.loads(path.read_text()))
    assert again == found
    attachment = diffattn.set_attn_processor(pipe, again)
    assert torch.isfinite(PIPELINES["sd1.5"].run(pipe, steps=3)).all()
    assert attachment.sparse_calls > 0
    diffattn.set_attn_processor(pipe, None)


def test_agents_that_lose_everything_are_found_out() -> None:
    """The error of the method that is found is no larger than that of the defaults."""
    case = CASES["skyreels-v2"]
    model, inputs = case.build(), case.inputs()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    dense = forward()
    method = AgentAttn(cell=CELL, last_dense_steps=0)
    found = diffattn.calibrate_agent(model, forward, method)
    errors = []
    for one in (method, found):
        diffattn.set_attn_processor(model, one)
        errors.append((forward() - dense).square().mean().item())
    assert errors[1] < errors[0]


def test_runs_without_agents_are_refused() -> None:
    pipe = PIPELINES["ltx"].build()
    run = PIPELINES["ltx"].run
    with pytest.raises(ValueError, match="no attention call had agents: run made none, all its"):
        diffattn.calibrate_agent(pipe, lambda: None)
    with pytest.raises(ValueError, match="boxes and strides make half as many agents"):
        diffattn.calibrate_agent(pipe, lambda: run(pipe), AgentAttn(cell=(1, 1, 2)))
    with pytest.raises(ValueError, match="k_scale2 is empty: give at least one value"):
        diffattn.calibrate_agent(pipe, lambda: run(pipe), k_scale2=())
    assert diffattn.attach.attached_to(pipe.transformer) is None
