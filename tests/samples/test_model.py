import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffattn.samples.moving_shapes import MODEL_DIR
from diffattn.samples.moving_shapes.batches import Mixing, choose_frames
from diffattn.samples.moving_shapes.captions import Scene, all_scenes, split_scenes, vocabulary
from diffattn.samples.moving_shapes.checker import Reading
from diffattn.samples.moving_shapes.clips import FRAMES, SIZE, render_clips
from diffattn.samples.moving_shapes.evaluate import accuracy, load_pipeline
from diffattn.samples.moving_shapes.model import (
    ModelSize,
    TrainingView,
    draw_noise_levels,
    make_transformer,
)
from diffattn.samples.moving_shapes.text import make_text_encoder, make_tokenizer, tokenize
from diffattn.samples.moving_shapes.train import (
    Settings,
    Stage,
    Trainer,
    export,
    load_checkpoint,
    main,
    parse_stages,
    run,
    save_checkpoint,
    trained_vae,
)
from diffattn.samples.moving_shapes.vae import (
    PATCH,
    clip_latents,
    latent_statistics,
    make_vae,
    train_decoder,
)

MICRO = Settings(
    stages=(Stage(frames=2, batch=2, steps=3), Stage(frames=3, batch=1, steps=3)),
    size=ModelSize(heads=1, head_dim=24, layers=1, ffn_dim=32),
    warmup_steps=2,
    decay_steps=3,
    precision="fp32",
)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """PSNR in dB of clips in [-1, 1]."""
    return float(10 * torch.log10(4 / (first - second).pow(2).mean()))


# The shipped model


def test_model_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in MODEL_DIR.rglob("*")) <= 10_000_000


def test_pipeline_is_stock_and_loads_in_one_type(pipeline: Any) -> None:
    assert type(pipeline).__name__ == "WanPipeline"
    types = {
        parameter.dtype
        for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder)
        for parameter in part.parameters()
    }
    assert types == {torch.float32}


def test_shipped_tokenizer_knows_every_word(pipeline: Any) -> None:
    ids = pipeline.tokenizer(" ".join(vocabulary())).input_ids
    assert pipeline.tokenizer.unk_token_id not in ids
    assert len(set(ids)) == len(vocabulary()) + 1


