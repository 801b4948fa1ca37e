"""AutoAttn: the choice, the reason that is said, and attention as by the chosen method."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny_wan
import torch

import diffattn
from diffattn import AutoAttn, BlockTopKAttn, DenseAttn, SolAttn, TokenGrid, early_ramp
from diffattn.lora.settings import TrainSettings
from diffattn.methods import from_dict
from diffattn.methods.auto import method as auto_method
from diffattn.methods.auto import table
from diffattn.methods.auto.table import Recommendation, recommendations
from diffattn.planning import plans

GRID = TokenGrid(3, 8, 8)


def line(speed: str, few: bool, tokens: int, method: Any) -> Recommendation:
    return Recommendation(speed, few, tokens, method.to_dict(), 0.4, 21.5)


SOL = SolAttn(tau=0.3, dense_steps=0, dense_layers=0, block=16)
RAMP = BlockTopKAttn(keep=early_ramp(0.2, 0.9), dense_steps=0, dense_layers=0, block=16)
FEW = BlockTopKAttn(keep=0.4, dense_steps=1, dense_layers=0, block=16)
LARGE = BlockTopKAttn(keep=0.1, dense_steps=0.1)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        line("balanced", False, 0, RAMP),
        line("balanced", False, 8192, LARGE),
        line("balanced", True, 0, FEW),
        line("fast", False, 0, SOL),
        line("fast", True, 0, SOL),
        line("faithful", False, 0, DenseAttn()),
        line("faithful", True, 0, DenseAttn()),
    )
    monkeypatch.setattr(table, "recommendations", lambda: rows)
    monkeypatch.setattr(auto_method, "recommendations", lambda: rows)


def test_every_case_of_the_shipped_table_has_a_method() -> None:
    for speed in ("fast", "balanced", "faithful"):
        for few in (False, True):
            cases = [row for row in recommendations() if (row.speed, row.few_steps) == (speed, few)]
            assert min(row.tokens for row in cases) == 0
            for row in cases:
                assert not from_dict(row.method).needs_figures
                assert 0 < row.work < 1
                assert row.psnr_db > 10


def test_faster_lines_do_less_work_and_come_less_near() -> None:
    for few in (False, True):
        work = {row.speed: row.work for row in recommendations() if row.few_steps == few}
        near = {row.speed: row.psnr_db for row in recommendations() if row.few_steps == few}
        assert work["fast"] < work["balanced"] < work["faithful"]
        assert near["fast"] < near["balanced"] < near["faithful"]


@pytest.mark.usefixtures("lines")
class TestChoice:
    def test_by_steps_and_tokens(self) -> None:
        wan = plans.model_shape("Wan-AI/Wan2.1-T2V-14B-Diffusers")
        auto = AutoAttn().on_model(wan)
        large = TokenGrid(21, 45, 80)
        assert auto.for_run("wan2.1", large, 50) == LARGE
        assert auto.for_run("wan2.1", large, 8) == FEW
        assert auto.for_run("wan2.1", large, 9) == LARGE
        assert auto.for_run("wan2.1", TokenGrid(5, 40, 40), 50) == RAMP
        assert AutoAttn(speed="fast").for_run("wan2.1", GRID, 50) == SOL

    def test_dense_where_sparsity_cannot_pay(self, caplog: pytest.LogCaptureFixture) -> None:
        wan = plans.model_shape("Wan-AI/Wan2.1-T2V-14B-Diffusers")
        auto = AutoAttn(speed="fast").on_model(wan)
        small = TokenGrid(3, 30, 52)
        # 4 x T^2 x d against 12 d^2 + 4 d x 13824 + text for each token: 12 to 20 %.
        share = auto.attention_share(small)
        planned = diffattn.plan("Wan-AI/Wan2.1-T2V-14B-Diffusers", SOL, grid=small)
        assert share == planned.attention_share
        assert share < 0.2
        assert auto.for_run("wan2.1", small, 50) == DenseAttn()
        moment = auto.at_step(0, 50)
        assert moment.for_model("wan2.1", small).is_dense
        assert caplog.messages == [
            f"auto stays dense: at 4,680 tokens attention is {share:.0%} of the time:"
            f" at most {1 / (1 - share):.1f}x"
        ]

    def test_parameters_of_the_user_win(self) -> None:
        auto = AutoAttn(dense_steps=3, dense_layers=2, last_dense_steps=1, references="exact")
        chosen = auto.for_run("wan2.1", GRID, 50)
        assert isinstance(chosen, BlockTopKAttn)
        assert (chosen.dense_steps, chosen.dense_layers, chosen.last_dense_steps) == (3, 2, 1)
        assert chosen.references == "exact"
        assert chosen.by_step == RAMP.by_step

    def test_a_plan_is_that_of_the_chosen_method(self) -> None:
        model = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
        of_auto = diffattn.plan(model, "auto", height=720, width=1280, num_frames=81)
        of_chosen = diffattn.plan(model, LARGE, height=720, width=1280, num_frames=81)
        assert of_auto.to_dict() == of_chosen.to_dict()


@pytest.mark.usefixtures("lines")
@pytest.mark.parametrize(("steps", "chosen"), [(10, RAMP), (4, FEW)])
def test_a_run_is_that_of_the_chosen_method(
    steps: int, chosen: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    want = run(pipe, chosen, steps)
    caplog.set_level(logging.WARNING)
    assert torch.equal(run(pipe, AutoAttn(), steps), want)
    assert not torch.equal(run(pipe, None, steps), want)
    said = [message for message in caplog.messages if message.startswith("auto")]
    assert len(said) == 1
    assert said[0].startswith("auto (balanced) takes block-topk")
    assert said[0].endswith("21.5 dB to dense with 40% of the attention work, on the bundled model")


def run(pipe: Any, method: Any, steps: int) -> torch.Tensor:
    pipe.set_attn_processor(method)
    return tiny_wan.run(pipe, 192, 160, 9, steps)


def test_bad_values() -> None:
    with pytest.raises(
        ValueError, match=r"speed is 'slow', but must be one of fast, balanced, faithful"
    ):
        AutoAttn(speed="slow")
    with pytest.raises(ValueError, match=r"speed is .* but cannot differ from step to step"):
        AutoAttn(speed=["fast", "faithful"])  # type: ignore[arg-type]


def test_a_lora_needs_the_method_itself() -> None:
    with pytest.raises(ValueError, match="the method is auto, which may choose another"):
        TrainSettings(attention={"type": "auto"})
