"""`lora train --mixed-precision bf16` on every recipe, with the norms of a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from cuda_norms import CudaNorms
from tiny_complete import COMPLETE

from diffattn.lora.recipes import RECIPES, recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.lora.teacher import teach
from diffattn.lora.trainer import Trainer

NEARBY = {"type": "gna", "window": [3, 3, 3], "dense_layers": 0, "dense_steps": 0}
CELLS = {"type": "clear", "radius": 2, "frame_radius": 1, "down_factor": 2}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("wan", NEARBY),
    ("wan", {"type": "vmoba"}),
    ("wan", {"type": "linfusion"}),
    ("wan", {"type": "sla", "keep": 0.3, "block_q": 16, "block_kv": 16}),
    ("wan", {"type": "sla2", "keep": 0.3, "block_q": 16, "block_kv": 16}),
    ("hunyuanvideo", NEARBY),
    ("hunyuanvideo", CELLS),
    ("hunyuanvideo", {"type": "vmoba"}),
    ("cogvideox-1.5", NEARBY),
    ("ltx", {"type": "radial"}),
    ("mochi", NEARBY),
    ("flux", CELLS),
    ("flux.2", NEARBY),
    ("qwen-image", NEARBY),
    ("sd3.5", CELLS),
    ("sd1.5", {"type": "linfusion"}),
    ("sdxl", {"type": "agent"}),
]


@pytest.fixture(autouse=True)
def _other_tests_choose_for_themselves() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_recipe_is_here() -> None:
    assert {recipe_for(COMPLETE[name].build()).family for name, _ in CASES} == set(RECIPES)


@pytest.mark.parametrize(
    ("name", "method"), CASES, ids=lambda it: str(getattr(it, "get", str)("type"))
)
def test_losses_are_those_of_full_precision(
    name: str, method: dict[str, Any], tmp_path: Path
) -> None:
    case = COMPLETE[name]
    losses = {}
    for precision in ("no", "bf16"):
        # accelerate keeps the precision for all trainings of a process.
        AcceleratorState._reset_state(reset_partial_state=True)
        pipe = case.build()
        pipe.set_progress_bar_config(disable=True)
        recipe = recipe_for(pipe, text_length=case.text_length)
        clips = teach(pipe, recipe, ["a cat"], tmp_path / "clips", *case.size, steps=2)
        settings = TrainSettings(
            attention=method | {"dense_layers": 0, "dense_steps": 0},
            rank=2,
            steps=2,
            learning_rate=1e-3,
            objective=1.0,
            prediction=0.5,
            attention_output=0.5,
            mixed_precision=precision,
        )
        trainer = Trainer(pipe, clips, clips.empty, settings, tmp_path / precision, recipe=recipe)
        reports: list[Any] = []
        with CudaNorms():
            trainer.train(report=reports.append)
        assert trainer.attachment.sparse_calls
        losses[precision] = [report.losses["objective"] for report in reports]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.03)
    assert losses["bf16"] != losses["no"]
