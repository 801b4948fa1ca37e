"""Data and figures of the bundled model's adaptation."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffattn import GNAAttn, set_attn_processor
from diffattn.lora.recipes import recipe_for
from diffattn.samples.moving_shapes.adaptation import Figures, HeldOut, RenderedClips
from diffattn.samples.moving_shapes.captions import split_scenes
from diffattn.samples.moving_shapes.clips import render_clips
from diffattn.samples.moving_shapes.evaluate import Sampling, load_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline()


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("lora_benchmark", ROOT / "benchmarks" / "lora.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_clips_are_of_training_captions_and_as_the_pipeline_encodes_them(pipe: Any) -> None:
    recipe = recipe_for(pipe)
    clips = RenderedClips(pipe, recipe, 3)
    training = [scene.caption for scene in split_scenes()[0]]
    assert len(clips) == len(set(clips.keys)) == 3
    item = clips[2]
    assert torch.equal(item["latents"], clips[2]["latents"])
    number, _, caption = item["key"].partition(" ")
    assert number == "2"
    assert caption in training
    scene = split_scenes()[0][training.index(caption)]
    pixels = render_clips([scene], 100_002)
    encoded = recipe.encode_clip(pipe, pixels, None)[0]
    torch.testing.assert_close(item["latents"], encoded, rtol=0.02, atol=0.02)
    told = recipe.encode_prompt(pipe, [caption])["prompt_embeds"][0]
    assert torch.equal(item["conditions"]["prompt_embeds"], told)


def test_figures_see_what_a_mask_costs(pipe: Any) -> None:
    held_out = HeldOut(pipe, recipe_for(pipe), 2, 1, Sampling(steps=2))
    assert held_out.scenes[0] in split_scenes()[1]
    dense, made = held_out.figures(pipe)
    assert dense.distance == 0
    assert dense.psnr_db is None
    assert made[0].dtype == np.uint8
    attachment = set_attn_processor(pipe, GNAAttn(window=(5, 5, 5), dense_steps=1.0))
    try:
        # Dense steps are of a run: what was generated is dense, the loss is not.
        sparse, again = held_out.figures(pipe, attachment, made)
    finally:
        set_attn_processor(pipe, None)
    assert sparse.loss > 2 * dense.loss
    assert sparse.distance > 0.01
    assert (again[0] == made[0]).all()


def test_a_row_says_how_much_came_back_and_survives_being_written(
    benchmark: Any, tmp_path: Path
) -> None:
    dense, sparse = (
        Figures(0.1, 0.0, None, {"colour": 1.0}),
        Figures(0.5, 0.4, 9.0, {"colour": 0.0}),
    )
    trained = Figures(0.2, 0.1, 20.0, {"colour": 1.0})
    for name, parameters in reversed(benchmark.cases(["radial", "gna"])):
        method = benchmark.method_settings(name, parameters)
        assert (method["dense_layers"], method["dense_steps"]) == (0, 0)
        settings = {"rank": 1, "alpha": 1, "learning_rate": 1, "batch_size": 1, "steps": 3}
        settings |= {"objective": 1, "prediction": 1}
        row = benchmark.Row(method, 0.25, dense, sparse, trained, settings, 1.5)
        assert row.recovered == pytest.approx(0.75)
        facts = {"machine": "here", "date": "today"}
        benchmark.write(tmp_path, benchmark.row_name(name, parameters), row, facts)
    rows = benchmark.read_rows(tmp_path / "lora")
    assert [row.method["type"] for row in rows] == ["radial", "gna", "radial", "gna"]
    assert (rows[-1].dense, rows[-1].sparse, rows[-1].trained) == (dense, sparse, trained)
    assert rows[-1].method == benchmark.method_settings("gna", {"window": (5, 5, 5)})
    text = (tmp_path / "lora.md").read_text()
    assert "| gna window=[5, 5, 5], stride=1 | 25% | 0.1000 | 0.5000 | 0.2000 | 75% |" in text
    assert not list(tmp_path.rglob("*.tmp"))
