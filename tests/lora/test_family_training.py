"""Every family from a folder of clips to a LoRA that stock diffusers loads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_complete import COMPLETE

from diffattn.lora.captions import captioned_clips
from diffattn.lora.clips import find_clips
from diffattn.lora.encoding import prepare
from diffattn.lora.recipes import RECIPES, recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.lora.trainer import Trainer
from diffattn.methods import from_dict
from diffattn.models import FAMILIES

# One of each, those that are trained unlike the others of their family too.
CASES = (
    "wan",
    "wan-ti2v-5b",
    "hunyuanvideo",
    "cogvideox-1.5",
    "ltx",
    "mochi",
    "flux",
    "flux.2",
    "qwen-image",
    "sd3",
    "sd1.5",
    "sdxl",
)
FRAMES = 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two clips and two pictures of noise, with a table of captions."""
    folder = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0).integers(0, 256, (4, FRAMES, 50, 70, 3), dtype=np.uint8)
    for index, frames in enumerate(noise):
        first, *rest = [Image.fromarray(frame) for frame in frames]
        if index % 2:
            first.save(folder / f"{index}.png")
        else:
            first.save(folder / f"{index}.gif", save_all=True, append_images=rest, duration=100)
    rows = [f"{path.name},noise of {path.stem}\n" for path in find_clips(folder)]
    (folder / "captions.csv").write_text("".join(["file,caption\n", *rows]))
    return folder


def test_every_family_with_a_recipe_is_trained_here():
    assert {recipe_for(COMPLETE[name].build()).family for name in CASES} == set(RECIPES)
    assert set(RECIPES) <= {family.name for family in FAMILIES}


@pytest.mark.parametrize("name", CASES)
def test_from_clips_to_a_lora(folder, tmp_path, name):
    case = COMPLETE[name]
    height, width, num_frames = case.size
    pipe = case.build()
    recipe = recipe_for(pipe, text_length=case.text_length)
    clips, _ = captioned_clips(folder, find_clips(folder), folder / "captions.csv")
    skipped: list[str] = []
    data = prepare(
        pipe, recipe, clips, tmp_path / "c", height, width, num_frames, report=skipped.append
    )
    # The pictures are no videos, but every clip has a first picture.
    assert (len(data), len(skipped)) == ((4, 0) if num_frames == 1 else (2, 2))

    # The clips show ten frames a second.
    rates = [float(rate) for clip in data if (rate := clip["conditions"].get("frame_rate"))]
    assert rates == ([pytest.approx(10), pytest.approx(10)] if recipe.family == "ltx" else [])

    attention = {"type": "gna", "window": ["full", 3, 3], "dense_layers": 0, "dense_steps": 0}
    settings = TrainSettings(
        attention=attention, rank=2, steps=2, batch_size=2, learning_rate=1e-2, caption_dropout=0.5
    )
    trainer = Trainer(pipe, data, data.empty, settings, tmp_path / "lora", recipe=recipe)
    trainer.train()

    item = data[0]
    told = {key: value[None] for key, value in item["conditions"].items()}
    times = recipe.sample_times(
        pipe.scheduler, 1, torch.Generator().manual_seed(0), item["latents"].shape[1:]
    )

    def predicted(pipe) -> torch.Tensor:
        model = getattr(pipe, recipe.denoiser)
        with torch.no_grad():
            return recipe.predict(model, item["latents"][None], times, told)

    fresh = case.build()
    fresh.set_attn_processor(from_dict(attention))
    before = predicted(fresh)
    fresh.load_lora_weights(tmp_path / "lora")
    trained = predicted(pipe)
    torch.testing.assert_close(predicted(fresh), trained, rtol=1e-5, atol=1e-5)
    assert (trained - before).abs().max() > 1e-3