def test_shipped_grid_has_at_least_two_thousand_tokens(pipeline: Any) -> None:
    time, height, width = pipeline.transformer.config.patch_size
    side = SIZE // pipeline.vae.config.scale_factor_spatial
    assert (FRAMES // time) * (side // height) * (side // width) == 2304


def test_shipped_vae_keeps_clips(pipeline: Any) -> None:
    # Wan encodes a first frame and then groups of four.
    clip = render_clips([split_scenes()[1][0]], seed=0)[:, :, :13]
    with torch.no_grad():
        latents = pipeline.vae.encode(clip).latent_dist.mode()
        assert psnr(pipeline.vae.decode(latents).sample, clip) > 30


@pytest.mark.parametrize("length", [32, 512])
def test_short_generation_is_finite_and_has_the_right_shape(pipeline: Any, length: int) -> None:
    frames = pipeline(
        "a red circle moving right on a blue background",
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES - 1,
        num_inference_steps=1,
        max_sequence_length=length,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    assert frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert np.isfinite(frames).all()
    assert 0 <= frames.min() <= frames.max() <= 1


def test_committed_evaluation_belongs_to_the_held_out_prompts() -> None:
    result = json.loads((MODEL_DIR.parent / "evaluation.json").read_text())
    captions = [scene.caption for scene in split_scenes()[1]]
    assert [clip["caption"] for clip in result["clips"]] == captions
    fields = ("colour", "background", "direction", "shape", "overlap", "purity")
    readings = [Reading(**{name: clip[name] for name in fields}) for clip in result["clips"]]
    assert accuracy(split_scenes()[1], readings) == pytest.approx(result["accuracy"])


def test_accuracy_counts_attributes_separately() -> None:
    scene = Scene("red", "circle", "left", "blue")
    right = Reading("red", "blue", "left", "circle", 1.0, 1.0)
    readings = [right, replace(right, direction=None), replace(right, shape="square")]
    assert accuracy([scene] * 3, readings) == pytest.approx(
        {"colour": 1, "background": 1, "direction": 2 / 3, "shape": 2 / 3, "all": 1 / 3}
    )


# The VAE


def test_hand_set_encoder_computes_the_latents_of_training() -> None:
    vae = make_vae()
    clip = render_clips(all_scenes()[::90], seed=1)[:, :, :5]
    mean, std = (value.view(1, -1, 1, 1, 1) for value in latent_statistics())
    with torch.no_grad():
        encoded = (vae.encode(clip).latent_dist.mode() - mean) / std
    torch.testing.assert_close(encoded, clip_latents(clip), atol=1e-4, rtol=0)


def test_untrained_decoder_repeats_the_patch_mean() -> None:
    vae = make_vae()
    clip = render_clips(all_scenes()[:1], seed=1)[:, :, :2]
    patches = torch.nn.functional.avg_pool3d(clip, (1, PATCH, PATCH))
    mean, std = (value.view(1, -1, 1, 1, 1) for value in latent_statistics())
    with torch.no_grad():
        decoded = vae.decode(clip_latents(clip) * std + mean).sample
    repeated = torch.nn.functional.interpolate(patches, scale_factor=(1, PATCH, PATCH))
    torch.testing.assert_close(decoded, repeated, atol=2e-3, rtol=0)


def test_decoder_training_leaves_the_frames_independent() -> None:
    vae = make_vae()
    train_decoder(vae, steps=2, batch=1, seed=0)
    latents = torch.randn(1, 3, 2, 4, 4)
    with torch.no_grad():
        together = vae.decode(latents).sample[:, :, 1:]
        alone = vae.decode(latents[:, :, 1:]).sample
    torch.testing.assert_close(together, alone)


# Training


def test_training_forward_equals_the_stock_forward() -> None:
    torch.manual_seed(0)
    transformer = make_transformer(MICRO.size)
    torch.nn.init.normal_(transformer.proj_out.weight)
    noisy, text = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 10, 64)
    text[1, 3:] = 0
    padded = torch.cat([text, torch.zeros(2, 70, 64)], dim=1)
    sigma, frames = torch.tensor([0.3, 0.9]), torch.arange(4).expand(2, -1)
    with torch.no_grad():
        stock = transformer(noisy, sigma * 1000, padded, return_dict=False)[0]
        view = TrainingView(transformer)
        ours = view.velocity(noisy, sigma, text, frames, torch.tensor([80, 80]))
        view.restore()
        restored = transformer(noisy, sigma * 1000, padded, return_dict=False)[0]
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
    assert torch.equal(restored, stock)


def test_guidance_reaches_the_attention_that_it_is_for() -> None:
    settings = replace(MICRO, size=ModelSize(heads=2, head_dim=24, layers=4, ffn_dim=32))
    settings = replace(settings, stages=(Stage(frames=3, batch=2, steps=1),), mixing=Mixing(0.0))
    trainer, plain = Trainer(settings), Trainer(replace(settings, path_weight=0.0))
    (flow, loss), (plain_flow, plain_loss) = trainer.train_step(), plain.train_step()
    assert flow == plain_flow
    assert trainer.view.paths.penalty is not None
    penalty = settings.path_weight * trainer.view.paths.penalty
    assert loss.item() == pytest.approx((plain_loss + penalty).item())
    assert plain.view.paths.penalty is None


def test_whole_clips_are_not_guided() -> None:
    settings = replace(MICRO, size=ModelSize(heads=2, head_dim=24, layers=2, ffn_dim=32))
    trainer = Trainer(replace(settings, stages=(Stage(FRAMES, batch=1, steps=1),)))
    trainer.train_step()
    assert trainer.view.paths.penalty is None


def test_losses_of_weight_zero_leave_the_flow_matching_loss() -> None:
    plain = replace(
        MICRO, path_weight=0.0, word_weight=0.0, outline_weight=0.0, contested_weight=0.0
    )
    flow, loss = Trainer(plain).train_step()
    assert flow == loss
    for name in ("word_weight", "outline_weight", "contested_weight"):
        same_flow, more = Trainer(replace(plain, **{name: 1.0})).train_step()
        assert same_flow == flow
        assert more > loss


def test_frames_keep_their_place_in_time() -> None:
    torch.manual_seed(0)
    view = TrainingView(make_transformer(MICRO.size))
    hidden = torch.zeros(2, 3, FRAMES, 8, 8)
    every = view._stock_rope(hidden)[0].view(FRAMES, 16, -1)
    frames = torch.tensor([[0, 4, 15], [0, 9, 15]])
    view._rope.frames = frames
    chosen = view._rope(hidden[:, :, :3])[0].view(2, 3, 16, -1)
    assert torch.equal(chosen, every[frames])


def test_chosen_frames_are_sorted_distinct_and_hold_both_ends() -> None:
    frames = choose_frames(50, 5, torch.Generator().manual_seed(0))
    assert frames.shape == (50, 5)
    assert (frames[:, 0] == 0).all()
    assert (frames[:, -1] == FRAMES - 1).all()
    assert (frames.diff(dim=1) > 0).all()
    assert len(frames.unique()) == FRAMES


def test_whole_clips_need_no_choice() -> None:
    frames = choose_frames(2, FRAMES, torch.Generator().manual_seed(0))
    assert torch.equal(frames, torch.arange(FRAMES).expand(2, -1))


@pytest.mark.usefixtures("one_thread")
def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    def go_on(trainer: Trainer, until: int) -> None:
        for _ in run(trainer, until, report=lambda line: None):
            pass

    whole = Trainer(MICRO)
    go_on(whole, 6)

    first = Trainer(MICRO)
    go_on(first, 2)
    save_checkpoint(first, tmp_path / "checkpoint.pt")
    second = Trainer(MICRO)
    load_checkpoint(second, tmp_path / "checkpoint.pt")
    go_on(second, 6)

    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert second.step == whole.step
    assert not torch.equal(whole.parameters[0], Trainer(MICRO).parameters[0])
    for ours, theirs in zip(second.parameters, whole.parameters, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(second.averages, whole.averages, strict=True):
        assert torch.equal(ours, theirs)


def test_export_can_be_loaded_and_does_not_disturb_the_run(tmp_path: Path) -> None:
    trainer = Trainer(MICRO)
    trainer.train_step()
    before = [parameter.clone() for parameter in trainer.parameters]
    export(trainer, make_vae(), tmp_path)
    for ours, theirs in zip(trainer.parameters, before, strict=True):
        assert torch.equal(ours, theirs)
    assert load_pipeline(tmp_path).transformer.config.num_layers == 1


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    save_checkpoint(Trainer(MICRO), tmp_path / "checkpoint.pt")
    larger = Trainer(replace(MICRO, size=replace(MICRO.size, layers=2)))
    with pytest.raises(ValueError, match="holds a model of size"):
        load_checkpoint(larger, tmp_path / "checkpoint.pt")


def test_a_run_starts_from_an_exported_pipeline(tmp_path: Path) -> None:
    trainer, vae = Trainer(MICRO), make_vae()
    trainer.train_step()
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(0.125)
    export(trainer, vae, tmp_path)
    second = Trainer(replace(MICRO, seed=5))
    second.start_from(tmp_path)
    for ours, theirs in zip(second.parameters, trainer.averages, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    for ours, average in zip(second.parameters, second.averages, strict=True):
        assert torch.equal(ours, average)
    kept = trained_vae(tmp_path / "vae.pt", steps=1, device="cpu", start=tmp_path)
    assert bool((kept.decoder.conv_out.bias == 0.125).all())


def test_a_pipeline_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'layers': 4.*not this run's"):
        Trainer(MICRO).start_from(MODEL_DIR)


def test_a_checkpoint_of_another_kind_of_device_is_refused() -> None:
    state = {**Trainer(MICRO).state(), "device": "cuda"}
    with pytest.raises(ValueError, match=r"run on 'cuda', this run is on 'cpu'.*--device cuda"):
        Trainer(MICRO).load_state(state)


def test_export_asks_for_nothing_that_only_the_device_of_the_run_has(tmp_path: Path) -> None:
    trainer = Trainer(MICRO)
    trainer.train_step()
    # The state of a GPU's generator cannot be put into a generator of the CPU.
    del trainer.noise
    export(trainer, make_vae(), tmp_path)
    loaded = load_pipeline(tmp_path).transformer
    expected = trainer.averaged().transformer
    for ours, theirs in zip(loaded.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(Trainer(MICRO), tmp_path / "none.pt")


def test_the_script_trains_on_from_a_pipeline_goes_on_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--work", str(tmp_path / "run"), "--stages", "2x1x1", "--checkpoint-every", "1"]
    main([*command, "--from", str(MODEL_DIR)])
    assert "step 1 at 1/1 tokens 288" in capsys.readouterr().out
    exported = tmp_path / "model"
    main([*command, "--from", str(MODEL_DIR), "--resume", "--export", str(exported)])
    assert "step 1" not in capsys.readouterr().out
    names = [str(file.relative_to(MODEL_DIR)) for file in MODEL_DIR.rglob("*.json")]
    assert sorted(names) == sorted(str(f.relative_to(exported)) for f in exported.rglob("*.json"))
    shipped, trained = load_pipeline(MODEL_DIR), load_pipeline(exported)
    weight = trained.transformer.proj_out.weight
    assert not torch.equal(weight, shipped.transformer.proj_out.weight)
    torch.testing.assert_close(weight, shipped.transformer.proj_out.weight, atol=0.01, rtol=0.1)
    assert torch.equal(trained.vae.decoder.conv_in.weight, shipped.vae.decoder.conv_in.weight)


def test_rates_rise_stay_and_fall_to_zero() -> None:
    settings = Settings(stages=(Stage(4, 1, 1000),), warmup_steps=100, decay_steps=200)
    rates = [settings.rate_at(step) for step in range(settings.steps)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99:800] == [1.0] * 701
    assert rates[-1] == pytest.approx(1 / 200)


def test_stages_follow_one_another() -> None:
    stages = [MICRO.stage_at(step).frames for step in range(6)]
    assert stages == [2, 2, 2, 3, 3, 3]
    with pytest.raises(IndexError, match="step 6 lies behind"):
        MICRO.stage_at(6)


def test_a_time_budget_shortens_the_schedule_and_never_lengthens_it() -> None:
    settings = Settings(stages=(Stage(4, 1, 600), Stage(8, 1, 400)), minutes=2.0)
    # After half of the time half of the schedule is due.
    assert settings.position_after(3.0, seconds=60.0) == 500
    assert settings.position_after(700.0, seconds=60.0) == 701
    assert settings.stage_at(settings.position_after(0.0, seconds=90.0)).frames == 8
    assert replace(settings, minutes=None).position_after(3.0, seconds=1e9) == 4


def test_a_run_ends_with_its_time_budget() -> None:
    trainer = Trainer(replace(MICRO, minutes=1e-6))
    lines: list[str] = []
    assert list(run(trainer, 6, report=lines.append)) == [1]
    assert trainer.position >= MICRO.steps
    assert len(lines) == 1
    second = Trainer(replace(MICRO, minutes=1e-6))
    second.load_state(trainer.state())
    assert list(run(second, 6, report=lines.append)) == []


@pytest.mark.parametrize("minutes", [0.0, -3.0, float("nan")])
def test_a_budget_that_is_no_time_is_refused(minutes: float) -> None:
    with pytest.raises(ValueError, match=f"must be positive, not {minutes} minutes"):
        Settings(minutes=minutes)


def test_stages_are_read_from_text() -> None:
    assert parse_stages("4x12x100,16x2x5") == (Stage(4, 12, 100), Stage(16, 2, 5))


@pytest.mark.parametrize("text", ["4x12", "4x12xmany", "1x2x3", "17x2x3", "4x0x3"])
def test_impossible_stages_are_refused(text: str) -> None:
    with pytest.raises(Exception, match=r"FRAMESxBATCHxSTEPS|2 to 16|must be positive"):
        parse_stages(text)


def test_noise_levels_use_the_shifts_in_turn() -> None:
    levels = draw_noise_levels(2000, (3.0, 15.0), torch.Generator().manual_seed(0))
    assert 0 < float(levels.min()) < float(levels.max()) < 1
    # The median of a shifted logit-normal is shift / (1 + shift).
    assert float(levels[0::2].median()) == pytest.approx(3 / 4, abs=0.03)
    assert float(levels[1::2].median()) == pytest.approx(15 / 16, abs=0.01)


def test_text_encoder_tells_the_two_colours_apart() -> None:
    tokenizer = make_tokenizer()
    encoder = make_text_encoder(len(tokenizer))
    captions = [
        "a red circle moving up on a blue background",
        "a blue circle moving up on a red background",
    ]
    ids, mask = tokenize(tokenizer, captions)
    with torch.no_grad():
        states = encoder(ids, mask).last_hidden_state
    assert (states[0, 1] - states[1, 7]).norm() > 0.3 * states[0, 1].norm()
