"""Training of models that edit: pairs of pictures, from a folder to a LoRA, against the pipelines.

The pipelines scale what is edited to a million pixels, so the tiny models do, too.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_complete
import torch
from made_lora import NEARBY
from PIL import Image
from tiny_complete import COMPLETE, EDITING

from diffattn.lora.captions import CaptionedClip, captioned_clips
from diffattn.lora.clips import find_clips, read_shot
from diffattn.lora.encoding import prepare
from diffattn.lora.recipes import recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.lora.sources import apart_from_sources, with_sources
from diffattn.lora.teacher import teach
from diffattn.lora.trainer import Trainer

HEIGHT, WIDTH = 32, 48
LENGTH = 40


def write(path: Path, seed: int, height: int = 2 * HEIGHT, width: int = 2 * WIDTH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two edited pictures, one of them in a subfolder, with sources of another shape and kind."""
    folder = tmp_path / "data"
    for number, name in enumerate(("1", "more/2")):
        write(folder / f"{name}.png", number)
        write(folder / "sources" / f"{name}.bmp", 10 + number, 70, 90)
        (folder / f"{name}.txt").write_text("make it red" if number else "remove the hat, please")
    return folder


def clips_of(folder: Path) -> list[CaptionedClip]:
    paths, sources = apart_from_sources(folder, find_clips(folder))
    clips, _ = captioned_clips(folder, paths)
    found, unused = with_sources(folder, clips, sources)
    assert unused == []
    return found


class TestFolder:
    def test_a_clip_has_the_source_of_its_name(self, pairs: Path) -> None:
        found = {clip.path: clip.source for clip in clips_of(pairs)}
        assert found == {
            pairs / "1.png": pairs / "sources/1.bmp",
            pairs / "more/2.png": pairs / "sources/more/2.bmp",
        }

    def test_a_source_without_a_clip_is_left_over(self, pairs: Path) -> None:
        write(pairs / "sources/3.png", 0)
        paths, sources = apart_from_sources(pairs, find_clips(pairs))
        _, unused = with_sources(pairs, captioned_clips(pairs, paths)[0], sources)
        assert unused == [pairs / "sources/3.png"]

    def test_a_clip_without_a_source_is_refused(self, pairs: Path) -> None:
        (pairs / "sources/more/2.bmp").unlink()
        line = r"2.png has no picture that it was edited from: put that to .*sources/more/2.png, or"
        with pytest.raises(ValueError, match=line):
            clips_of(pairs)

    def test_two_sources_of_one_name_are_refused(self, pairs: Path) -> None:
        write(pairs / "sources/1.png", 0)
        with pytest.raises(ValueError, match=r"1.bmp and 1.png in .* have one name: remove one"):
            clips_of(pairs)

    def test_a_video_is_no_source(self, pairs: Path) -> None:
        (pairs / "sources/1.bmp").rename(pairs / "sources/1.mp4")
        with pytest.raises(ValueError, match=r"1.mp4 is no picture; sources end in .*\.png"):
            clips_of(pairs)

    @pytest.mark.parametrize("kept", ["sources", "."])
    def test_a_folder_of_one_side_only_is_refused(self, pairs: Path, kept: str) -> None:
        for path in find_clips(pairs):
            if ("sources" in path.parts) != (kept == "sources"):
                path.unlink()
        empty = "data" if kept == "sources" else "data/sources"
        with pytest.raises(ValueError, match=rf"there are no pictures in \S*{empty}: for a model"):
            clips_of(pairs)


