"""Policies: methods by layer, by range of steps and by head, with what they were found on."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch

import diffattn
from diffattn import (
    AgentAttn,
    BlockTopKAttn,
    ByHeadAttn,
    DenseAttn,
    GNAAttn,
    Method,
    Policy,
    RadialAttn,
    TokenGrid,
    load_policy,
    ramp,
    save_policy,
)
from diffattn.methods.policy import Phase, Recorded, Rule

NOW: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0}
WINDOW = GNAAttn(window=(3, 3, 3), stride=1, **NOW)
TOP = BlockTopKAttn(keep=ramp(1.0, 0.2), block=16, **NOW)
HEADS = ByHeadAttn(parts=((WINDOW, 1), (DenseAttn(), 1)), **NOW)
GRID = TokenGrid(5, 6, 5)
POLICY = Policy(
    rules=(
        Rule((Phase(DenseAttn(), 0.5), Phase(WINDOW)), (0,)),
        Rule((Phase(HEADS, 1), Phase(TOP))),
    )
)


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def inputs(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(1, 16, 5, 12, 10, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, tiny_wan.TEXT_DIM, generator=generator),
        "return_dict": False,
    }


def walk(pipe: Any, call: Callable[[int], Any], steps: int) -> list[Any]:
    """A run of `steps` steps; `call` is called with the number of each, as by a pipeline."""
    pipe.scheduler.set_timesteps(steps)
    out = []
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        out.append(call(step))
        sample = torch.zeros(1, 16, 1, 2, 2)
        pipe.scheduler.step(sample, timestep, sample)
    return out


def outputs(processor: Any, steps: int = 4) -> list[torch.Tensor]:
    """The denoiser's output in each step of a run."""
    pipe = tiny_wan.PIPELINES["t2v"]()
    diffattn.set_attn_processor(pipe, processor)
    with torch.no_grad():
        return walk(pipe, lambda step: pipe.transformer(**inputs(step))[0], steps)


def by_dict(step: int, methods: dict[str, Method]) -> torch.Tensor:
    """The denoiser's output of a step with methods by site, without steps and policies."""
    model = tiny_wan.transformer()
    given = {name: None if method.is_dense else method for name, method in methods.items()}
    if any(given.values()):
        diffattn.set_attn_processor(model, given)
    with torch.no_grad():
        return model(**inputs(step))[0]


