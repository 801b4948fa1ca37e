"""The parameters that set a method's share of the token pairs, against measured shares."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch

import diffattn
from diffattn import Method, Policy, TokenGrid, plan, ramp
from diffattn.counting import counted_pairs
from diffattn.methods import METHODS, from_dict
from diffattn.methods.by_head import work_of
from diffattn.pipelines.calibrate.candidates import Candidate, Maker, check_method, settings_of
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.knobs import KNOBS, check_knob, knob_of
from diffattn.planning.published import ModelShape

NOW: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0}
# Blocks that the grids here hold many of.
SMALL: dict[str, dict[str, Any]] = {
    "radial": {"block_size": 16},
    "sol": {"block": 16},
    "block-topk": {"block": 16},
    "svg2": {"block": 16, "query_cluster": 16, "key_cluster": 8},
    "sla": {"block_q": 16, "block_kv": 16},
    "sla2": {"block_q": 16, "block_kv": 16},
}
OTHER: dict[str, dict[str, Any]] = {
    "vmoba by threshold": {"type": "vmoba", "preset": "training"},
    "gna with strides": {"type": "gna", "stride": [1, 4, 4], "dilation": [2, 1, 1]},
    "gna that is causal": {"type": "gna", "is_causal": [True, False, False]},
    "clear in cylinders": {"type": "clear", "window": "cylinder"},
    "radial with its sink": {"type": "radial", "sink": True, "split_threshold": 24},
    "vmoba of one kind": {"type": "vmoba", "partitions": ["3d"]},
    "block-topk with a rule": {"type": "block-topk", "keep": {"rule": "mass", "share": 0.9}},
}
CASES = {name: {"type": name, **SMALL.get(name, {})} for name in KNOBS} | OTHER
# Measured over one forward, equal to the plan's, for the methods that do not ask the content.
EXACT = [name for name in CASES if not knob_of(from_dict(CASES[name])).by_content]  # type: ignore[union-attr]
GRID, LARGE = TokenGrid(8, 8, 8), TokenGrid(16, 12, 12)
SHAPE = ModelShape(
    name="tiny", variant="wan2.1", heads=2, head_dim=24, block_of_site=(0, 1, 2), sizes=None
)
CANDIDATES = [name for name in EXACT if not from_dict(CASES[name]).changes_the_model]


def method_of(name: str, **changes: Any) -> Method:
    return from_dict(CASES[name] | NOW | changes)


def planned(method: Method, grid: TokenGrid) -> float:
    """The share of the pairs, a mean over three layers."""
    settled = method.for_model("wan2.1", grid)
    works = [work_of(settled, grid, layer, 2, 16) for layer in range(3)]
    return sum(work.density for work in works) / len(works)  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(16, 12, 12),
        TokenGrid(5, 7, 9, text_after=3),
        TokenGrid(2, 2, 3),
        TokenGrid(9, 1, 1),
    ],
    ids=str,
)
def test_the_share_grows_with_the_place_up_to_dense_attention(name: str, grid: TokenGrid) -> None:
    method = method_of(name)
    knob = knob_of(method)
    assert knob is not None
    shares = []
    for place in range(17):
        turned = knob.turn(method, place / 16, grid)
        before, after = method.to_dict(), turned.to_dict()
        assert {key for key in after if after[key] != before[key]} <= {*knob.names}
        assert from_dict(json.loads(json.dumps(after))) == turned
        shares.append(planned(turned, grid))
    # Radial leaves out distances that divide by 2, 3, 4, ..., which are not parts of each other.
    slack = 0.03 if method.type == "radial" else 0
    assert all(a <= b + slack + 1e-9 for a, b in pairwise(shares)), shares
    assert shares[0] > 0
    causal = name == "gna that is causal" and grid.frames > 1
    dilated = name == "gna with strides" and grid.frames > 1
    # A causal frame sees no later one, and a dilated window holds half of an axis.
    assert shares[-1] > (0.4 if causal or dilated else 0.95)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("place", [0.125, 0.5, 0.8])
def test_a_model_computes_the_planned_share(name: str, place: float) -> None:
    method = method_of(name)
    knob = knob_of(method)
    assert knob is not None
    turned = knob.turn(method, place, GRID)
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, turned)
    with counted_pairs() as pairs, torch.no_grad():
        model(
            torch.randn(1, 16, 8, 16, 16),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 5, tiny_wan.TEXT_DIM),
        )
    assert pairs.sparse_calls == tiny_wan.LAYERS
    assert pairs.density == pytest.approx(planned(turned, GRID), rel=1e-4)
    assert plan(SHAPE, turned, grid=GRID, steps=4).density == pytest.approx(pairs.density, rel=0.05)


def test_every_method_that_chooses_pairs_has_a_knob() -> None:
    own = {name for name, cls in METHODS.items() if cls.__module__.startswith("diffattn.")}
    made_of_others = {"auto", "by-head", "policy", "dense"}
    assert own - made_of_others - {*KNOBS} == {"agent", "linfusion"}
    for name in (*KNOBS, "agent", "linfusion"):
        assert (knob_of(from_dict({"type": name})) is None) == (name in ("agent", "linfusion"))


def test_the_documents_name_what_sets_the_share_of_each_method() -> None:
    lines = (Path(__file__).parents[2] / "docs/compare.md").read_text("utf-8").splitlines()
    for name, knob in KNOBS.items():
        (row,) = (line for line in lines if line.startswith("  | ") and f"`{name}`" in line)
        assert f"`{knob.names[0]}`" in row


def test_given_parameters_stay_where_the_share_is_set_by_others() -> None:
    knob = knob_of(from_dict(OTHER["radial with its sink"]))
    assert knob is not None
    turned = knob.turn(from_dict(OTHER["radial with its sink"]), 0.1, GRID).to_dict()
    assert (turned["sink"], turned["first_distance_width"]) == (True, "half")
    first = from_dict({"type": "clear", "first_frame": True})
    assert KNOBS["clear"].turn(first, 0.1, GRID).to_dict()["first_frame"] is True
    # Strides are never longer than the window.
    strides = from_dict({"type": "gna", "stride": 4})
    assert KNOBS["gna"].turn(strides, 0.05, GRID).to_dict()["stride"] == (3, 4, 4)
    window = from_dict({"type": "freeswim", "native": [4, 5]})
    turned = KNOBS["freeswim"].turn(window, 0.3, GRID).to_dict()
    # The temperature depends on the native size.
    assert (turned["native"], turned["radius"]) == ((4, 5), (2, 2))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"type": "agent"},
            "--x: no parameter of agent sets its share of the token pairs; do else",
        ),
        (
            {"type": "radial", "rule": "paper"},
            "--x: no parameter of radial with these parameters sets its share of the token pairs;"
            " do else",
        ),
        (
            {"type": "block-topk", "keep": [1, 0.5]},
            "--x: keep of block-topk differs from step to step, but sets the share of the token"
            " pairs: give one value",
        ),
    ],
)
def test_methods_without_a_knob(method: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_knob(from_dict(method), "--x", "do else")
    assert str(error.value) == message


def test_other_parameters_may_differ_from_step_to_step() -> None:
    method = from_dict({"type": "lvsa", "phase": "rotate"})
    assert check_knob(method, "--density", "").names == ("window", "first_frames", "period")


class TestCalibrate:
    @pytest.mark.parametrize("name", CANDIDATES)
    @pytest.mark.parametrize("wanted", [0.5, 0.6])
    def test_candidates_of_every_method_do_the_wanted_work(self, name: str, wanted: float) -> None:
        maker = Maker(SHAPE, LARGE, 8, wanted)
        method = from_dict(CASES[name])
        check_method(method)
        found = [
            made
            for warm_up in (0.0, 0.25)
            if (made := maker.policy(Candidate(settings_of(method), warm_up))) is not None
        ]
        assert found
        for policy, work in found:
            assert 0.9 * wanted <= work <= 1.005 * wanted
            by_plan = plan(SHAPE, policy, grid=LARGE, steps=8).run_density
            assert by_plan == pytest.approx(work, rel=1e-6)

    def test_shares_of_layers_and_phases_are_those_that_are_wanted(self) -> None:
        maker = Maker(SHAPE, LARGE, 8, 0.4)
        method = from_dict({"type": "radial", "block_size": 16})
        candidate = Candidate(settings_of(method), 0.0, layers=(1.3, 1.0, 0.7))
        made = maker.policy(candidate)
        assert made is not None
        shares = [planned(maker.in_run(made[0])[layer][0], LARGE) for layer in range(3)]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] / shares[2] == pytest.approx(1.3 / 0.7, rel=0.15)

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (
                {"type": "linfusion"},
                "--attn linfusion: no parameter of linfusion sets its share of the token pairs;"
                " calibrate can take radial, gna, clear, freeswim, vmoba, block-topk,"
                " attention-tile, lvsa, vsa",
            ),
            (
                {"type": "svg2"},
                "--attn svg2: the share of the token pairs that it computes depends on what the"
                " tokens hold, but calibrate compares methods at equal work, which it must know"
                " before a run; `diffattn compare --density` measures the share",
            ),
            (
                {"type": "vmoba", "select": "threshold"},
                "--attn vmoba: the share of the token pairs that it computes depends on what the",
            ),
            (
                {"type": "lvsa", "phase": "rotate"},
                "--attn lvsa: a parameter differs from step to step, but calibrate sets the steps"
                " itself: give one value",
            ),
            (
                {"type": "sla"},
                "--attn sla: it has weights of its own or changes the model, and cannot be in a"
                " policy",
            ),
            ({"type": "vsa", "coarse": True}, "--attn vsa: it has weights of its own or changes"),
            ({"type": "clear", "down_factor": 8}, "--attn clear: it has weights of its own or"),
        ],
    )
    def test_methods_that_calibrate_refuses(self, method: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            check_method(from_dict(method))
        assert str(error.value).startswith(message)


def test_ramps_are_no_part_of_what_calibrate_takes() -> None:
    with pytest.raises(UserError, match="keep of block-topk differs from step to step"):
        check_method(from_dict({"type": "block-topk", "keep": ramp(1, 0.5)}))


def test_plain_methods_of_models_that_need_weights_can_be_in_a_policy() -> None:
    policy = Policy(rules=({"layers": [0], "method": {"type": "vsa"}}, {"method": "clear"}))
    assert policy.words() == "layer 0: vsa; other layers: clear"