@pytest.mark.parametrize("name", EDITING)
def test_the_denoiser_is_called_as_the_pipeline_calls_it(name: str, tmp_path: Path) -> None:
    case = EDITING[name]
    pipe = case.build()
    recipe = recipe_for(pipe, text_length=LENGTH)
    signature = inspect.signature(pipe.transformer.forward)
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        given = {k: v for k, v in given.items() if v is not None and "attention_kwargs" not in k}
        calls.append(given | {"output": output[0]})

    pipe.transformer.register_forward_hook(note, with_kwargs=True)
    # What the pipeline scales to its size, the recipe finds at that size.
    rows, columns = recipe.source_size(HEIGHT, WIDTH)
    path = tmp_path / "source.png"
    case.call["image"].resize((columns, rows), Image.Resampling.LANCZOS).save(path)
    pixels = read_shot(path, rows, columns).frames[None]
    with torch.no_grad():
        case.run(pipe, "a red hat", image=Image.open(path), steps=2)
        conditions = recipe.encode_source(pipe, pixels, "a red hat")
        told = {k: v[0] for k, v in conditions.items()}
        tokens = (HEIGHT // 16) * (WIDTH // 16)
        noisy = unpack(pipe, calls[0]["hidden_states"][:, :tokens])
        empty = {k: v[0] for k, v in recipe.encode_empty(pipe).items()}
        batch = {k: v[None] for k, v in recipe.told(told, empty, dropped=False).items()}
        found = recipe.predict(pipe.transformer, noisy, pipe.scheduler.sigmas[:1], batch)
    own, _, mine = calls
    assert own.keys() == mine.keys()
    for key, value in own.items():
        if isinstance(value, torch.Tensor):
            # A picture's numbers are rounded otherwise, which the VAE amplifies.
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=5e-4)
        else:
            assert mine[key] == value, key
    expected = unpack(pipe, own["output"][:, :tokens])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-4)

    dropped = recipe.told(told, empty, dropped=True)
    assert dropped.keys() == batch.keys()
    assert torch.equal(dropped["source"], told["source"])
    if "prompt_embeds_mask" not in dropped:
        text = pipe.encode_prompt("", None, max_sequence_length=LENGTH)[0]
        torch.testing.assert_close(dropped["prompt_embeds"], text[0], rtol=1e-3, atol=1e-3)
        return
    # The empty caption is that of this picture.
    shown = pipe.image_processor.resize(Image.open(path), *_shown(pipe, rows, columns))
    alone = pipe.encode_prompt(prompt="", image=[shown])[0]
    assert int(dropped["prompt_embeds_mask"].sum()) == alone.shape[1]
    torch.testing.assert_close(dropped["prompt_embeds"][: alone.shape[1]], alone[0])


def unpack(pipe: Any, tokens: torch.Tensor) -> torch.Tensor:
    latents: torch.Tensor = pipe._unpack_latents(tokens, HEIGHT, WIDTH, 8)
    return latents if latents.ndim == 5 else latents[:, :, None]


def _shown(pipe: Any, rows: int, columns: int) -> tuple[int, int]:
    """The size at which the text encoder sees a picture, by diffusers' own function."""
    module = inspect.getmodule(type(pipe))
    area = getattr(module, "CONDITION_IMAGE_SIZE", 1024 * 1024)
    width, height, *_ = module.calculate_dimensions(area, columns / rows)  # type: ignore[union-attr]
    return height, width


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (32, 48), (720, 1280), (1664, 928)])
def test_sources_have_the_size_of_the_pipeline(height: int, width: int) -> None:
    for name in ("qwen-image-edit", "qwen-image-edit-plus"):
        pipe = EDITING[name].build()
        module = inspect.getmodule(type(pipe))
        columns, rows, *_ = module.calculate_dimensions(1024 * 1024, width / height)  # type: ignore[union-attr]
        assert recipe_for(pipe).source_size(height, width) == (rows, columns)


@pytest.mark.parametrize(
    ("height", "width", "found"),
    [
        (1024, 1024, (1024, 1024)),
        (32, 48, (832, 1248)),
        (720, 1280, (752, 1392)),
        (9, 2, (1568, 672)),
    ],
)
def test_sources_of_kontext_have_the_nearest_of_its_shapes(
    height: int, width: int, found: tuple[int, int]
) -> None:
    # 1280 / 720 is 1.78, between 1392 / 752 = 1.85 and 1328 / 800 = 1.66.
    recipe = recipe_for(EDITING["flux-kontext"].build())
    assert recipe.source_size(height, width) == found


@pytest.mark.parametrize("name", ["qwen-image-edit-plus", "flux-kontext"])
def test_train_on_pairs_save_and_load_in_stock_diffusers(
    name: str, pairs: Path, tmp_path: Path
) -> None:
    case = EDITING[name]
    pipe = case.build()
    recipe = recipe_for(pipe, text_length=LENGTH)
    clips = prepare(pipe, recipe, clips_of(pairs), tmp_path / "clips", HEIGHT, WIDTH)
    assert len(clips) == 2
    assert bool(clips.empty) == (name == "flux-kontext")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").iterdir()}
    again = prepare(pipe, recipe, clips_of(pairs), tmp_path / "clips", HEIGHT, WIDTH)
    assert again.keys == clips.keys
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").iterdir()}
    # Another source is another clip.
    write(pairs / "sources/1.bmp", 99)
    other = prepare(pipe, recipe, clips_of(pairs), tmp_path / "clips", HEIGHT, WIDTH)
    assert [a == b for a, b in zip(other.keys, clips.keys, strict=True)] == [False, True]

    settings = TrainSettings(
        attention=NEARBY,
        rank=2,
        steps=2,
        batch_size=2,
        learning_rate=0.01,
        caption_dropout=0.5,
        prediction=0.5,
        gradient_checkpointing=True,
    )
    trainer = Trainer(pipe, clips, clips.empty, settings, tmp_path, recipe=recipe)
    reports: list[Any] = []
    trainer.train(report=reports.append)
    assert torch.tensor([list(report.losses.values()) for report in reports]).isfinite().all()
    assert trainer.attachment.sparse_calls
    factors = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert factors
    assert all(factor.abs().max() > 0 for factor in factors)
    stock = case.build()
    stock.load_lora_weights(tmp_path)
    trained, loaded = factors_of(trainer.model), factors_of(stock.transformer)
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], factor) for name, factor in trained.items())