def test_layers_and_steps_attend_by_their_methods() -> None:
    first = (DenseAttn(), DenseAttn(), WINDOW, WINDOW)
    others = (HEADS, TOP.at_step(1, 4), TOP.at_step(2, 4), TOP.at_step(3, 4))
    for step, out in enumerate(outputs(POLICY)):
        expected = by_dict(step, {"blocks.0": first[step], "blocks.*": others[step]})
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_fractions_and_ramps_fit_runs_of_any_length(steps: int) -> None:
    first = [DenseAttn() if step < steps // 2 else WINDOW for step in range(steps)]
    for step, out in enumerate(outputs(POLICY, steps)):
        other = HEADS if step < 1 else TOP.at_step(step, steps)
        expected = by_dict(step, {"blocks.0": first[step], "blocks.*": other})
        torch.testing.assert_close(out, expected)


def test_layers_without_a_rule_are_those_of_the_untouched_model() -> None:
    some = Policy(rules=({"layers": [1], "method": WINDOW},))
    expected = by_dict(0, {"blocks.1": WINDOW})
    torch.testing.assert_close(outputs(some, 1)[0], expected)
    assert torch.equal(outputs(Policy(), 1)[0], by_dict(0, {}))


def test_a_list_of_another_length_than_the_run_is_refused() -> None:
    listed = BlockTopKAttn(keep=[1, 0.5, 0.2], block=16, **NOW)
    with pytest.raises(ValueError, match=r"^keep has 3 values, one a step, but the run has 4 step"):
        outputs(Policy(rules=({"method": listed},)))


def test_files_give_back_the_policy(tmp_path: Path) -> None:
    recorded = Recorded(
        model="a/model", denoiser="WanTransformer3DModel", layers=3, grid=(5, 6, 5), steps=4,
        found={"seed": 3, "scores": [{"psnr": 21.5}]},
    )  # fmt: skip
    policy = replace(POLICY, recorded=recorded)
    path = tmp_path / "policy.json"
    path.write_text("an older one")
    save_policy(policy, path)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.json"]
    read = load_policy(path)
    assert read == policy
    assert hash(read) == hash(policy)
    assert read.recorded == recorded
    assert diffattn.methods.from_dict(json.loads(path.read_text())) == policy
    for twin in (copy.deepcopy(read), pickle.loads(pickle.dumps(read))):
        assert twin == policy
        assert twin.recorded == recorded


def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.json"
    path.write_text("an older one")

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"^no space left$"):
        save_policy(POLICY, path)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.json"]
    assert path.read_text() == "an older one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"policy\.json is not JSON: "),
        ("[1]", r'holds something else, not a policy, which is an object with "type": "policy"$'),
        ('{"type": "radial"}', r"holds the method 'radial', not a policy"),
        (
            '{"type": "policy", "format": 2, "layers": []}',
            r": format is 2, but must be 1, the format of rules that this version of diffattn reads"
            r": update diffattn$",
        ),
        ('{"type": "policy", "rule": []}', r": policy has no parameter 'rule'; did you mean 'rul"),
        (
            '{"type": "policy", "rules": [{"layer": [0], "method": "gna"}]}',
            r": a rule has an unknown key 'layer'; did you mean 'layers'",
        ),
        (
            '{"type": "policy", "rules": [{"method": {"type": "gna", "windows": 3}}]}',
            r": gna has no parameter 'windows'; did you mean 'window'",
        ),
        ('{"type": "policy", "recorded": {"step": 3}}', r": recorded has an unknown key 'step'"),
        (
            '{"type": "policy", "recorded": {"grid": [3]}}',
            r": recorded: grid is \[3\], but must be the frames, rows and columns of tokens",
        ),
    ],
)
def test_files_that_hold_no_policy_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_policy(path)
    with pytest.raises(ValueError, match=r"^cannot read the policy .*none\.json: No such file"):
        load_policy(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (3, r"^rules is 3, but must be a list of rules$"),
        ((WINDOW,), r"^a rule is GNAAttn\(.*\), but must be an object with layers, method, phases"),
        (({},), r'^a rule has either "method" or "phases": give one$'),
        (({"phases": []},), r"^the phases of a rule are \[\], but must be a list of phases$"),
        (({"method": 3},), r"^the method of a phase is 3, but must be a method of diffattn$"),
        (({"method": POLICY},), r"^the method of a phase is a policy, but policies hold no poli"),
        (
            ({"method": AgentAttn()},),
            r"^agent cannot be in a policy: it has weights of its own or changes the model\. Att",
        ),
        (({"layers": [-1], "method": "gna"},), r"^a layer of a rule is -1, but must be the index"),
        (({"layers": [], "method": "gna"},), r"^the layers of a rule are \[\], but must be a lis"),
        (
            ({"method": "gna"}, {"layers": [1], "method": "gna"}),
            r"^rule 1 holds for all layers, and the rules after it for none: put it last$",
        ),
        (
            ({"layers": [1, 2], "method": "gna"}, {"layers": [2], "method": "gna"}),
            r"^rule 2 decides about no layer: earlier rules name 2$",
        ),
        (
            ({"phases": [{"method": "gna"}, {"method": "gna"}]},),
            r"^every phase but the last needs an end: give it until$",
        ),
        (
            ({"phases": [{"method": "gna", "until": 0.5}]},),
            r"^the last phase has until=0\.5, but holds until the end of the run: leave it out",
        ),
        (
            (
                {
                    "phases": [{"method": "gna", "until": u} for u in (0.5, 0.5)]
                    + [{"method": "gna"}]
                },
            ),
            r"^a phase has until=0\.5, but the phase before it until=0\.5: give them in the order",
        ),
        (
            ({"phases": [{"method": "gna", "until": 1.5}, {"method": "gna"}]},),
            r"^until is 1\.5, but a fraction of the run is between 0\.0 and 1\.0",
        ),
    ],
)
def test_rules_that_cannot_hold_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(rules=rules)


