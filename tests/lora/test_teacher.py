"""A teacher's data against what its pipeline generates."""

import inspect
from pathlib import Path

import pytest
import tiny_complete
import torch
from tiny_complete import COMPLETE

from diffattn import GNAAttn
from diffattn.lora.cache import CachedClips
from diffattn.lora.errors import LoraError
from diffattn.lora.recipes import recipe_for
from diffattn.lora.teacher import teach
from diffattn.samples.moving_shapes import MODEL_DIR

PROMPTS = ["a red fox", "snow", "a red fox at night"]


def taught(pipe, folder: Path, **changes) -> CachedClips:
    pipe.set_progress_bar_config(disable=True)
    recipe = recipe_for(pipe, text_length=changes.pop("text_length", None))
    settings = {"prompts": PROMPTS, "height": 32, "width": 48, "num_frames": 5, "steps": 2}
    return teach(pipe, recipe, folder=folder, **(settings | changes))


def wan():
    return tiny_complete.wan()


@pytest.mark.parametrize(
    "name", ["wan", "cogvideox-1.5", "ltx", "flux", "flux.2", "qwen-image", "sd3", "sdxl"]
)
def test_latents_are_those_that_the_pipeline_decodes(tmp_path, name):
    case = COMPLETE[name]
    height, width, num_frames = case.size
    pipe = case.build()
    recipe = recipe_for(pipe, text_length=case.text_length)
    size = {"height": height, "width": width, "num_frames": num_frames}
    data = taught(
        pipe,
        tmp_path,
        prompts=PROMPTS[:1],
        text_length=case.text_length,
        guidance_scale=2.0,
        **size,
    )
    (item,) = data
    arguments = {"prompt": PROMPTS[0], "num_inference_steps": 2, "guidance_scale": 2.0} | size
    if case.text_length is not None:
        arguments["max_sequence_length"] = case.text_length
    known = inspect.signature(pipe.__call__).parameters
    generator = torch.Generator().manual_seed(int(item["key"][:8], 16))
    expected = pipe(
        **{k: v for k, v in arguments.items() if k in known},
        output_type="latent",
        generator=generator,
    )[0]
    assert torch.equal(item["latents"], recipe.from_pipeline(expected, height, width)[0])
    # As clips of this size are.
    pixels = torch.zeros(1, 3, num_frames, height, width)
    assert item["latents"].shape == recipe.encode_clip(pipe, pixels, None).shape[1:]
    told = recipe.encode_prompt(pipe, PROMPTS[:1])
    assert item["conditions"].keys() == told.keys()
    assert all(torch.equal(item["conditions"][name], told[name][0]) for name in told)
    assert data.empty.keys() == told.keys()


def test_samples_of_a_prompt_differ_and_come_together(tmp_path):
    data = taught(wan(), tmp_path, prompts=PROMPTS[:2], samples=2)
    assert len(data) == 4
    latents = [item["latents"] for item in data]
    assert all(not torch.equal(latents[i], latents[j]) for i in range(4) for j in range(i))
    texts = [item["conditions"]["prompt_embeds"] for item in data]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[2], texts[3])
    assert not torch.equal(texts[1], texts[2])


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    def stop(done: int, of: int) -> None:
        if done == 2:
            raise StoppedError

    pipe = wan()
    with pytest.raises(StoppedError):
        taught(pipe, tmp_path / "a", progress=stop)
    with pytest.raises(LoraError, match=r"no index\.json"):
        CachedClips(tmp_path / "a")
    steps = []
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    taught(pipe, tmp_path / "a")
    assert len(steps) == 2
    whole = taught(wan(), tmp_path / "b")
    assert CachedClips(tmp_path / "a").keys == whole.keys
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("change", ["model", "scheduler", "seed", "steps", "guidance", "size"])
def test_what_depends_on_a_change_is_made_again(tmp_path, change):
    pipe = wan()
    former = taught(pipe, tmp_path, prompts=PROMPTS[:1]).keys
    changes = {}
    match change:
        case "model":
            with torch.no_grad():
                pipe.transformer.proj_out.bias[0] += 1e-3
        case "scheduler":
            pipe.scheduler = tiny_complete.FLOW(shift=4.0)
        case "seed":
            changes["seed"] = 1
        case "steps":
            changes["steps"] = 1
        case "guidance":
            changes["guidance_scale"] = 2.0
        case "size":
            changes["width"] = 32
    assert taught(pipe, tmp_path, prompts=PROMPTS[:1], **changes).keys != former


def test_a_model_without_temporal_compression_makes_as_many_frames_as_asked_for(tmp_path):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(MODEL_DIR)
    prompt = "a red circle moving right on a blue background"
    for frames in (1, 3):
        (item,) = taught(
            pipe, tmp_path, prompts=[prompt], height=32, width=32, num_frames=frames, steps=1
        )
        assert item["latents"].shape[1] == frames


class TestRefused:
    def test_a_sparse_teacher(self, tmp_path):
        pipe = wan()
        pipe.set_attn_processor(GNAAttn(window=(3, 3, 3)))
        with pytest.raises(LoraError, match=r"attends sparsely: call pipe\.set_attn_processor\(No"):
            taught(pipe, tmp_path)
        pipe.set_attn_processor(None)
        assert len(taught(pipe, tmp_path, prompts=PROMPTS[:1], steps=1)) == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompts": []}, "there are no prompts for the teacher"),
            ({"samples": 0}, "samples is 0, but must be at least 1"),
            ({"width": 40}, "width is 40, but this model needs a multiple of 16: try 32 or 48"),
            ({"colour": 1}, "WanPipeline does not take 'colour'"),
        ],
    )
    def test_bad_settings(self, tmp_path, changes, message):
        with pytest.raises(LoraError, match=message):
            taught(wan(), tmp_path / "cache", **changes)
        assert not (tmp_path / "cache").exists()

    def test_a_model_that_gives_nan(self, tmp_path):
        pipe = wan()
        with torch.no_grad():
            pipe.transformer.proj_out.bias[0] = float("nan")
        with pytest.raises(LoraError, match=r"gave NaN in torch\.float32 for 'a red fox'"):
            taught(pipe, tmp_path)
        assert not list(tmp_path.glob("*.safetensors"))
