"""Parameters and methods that differ from step to step of a denoising run."""

import ast
import copy
import json
import pickle
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import tiny_wan
import torch
from golden_files import GOLDENS
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn
from diffattn import (
    AgentAttn,
    BlockTopKAttn,
    DenseAttn,
    GNAAttn,
    LVSAAttn,
    Method,
    PerStep,
    Policy,
    RadialAttn,
    SLAAttn,
    SolAttn,
    TokenGrid,
    VSAAttn,
    draw,
    early_ramp,
    hold,
    jenga,
    ramp,
)
from diffattn.lora.presence import _in_sparse_step
from diffattn.methods import from_dict
from diffattn.methods.by_step import forget_oldest
from diffattn.schedule import StepValue, spelled

ALL_SPARSE: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0}
GRID = TokenGrid(5, 6, 5)
TOP = BlockTopKAttn(keep=[1, 0.5, 0.5, 0.2], block=16, **ALL_SPARSE)
WINDOW = GNAAttn(window=PerStep((5, 5, 5), (3, 3, 3), (5, 5, 5), (1, 3, 3)), stride=1, **ALL_SPARSE)
RADIAL = RadialAttn(
    decay_factor=[1.0, 0.0, 1.0, 0.0], split_threshold=8, block_size=4, **ALL_SPARSE
)
ROTATING = LVSAAttn(window=1, first_frames=1, period=2, phase="rotate", **ALL_SPARSE)