def factors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The factors of a model's LoRA, without the adapter's name in theirs."""
    return {
        re.sub(r"(lora_[AB])\.\w+", r"\1", name): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


class TestRefused:
    def test_a_caption_that_is_too_long(self) -> None:
        pipe = EDITING["qwen-image-edit-plus"].build()
        recipe = recipe_for(pipe, text_length=5)
        with pytest.raises(
            ValueError, match=r"'sixteen letters!' has 16 tokens, but at most 5 are"
        ):
            recipe.encode_source(pipe, torch.zeros(1, 3, 1, 32, 64), "sixteen letters!")

    def test_a_text_alone(self) -> None:
        pipe = EDITING["qwen-image-edit"].build()
        with pytest.raises(ValueError, match="encodes an instruction together with the picture"):
            recipe_for(pipe).encode_prompt(pipe, ["a cat"])

    def test_data_of_prompts(self, tmp_path: Path) -> None:
        pipe = EDITING["qwen-image-edit"].build()
        with pytest.raises(ValueError, match="edits pictures, which prompts alone do not give"):
            teach(pipe, recipe_for(pipe), ["a cat"], tmp_path, HEIGHT, WIDTH)

    def test_pairs_for_a_model_that_edits_nothing_and_the_other_way(
        self, pairs: Path, tmp_path: Path
    ) -> None:
        clips = clips_of(pairs)
        pipe = COMPLETE["qwen-image"].build()
        with pytest.raises(ValueError, match=r"1.png has a source, but .* does not edit pictures"):
            prepare(pipe, recipe_for(pipe), clips, tmp_path / "clips", HEIGHT, WIDTH)
        with pytest.raises(ValueError, match="edits no pictures: there are no sources"):
            recipe_for(pipe).encode_source(pipe, torch.zeros(1, 3, 1, 32, 64), "")
        pipe = EDITING["qwen-image-edit"].build()
        plain = [CaptionedClip(clip.path, clip.caption) for clip in clips]
        with pytest.raises(ValueError, match=r"1.png has no source, but .* model edits pictures"):
            prepare(pipe, recipe_for(pipe), plain, tmp_path / "clips", HEIGHT, WIDTH)

    def test_another_pipeline_that_edits(self) -> None:
        pipe = tiny_complete.qwen_image_edit("QwenImageEditInpaintPipeline")
        line = "no training recipe for QwenImageEditInpaintPipeline: train its model in QwenImageEd"
        with pytest.raises(ValueError, match=line):
            recipe_for(pipe)

    def test_another_pipeline_of_kontext(self) -> None:
        parts = EDITING["flux-kontext"].build().components
        pipe = diffusers.FluxKontextInpaintPipeline(**parts)
        line = "no training recipe for FluxKontextInpaintPipeline: train its model in FluxKontextP"
        with pytest.raises(ValueError, match=line):
            recipe_for(pipe)

    def test_a_source_that_cannot_be_read_leaves_its_clip_out(
        self, pairs: Path, tmp_path: Path
    ) -> None:
        (pairs / "sources/1.bmp").write_bytes(b"no picture")
        pipe = EDITING["qwen-image-edit-plus"].build()
        lines: list[str] = []
        recipe = recipe_for(pipe, text_length=LENGTH)
        clips = prepare(
            pipe, recipe, clips_of(pairs), tmp_path / "c", HEIGHT, WIDTH, report=lines.append
        )
        assert len(clips) == 1
        assert lines[0].startswith(
            f"skipped {pairs / '1.png'}: its source {pairs / 'sources/1.bmp'}"
        )