def test_a_policy_is_no_part_of_the_heads() -> None:
    with pytest.raises(ValueError, match=r"^policy with these parameters looks at all heads"):
        ByHeadAttn(parts=((POLICY, 1),))


def test_layers_that_the_model_lacks_are_refused() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    layers = pipe.transformer.config.num_layers
    beyond = Policy(rules=({"layers": [0, layers], "method": WINDOW},))
    message = f"^the policy has a rule for layer {layers}, but the model has {layers} layers, 0 to "
    with pytest.raises(ValueError, match=message):
        diffattn.set_attn_processor(pipe, beyond)
    with pytest.raises(ValueError, match=message):
        diffattn.plan(GRID, beyond, layers=layers, steps=4)


RECORD = {
    "denoiser": "WanTransformer3DModel", "grid": [5, 6, 5], "steps": 4,
    "diffattn": diffattn.__version__, "torch": torch.__version__,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"denoiser": "FluxTransformer"}, "denoiser WanTransformer3DModel, not FluxTransformer"),
        ({"grid": [5, 6, 6]}, "grid 5x6x5, not 5x6x6"),
        (
            {"steps": 5, "diffattn": "0.0.1"},
            f"steps 4, not 5; diffattn {diffattn.__version__}, not",
        ),
        ({"torch": "1.0.3"}, ", not 1.0"),
    ],
)
def test_a_run_unlike_the_record_warns_once_in_one_line(changed: Any, said: str | None) -> None:
    policy = Policy(rules=({"method": WINDOW},), recorded=RECORD | changed)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        outputs(policy)
    lines = [str(warning.message) for warning in found]
    if said is None:
        assert lines == []
        return
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert lines[0].startswith(
        "the policy was found for another run and may lose quality here: this run has "
    )
    assert said in lines[0]


def test_plans_count_every_layer_and_step() -> None:
    layers, steps = 3, 4
    found = diffattn.plan(GRID, POLICY, layers=layers, heads=2, head_dim=16, steps=steps)
    assert isinstance(found, diffattn.PlanBySteps)

    def share(method: Method) -> float:
        if method.is_dense:
            return 1.0
        cost = diffattn.plan(GRID, method, heads=2, head_dim=16)
        return cost.sparse_flops / cost.dense_flops

    first = [1.0, 1.0, share(WINDOW), share(WINDOW)]
    others = [share(HEADS), *(share(TOP.at_step(step, steps)) for step in (1, 2, 3))]
    expected = (sum(first) + 2 * sum(others)) / (layers * steps)
    assert found.run_density == pytest.approx(expected)


def test_dense_ends_of_the_policy_hold_for_all_layers() -> None:
    rules = (*POLICY.rules[:1], Rule((Phase(TOP),)))
    policy = replace(POLICY, rules=rules, dense_layers=1, dense_steps=3)
    found = diffattn.plan(GRID, policy, layers=3, heads=2, head_dim=16, steps=4)
    assert isinstance(found, diffattn.PlanBySteps)
    assert found.dense_steps == 3
    for step, out in enumerate(outputs(policy)):
        top = DenseAttn() if step < 3 else TOP.at_step(step, 4)
        torch.testing.assert_close(out, by_dict(step, {"blocks.0": DenseAttn(), "blocks.*": top}))


def test_descriptions_name_layers_and_methods() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = diffattn.set_attn_processor(pipe, POLICY)
    assert attachment is not None
    description = attachment.describe(GRID, 4)
    assert description.method == POLICY
    assert description.by_step == (
        "layers 0: dense until 0.5, then gna; other layers: by-head until 1, then block-topk"
    ).replace("layers 0", "layer 0")
    assert "policy on" in repr(attachment)
    assert f"policy  {description.by_step}" in str(attachment)
    table = str(diffattn.plan(GRID, POLICY, layers=3, heads=2, head_dim=16, steps=4))
    assert description.by_step in " ".join(table.split())
    radial = Policy(rules=({"method": RadialAttn(dense_steps=0.5, dense_layers=0)},))
    attachment = diffattn.set_attn_processor(pipe, radial)
    assert attachment is not None
    assert attachment.describe(GRID, 4).dense_by_value == 2