@dataclass(frozen=True, kw_only=True)
class InTurns(Method):
    """Another class of method in each step."""

    type: ClassVar[str] = "in-turns"
    chosen: ClassVar[tuple[Method, ...]] = (
        DenseAttn(),
        GNAAttn(window=(3, 3, 3), stride=1, **ALL_SPARSE),
        BlockTopKAttn(keep=0.2, block=16, **ALL_SPARSE),
        SolAttn(tau=0.5, block=16, **ALL_SPARSE),
    )
    differs_by_step: ClassVar[bool] = True  # type: ignore[assignment]

    def at_step(self, step: int, steps: int) -> Method:
        return self.chosen[step if steps else -1]

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        return replace(self, **ALL_SPARSE)

    def attend(self, *_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("the method of a step attends")


METHODS = {
    "content": TOP, "mask": WINDOW, "radial": RADIAL, "rotating": ROTATING,
    "classes": InTurns(**ALL_SPARSE),
    "policy": Policy(rules=(
        {"layers": [0], "phases": [{"method": DenseAttn(), "until": 1}, {"method": WINDOW}]},
        {"phases": [{"method": TOP, "until": 3}, {"method": RADIAL}]},
    )),
}  # fmt: skip


def inputs(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(2, 16, 5, 12, 10, generator=generator),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": torch.randn(2, 5, tiny_wan.TEXT_DIM, generator=generator),
        "return_dict": False,
    }


def pipeline() -> Any:
    return tiny_wan.PIPELINES["t2v"]()


def walk(pipe: Any, call: Callable[[int], Any], steps: int = 4) -> list[Any]:
    """A run of `steps` steps; `call` is called with the number of each, as by a pipeline."""
    pipe.scheduler.set_timesteps(steps)
    out = []
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        out.append(call(step))
        sample = torch.zeros(1, 16, 1, 2, 2)
        pipe.scheduler.step(sample, timestep, sample)
    return out


def alone(method: Method, step: int, steps: int = 4) -> torch.Tensor:
    """The denoiser's output under the method of a step, attached to the denoiser alone."""
    model = tiny_wan.transformer()
    of_step = method.at_step(step, steps)
    if not of_step.is_dense:
        diffattn.set_attn_processor(model, of_step)
    with torch.no_grad():
        return model(**inputs(step))[0]


@pytest.mark.parametrize("name", METHODS)
def test_each_step_of_a_run_has_its_own_values(name: str) -> None:
    pipe = pipeline()
    pipe.set_attn_processor(METHODS[name])
    for _ in range(2):  # the second run begins anew
        with torch.no_grad():
            got = walk(pipe, lambda step: pipe.transformer(**inputs(step))[0])
        for step, out in enumerate(got):
            torch.testing.assert_close(out, alone(METHODS[name], step), rtol=1e-5, atol=1e-5)


def test_two_calls_of_a_step_see_one_step() -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(TOP)
    seen = walk(
        pipe,
        lambda step: [
            (pipe.transformer(**inputs(step)), attachment.models["transformer"].groups[0].method)[1]
            for _ in range(2)
        ],
    )
    assert [first is second for first, second in seen] == [True] * 4
    assert [first.keep for first, _ in seen] == [1, 0.5, 0.5, 0.2]


def test_a_share_of_1_is_a_dense_step() -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(TOP)
    walk(pipe, lambda step: pipe.transformer(**inputs(step)))
    assert attachment.dense_calls == tiny_wan.LAYERS
    assert attachment.sparse_calls == 3 * tiny_wan.LAYERS


def test_dense_steps_are_combined_with_the_list() -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(replace(TOP, dense_steps=2, last_dense_steps=1))
    walk(pipe, lambda step: pipe.transformer(**inputs(step)))
    assert attachment.sparse_calls == tiny_wan.LAYERS


def test_outside_of_a_run_the_last_value_holds() -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(TOP)
    assert attachment is not None
    attachment.leave_run()
    with torch.no_grad():
        out = pipe.transformer(**inputs(3))[0]
    torch.testing.assert_close(out, alone(TOP, 3), rtol=1e-5, atol=1e-5)


def test_a_list_for_another_number_of_steps_is_refused_before_any_attention() -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(replace(TOP, dense_steps=1))
    with pytest.raises(
        ValueError, match="keep has 4 values, one a step, but the run has 7 steps: give 7 values"
    ):
        walk(pipe, lambda step: pipe.transformer(**inputs(step)), steps=7)
    assert attachment.dense_calls == attachment.sparse_calls == 0


@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("name", METHODS)
def test_compiled_code_serves_all_steps(name: str, how: str) -> None:
    torch._dynamo.reset()
    pipe = pipeline()
    pipe.set_attn_processor(METHODS[name])
    counter = CompileCounterWithBackend("aot_eager")
    call: Any = pipe.transformer
    if how == "whole":
        call = torch.compile(call, fullgraph=True, backend=counter)
    else:
        call.compile_repeated_blocks(fullgraph=True, backend=counter)
    with torch.no_grad():
        got = walk(pipe, lambda step: call(**inputs(step))[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            again = walk(pipe, lambda step: call(**inputs(step))[0])
    dense_steps = any(METHODS[name].at_step(step, 4).is_dense for step in range(4))
    # Layers of a policy that attend by different rules are different code.
    rules = len(getattr(METHODS[name], "rules", (None,))) if how == "blocks" else 1
    assert counter.frame_count == (1 + dense_steps) * rules
    for step, out in enumerate(got):
        torch.testing.assert_close(out, alone(METHODS[name], step), rtol=1e-5, atol=1e-5)
        assert torch.equal(out, again[step])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["content", "mask", "classes"])
def test_gradients_are_those_of_the_step_of_their_forward(
    name: str, checkpointing: bool, compiled: bool
) -> None:
    torch._dynamo.reset()
    pipe = pipeline()
    pipe.set_attn_processor(METHODS[name])
    call: Any = pipe.transformer
    if checkpointing:
        call.enable_gradient_checkpointing()
        call.train()
    if compiled:
        call.compile_repeated_blocks(backend="aot_eager")
    # Step 1 is run, the clock moves on, and then the gradients are asked for.
    arguments = inputs(1)
    arguments["hidden_states"].requires_grad_()
    out = walk(pipe, lambda step: call(**arguments)[0] if step == 1 else None)[1]
    out.sum().backward()
    got = arguments["hidden_states"].grad

    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, METHODS[name].at_step(1, 4))
    arguments = inputs(1)
    arguments["hidden_states"].requires_grad_()
    model(**arguments)[0].sum().backward()
    torch.testing.assert_close(got, arguments["hidden_states"].grad, rtol=1e-4, atol=1e-4)


class TestSchedules:
    @pytest.mark.parametrize(
        ("key", "schedule"),
        [
            ("cube_49", PerStep(1, 1, 0.55, 0.45, 0.35, 0.35, 0.3, 0.25, 0.25, *[0.2] * 3,
                                *[0.15] * 3, *[0.1] * 4, *[0.05] * 30)),
            ("tau_ramp_1.3_1", ramp(1.3, 0.8)),
            ("tau_ramp_1.3_4", ramp(1.3, 0.8)),
            ("tau_ramp_1.3_20", ramp(1.3, 0.8)),
            ("tau_ramp_1.3_50", ramp(1.3, 0.8)),
            ("early_ramp_0.15_1", early_ramp(0.15)),
            ("early_ramp_0.15_4", early_ramp(0.15)),
            ("early_ramp_0.15_20", early_ramp(0.15)),
            ("early_ramp_0.3_8", early_ramp(0.3)),
            ("early_ramp_0.05_50", early_ramp(0.05)),
            ("early_ramp_0.6_10", early_ramp(0.6)),
        ],
    )  # fmt: skip
    def test_goldens(self, key: str, schedule: StepValue) -> None:
        want = np.load(GOLDENS / "block-topk" / "t00_schedules.npz")[key]
        got = [schedule.at(step, len(want)) for step in range(len(want))]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("key", "rates"), [("jenga_50", (0.7, 0.8)), ("jenga_7", (0.75, 0.85))]
    )
    def test_goldens_of_drop_rates(self, key: str, rates: tuple[float, float]) -> None:
        dropped = np.load(GOLDENS / "block-topk" / "t00_schedules.npz")[key]
        got = [jenga(*rates).at(step, len(dropped)) for step in range(len(dropped))]
        np.testing.assert_allclose(got, 1 - dropped, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("schedule", "want"),
        [
            (hold(0.15, 0.5, 2), [0.5, 0.5, 0.15, 0.15, 0.15]),
            (hold(0.1, 0.5, 0.4, shape="ramp"), [0.5, 0.3, 0.1, 0.1, 0.1]),
            (hold(0.1, 0.5, 1, last=0.3, last_steps=2), [0.5, 0.1, 0.1, 0.3, 0.3]),
            (hold(0.1, 0.5, 4, last=0.9, last_steps=2), [0.5, 0.5, 0.5, 0.9, 0.9]),
        ],
    )
    def test_other_values_at_the_ends(self, schedule: StepValue, want: list[float]) -> None:
        assert [schedule.at(step, 5) for step in range(5)] == pytest.approx(want)
        assert schedule.at(0, 0) == schedule.value  # type: ignore[attr-defined]

    @given(share=st.floats(0.01, 1), peak=st.floats(0.01, 1), steps=st.integers(1, 200))
    def test_an_early_ramp_never_rises(self, share: float, peak: float, steps: int) -> None:
        got = [early_ramp(share, peak).at(step, steps) for step in range(steps)]
        assert all(later <= earlier + 1e-12 for earlier, later in pairwise(got))
        assert got[0] == pytest.approx(max(share, peak))
        assert min(got) >= share - 1e-9
        extra = sum(got) / steps - share
        # One step at the peak is the least that there is.
        assert extra <= max(0.12, (max(share, peak) - share) / steps) + 1e-9

    @given(first=st.floats(-9, 9), last=st.floats(-9, 9), steps=st.integers(2, 200))
    def test_a_ramp_goes_evenly_from_end_to_end(
        self, first: float, last: float, steps: int
    ) -> None:
        got = [ramp(first, last).at(step, steps) for step in range(steps)]
        assert got[0] == pytest.approx(first)
        assert got[-1] == pytest.approx(last, abs=1e-12)
        assert np.allclose(np.diff(got), (last - first) / (steps - 1))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ramp(1.3, "x"), "ramp: last is 'x', but must be a finite number"),
            (lambda: ramp(float("inf"), 1), "ramp: first is inf, but must be a finite number"),
            (lambda: early_ramp(0), "early_ramp: share is 0, but must be a number above 0 and at"),
            (lambda: early_ramp(0.2, 2), "early_ramp: peak is 2, but must be a number above 0 and"),
            (lambda: hold(0.2, 0.5, -1), "hold: first_steps is -1, but a number of steps cannot"),
            (
                lambda: hold(0.2, 0.5, shape="jump"),
                "shape is 'jump', but must be one of hold, ramp",
            ),
            (lambda: hold(0.2, 0.5, last_steps=2), "last_steps is 2, but no value is given for"),
            (
                lambda: jenga(1, 0.5),
                "jenga: first is 1, but must be a number of at least 0 and bel",
            ),
            (lambda: PerStep(), "an empty list gives no step a value"),
        ],
    )
    def test_bad_schedules(self, make: Callable[[], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()


SCHEDULED = [
    *[method for method in METHODS.values() if method.by_step],
    SolAttn(tau=ramp(1.3, 0.8)),
    BlockTopKAttn(keep=early_ramp(0.15), neighbours=[0, 1, 2]),
    BlockTopKAttn(keep=hold(0.2, 0.5, 0.3, shape="ramp", last=0.3, last_steps=1)),
    BlockTopKAttn(keep=jenga(0.5, 0.75), score=["mean", "parts"]),
    SLAAttn(keep=[0.5, 0.2]),
]


class TestMethods:
    @pytest.mark.parametrize("method", SCHEDULED, ids=lambda method: method.type)
    def test_what_is_written_out_is_read_back(self, method: Method) -> None:
        assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
        assert pickle.loads(pickle.dumps(method)) == method
        assert copy.deepcopy(method) == method
        assert hash(copy.deepcopy(method)) == hash(method)
        assert "by_step" not in method.to_dict()

    def test_a_list_is_a_list_in_json(self) -> None:
        assert TOP.to_dict()["keep"] == [1, 0.5, 0.5, 0.2]
        assert SolAttn(tau=ramp(1.3, 0.8)).to_dict()["tau"] == {"ramp": [1.3, 0.8]}
        assert ROTATING.to_dict()["phase"] == "rotate"
        assert WINDOW.to_dict()["window"]["per_step"][3] == [1, 3, 3]

    def test_equal_values_give_the_same_method(self) -> None:
        assert TOP.at_step(1, 4) is TOP.at_step(2, 4)
        assert TOP.at_step(0, 0) is TOP.at_step(3, 4)
        plain = BlockTopKAttn(keep=0.2)
        assert plain.at_step(3, 50) is plain
        assert TOP.at_step(1, 4) == BlockTopKAttn(keep=0.5, block=16, **ALL_SPARSE)

    def test_the_method_itself_is_that_of_the_last_step(self) -> None:
        assert TOP.keep == 0.2
        assert torch.equal(WINDOW.mask(GRID).dense(), WINDOW.at_step(3, 4).mask(GRID).dense())

    def test_whole_numbers_stay_whole(self) -> None:
        method = LVSAAttn(window=ramp(4, 1))
        assert [method.at_step(n, 4).window for n in range(4)] == [4, 3, 2, 1]
        assert [SolAttn(tau=ramp(2, 1)).at_step(n, 3).tau for n in range(3)] == [2, 1.5, 1]

    def test_replace_ends_the_schedule_of_a_parameter_and_of_no_other(self) -> None:
        method = BlockTopKAttn(keep=[1, 0.5], parts=[2, 4])
        changed = replace(method, keep=0.3)
        assert [changed.at_step(n, 2).keep for n in range(2)] == [0.3, 0.3]
        assert [changed.at_step(n, 2).parts for n in range(2)] == [2, 4]
        assert replace(method, keep=[0.4, 0.3]).at_step(0, 2).keep == 0.4
        assert replace(method, order="tile").at_step(0, 2).keep == 1

    def test_what_does_not_depend_on_the_values_is_shared_by_all_steps(self) -> None:
        first, second = TOP.at_step(0, 4), TOP.at_step(3, 4)
        assert first._places is second._places
        orders = BlockTopKAttn(order=["tile", "morton"])
        assert orders.at_step(0, 2)._places is not orders.at_step(1, 2)._places

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: BlockTopKAttn(keep=[]), "keep: an empty list gives no step a value"),
            (
                lambda: BlockTopKAttn(keep=[0.5, 1.5, 0.2]),
                "in step 2 of a run of 3: keep is 1.5, but must be a number above 0 and at most 1",
            ),
            (
                lambda: BlockTopKAttn(keep=[0.5, {}]),
                "keep: .* is no list of values for the steps of a run",
            ),
            (lambda: BlockTopKAttn(keep=ramp(2, 0.5)), "in step 1 of a run of 1: keep is 2.0, but"),
            (
                lambda: BlockTopKAttn(keep=[0.5, 0.2], parts=[2, 4, 4]),
                "keep has 2 and parts has 3 values, one a step, but a run has one number of steps",
            ),
            (
                lambda: GNAAttn(window=PerStep((3, 3, 3), (1, 3, 3)), stride=(3, 1, 1)),
                "in step 2 of a run of 2: .*stride",
            ),
            (
                lambda: RadialAttn(dense_steps=[1, 2]),
                r"dense_steps is \[1, 2\], but says itself which steps it is about",
            ),
            (
                lambda: AgentAttn(ratio=[0.4, 0.2]),
                r"ratio is \[0.4, 0.2\], but cannot differ from step to step: it decides about",
            ),
            (
                lambda: VSAAttn(coarse=[True, False]),
                "coarse is .*, but cannot differ from step to step",
            ),
            (
                lambda: from_dict({"type": "sol", "tau": {"ramp": [1, 2, 3]}}),
                r"ramp does not take the 3 arguments \[1, 2, 3\]",
            ),
            (
                lambda: from_dict({"type": "sol", "tau": {"ramp": 1}}),
                "ramp is 1, but must be a list of its arguments",
            ),
        ],
    )
    def test_bad_values(self, make: Callable[[], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    def test_every_parameter_of_every_method_takes_a_list_or_says_why_not(self) -> None:
        for cls in diffattn.methods.METHODS.values():
            for name, value in cls().to_dict().items():
                if name == "type" or isinstance(value, dict):
                    continue  # an object of JSON, as a policy's record, is no value of a step
                by_step = {name: PerStep(value, value)}
                if name in cls.same_in_every_step or name.endswith("dense_steps"):
                    with pytest.raises(ValueError, match=f"{name} is PerStep.*, but "):
                        cls(**by_step)
                else:
                    assert cls(**by_step).at_step(0, 2) == cls()

    def test_kept_layouts_are_bounded_and_a_cycle_stays(self, monkeypatch: Any) -> None:
        methods = [GNAAttn(window=(n, 3, 3), stride=1) for n in (1, 3, 5)]
        for method in methods:
            method.layout(GRID, torch.device("cpu"))
        sizes = [method.kept_bytes for method in methods]
        assert all(sizes)
        kept: dict[Any, Method] = dict(enumerate(methods))
        forget_oldest(kept)
        assert len(kept) == 3
        monkeypatch.setattr("diffattn.methods.by_step._MOST_BYTES", sum(sizes) - 1)
        forget_oldest(kept)
        assert list(kept) == [1, 2]
        monkeypatch.setattr("diffattn.methods.by_step._MOST_BYTES", 0)
        forget_oldest(kept)
        assert list(kept) == [2]


class TestRotation:
    def test_a_run_has_as_many_masks_as_the_period(self) -> None:
        pipe = pipeline()
        attachment = pipe.set_attn_processor(ROTATING)
        group = attachment.models["transformer"].groups[0]
        seen = walk(pipe, lambda step: (pipe.transformer(**inputs(step)), group.method)[1], steps=5)
        assert [method.phase for method in seen] == [0, 1, 0, 1, 0]
        assert seen[0] is seen[2] is seen[4]
        assert seen[1] is seen[3]
        again = walk(
            pipe, lambda step: (pipe.transformer(**inputs(step)), group.method)[1], steps=5
        )
        assert again[0] is seen[0], "the next run begins at phase 0 with the same masks"

    @pytest.mark.parametrize("name", ["l02_wan_41_auto", "l08_wrap_uneven", "l04_fixed_period4"])
    def test_the_masks_of_the_public_code(self, name: str) -> None:
        data = np.load(GOLDENS / "lvsa" / f"{name}.npz")
        meta = ast.literal_eval(str(data["meta"]))
        method = LVSAAttn(
            window=meta["window"], first_frames=meta["first"], period=meta["period"],
            expand=meta["expand"], phase="rotate",
        )  # fmt: skip
        grid = TokenGrid(meta["frames"], 1, meta["tokens_per_frame"])
        for step, want in zip(data["steps"].tolist(), data["frame_masks"], strict=True):
            of_step = method.at_step(step, 1000).for_model("", grid)
            assert torch.equal(of_step.relation(meta["frames"]), torch.from_numpy(want).bool())


class TestPlans:
    def test_the_density_is_the_mean_over_the_steps(self) -> None:
        plan = diffattn.plan(GRID, WINDOW, steps=4)
        each = [diffattn.plan(GRID, WINDOW.at_step(step, 4)) for step in range(4)]
        assert plan.density == pytest.approx(sum(one.density for one in each) / 4)
        assert plan.run_density == pytest.approx(sum(one.run_density for one in each) / 4)
        assert plan.dense_steps == 0

    def test_dense_steps_count_whole(self) -> None:
        plan = diffattn.plan(GRID, TOP, steps=4)
        assert plan.dense_steps == 1
        assert plan.densities[0] == 1
        assert plan.densities[1] == plan.densities[2] > plan.densities[3]
        assert plan.density == pytest.approx(sum(plan.densities) / 4)
        assert "by step" in str(plan)
        assert "dense, " in plan.words()
        assert json.loads(json.dumps(plan.to_dict()))["method"]["keep"] == [1, 0.5, 0.5, 0.2]
        half = diffattn.plan(GRID, replace(TOP, dense_steps=0.5), steps=4)
        assert half.dense_steps == 2

    def test_a_plan_of_a_class_that_changes(self) -> None:
        plan = diffattn.plan(GRID, METHODS["classes"], steps=4)
        assert plan.densities[0] == 1
        assert plan.density < 1

    def test_a_plan_needs_the_number_of_steps(self) -> None:
        with pytest.raises(ValueError, match="give the number of steps of a run, steps="):
            diffattn.plan(GRID, TOP)
        with pytest.raises(ValueError, match="keep has 4 values, one a step, but the run has 5"):
            diffattn.plan(GRID, TOP, steps=5)

    def test_a_description_tells_of_the_steps(self) -> None:
        attachment = pipeline().set_attn_processor(WINDOW)
        said = attachment.describe(GRID, 4)
        assert said.density == pytest.approx(diffattn.plan(GRID, WINDOW, steps=4).density)
        assert said.by_step == "window=5,5,5/3,3,3/5,5,5/1,3,3"
        assert said.method == WINDOW
        said = pipeline().set_attn_processor(TOP).describe(GRID, 4)
        assert "by step: keep=1,0.5x2,0.2" in str(said)
        assert "the first 0 and the last 0, and 1 more of 4 steps stay dense" in str(said)
        with pytest.raises(ValueError, match="window has 4 values, one a step, but the run has 9"):
            attachment.describe(GRID, 9)

    def test_the_picture_of_the_schedule_shows_the_steps_that_are_dense(self) -> None:
        image = draw.schedule_image(TOP, 3, 0, 4)
        assert (image[:, 0] == draw.ALL).all()
        assert (image[:, 1:] == draw.SOME).all()


def test_without_a_pipeline_there_are_no_steps() -> None:
    with pytest.warns(UserWarning, match="every call is as in the last step"):
        diffattn.set_attn_processor(tiny_wan.transformer(), TOP)


@pytest.mark.parametrize("method", SCHEDULED, ids=lambda method: method.type)
def test_schedules_are_spelled_as_they_are_read(method: Method) -> None:
    from diffattn.pipelines.run.method_settings import read_arguments

    for name, schedule in method.by_step:
        if spelled(schedule) != "rotate":
            [(_, value)] = read_arguments([f"{name}={spelled(schedule)}"]).items()
            assert replace(method, by_step=(), **{name: value}).by_step in (
                ((name, schedule),),
                tuple(item for item in method.by_step if item[0] == name),
            )


@pytest.mark.parametrize("kind", ["t2v", "two experts"])
def test_a_pipeline_counts_over_the_whole_run(kind: str) -> None:
    pipe = tiny_wan.PIPELINES[kind]()
    attachment = pipe.set_attn_processor(TOP)
    seen: list[tuple[int, Any]] = []
    for model in attachment.models.values():
        model._model.register_forward_hook(
            lambda *_, group=model.groups[0]: seen.append((attachment.clock.step, group.method))
        )
    tiny_wan.run(pipe, steps=4)
    assert {step for step, _ in seen} == {0, 1, 2, 3}
    assert all(method.keep == [1, 0.5, 0.5, 0.2][step] for step, method in seen)
    assert len(seen) == 8, "guidance makes two calls a step"


@pytest.mark.parametrize("value", [0.5, [1, 0.5]])
def test_a_lora_is_off_where_the_share_makes_a_step_dense(value: Any) -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(BlockTopKAttn(keep=value, block=16, **ALL_SPARSE))
    group = attachment.models["transformer"].groups[0]
    on = walk(pipe, lambda step: _in_sparse_step(group, attachment.models["transformer"]), steps=2)
    assert on == [value == 0.5, True]


def test_the_code_of_the_document_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "steps.md").read_text("utf-8")
    snippets = [textwrap.dedent(code) for code in re.findall(r" *```python\n(.*?)```", text, re.S)]
    assert len(snippets) == 3
    names: dict[str, Any] = {"pipe": pipeline()}
    for snippet in snippets:
        exec(snippet, names)
    assert names["method"].at_step(1, 2).window == (5, 9, 9)
    run = [early_ramp(0.15).at(step, 4) for step in range(4)]
    assert run == pytest.approx([0.5, 0.28, 0.15, 0.15])
