"""Calls of video models whose arguments contradict one another, and sizes of video models."""

from types import SimpleNamespace
from typing import Any

import pytest
import stock
import tiny_video_models as tiny
import torch
from tiny_case import noise

import diffattn
from diffattn import TokenGrid
from diffattn.models import family_of, pipeline_grid, size_rules


def grid_of(name: str, **changes: Any) -> TokenGrid:
    """The grid of a call of a case's model with the inputs of the case, but for some."""
    case = tiny.CASES[name]
    model = case.build()
    return family_of(model).grid(model, (), case.inputs() | changes)


# --- frames of the past


@pytest.mark.parametrize(
    ("name", "latents", "indices"),
    [
        ("framepack", "latents_history_4x", "indices_latents_history_4x"),
        ("framepack", "latents_clean", "indices_latents_clean"),
        ("helios", "latents_history_mid", "indices_latents_history_mid"),
    ],
)
def test_frames_of_the_past_without_a_number(name: str, latents: str, indices: str) -> None:
    frames = tiny.CASES[name].inputs()[latents].shape[2]
    numbers = torch.arange(frames + 1)
    message = f"{latents} has {frames} frames, but {indices} has the numbers of {frames + 1}"
    with pytest.raises(ValueError, match=message):
        grid_of(name, **{indices: numbers if name == "framepack" else numbers[None]})


def test_no_past() -> None:
    """The first chunk of Helios has no history."""
    nothing = {n: None for n in tiny.helios_inputs() if "history" in n}
    assert grid_of("helios", **nothing) == TokenGrid(3, 5, 6)
    one_less = grid_of("helios", latents_history_long=None, indices_latents_history_long=None)
    assert [r.start for r in one_less.references] == [0, 9]
    assert one_less.text_before == 69


def test_positional_arguments_of_a_past() -> None:
    for name in ("framepack", "helios"):
        case = tiny.CASES[name]
        model, inputs = case.build(), case.inputs()
        attachment = diffattn.set_attn_processor(model, stock.NEARBY)
        names = list(inputs)
        if name == "framepack":
            names.insert(7, "guidance")
        with torch.no_grad():
            model(*(inputs.get(n) for n in names), return_dict=False)
        assert attachment.sparse_calls == len(case.sites)
        grid = diffattn.attach.attached_to(model)
        assert grid is not None
        assert grid.grid == case.grids[0]


@pytest.mark.parametrize(
    ("name", "reason"), [("framepack", "makes its video in sections"), ("helios", "in chunks")]
)
def test_sizes_that_only_a_call_knows(name: str, reason: str) -> None:
    pipe = SimpleNamespace(transformer=tiny.CASES[name].build())
    with pytest.raises(ValueError, match=f"{reason}.*the grid is only known in the call"):
        pipeline_grid(pipe, 480, 832, 81)


# --- Kandinsky 6


def test_a_picture_has_no_frame_beside_it() -> None:
    inputs = {"hidden_states": noise(2, 1, 8, 12, 9)}
    types = torch.zeros(2, 1, dtype=torch.long)
    assert grid_of("kandinsky-6", **inputs, visual_token_type_ids=types) == TokenGrid(1, 4, 6)


# --- MiniMax-H3


def test_minimax_h3_at_full_size() -> None:
    """The layout of 480 x 832 pixels and 124 frames: 200 of text, key frames, sound, video."""
    ids, _, video, *_ = tiny.key_frame_layout(
        text_token_tags=torch.ones(200, dtype=torch.long),
        num_latent_frames=37,
        latent_height=30,
        latent_width=52,
        num_audio_latents=207,
    )
    grid = grid_of("minimax-h3-key-frames", position_ids=ids, video_indices=video)
    assert grid.tokens == 15824
    assert (grid.frames, grid.height, grid.width) == (37, 15, 26)
    assert grid.text_before == 200 + 2 * 15 * 26 + 2 * 207
    (keys,) = grid.references
    assert (keys.start, keys.frames) == (200, 2)
    assert keys.times == (0.0, 36.0)


def test_minimax_h3_without_key_frames() -> None:
    ids, _, video, *_ = tiny.key_frame_layout(keyframe_anchors=())
    grid = grid_of("minimax-h3-key-frames", position_ids=ids, video_indices=video)
    assert grid == TokenGrid(3, 4, 6, 7 + 10)


def test_minimax_h3_longer_text_keeps_the_times_of_key_frames() -> None:
    grids = []
    for text in (7, 1001):
        ids, _, video, *_ = tiny.key_frame_layout(
            text_token_tags=torch.ones(text, dtype=torch.long), num_latent_frames=22
        )
        grids.append(grid_of("minimax-h3-key-frames", position_ids=ids, video_indices=video))
    assert grids[0].references[0].times == grids[1].references[0].times == (0.0, 21.0)


def test_minimax_h3_ids_that_contradict_the_indices() -> None:
    inputs = tiny.CASES["minimax-h3-key-frames"].inputs()
    zeros = torch.zeros_like(inputs["position_ids"])
    message = "position_ids of MiniMaxH3.* contradict its video_indices: the last 72 video tokens"
    with pytest.raises(ValueError, match=message):
        grid_of("minimax-h3-key-frames", position_ids=zeros)
    shuffled = inputs["position_ids"].clone()
    shuffled[-72:] = shuffled[-72:].flip(0)
    with pytest.raises(ValueError, match="position_ids of MiniMaxH3"):
        grid_of("minimax-h3-key-frames", position_ids=shuffled)


def test_minimax_h3_with_tokens_after_the_video() -> None:
    inputs = tiny.CASES["minimax-h3-key-frames"].inputs()
    longer = torch.cat([inputs["position_ids"], torch.full((3, 3), 99.0)])
    with pytest.raises(ValueError, match="3 tokens after the last video token"):
        grid_of("minimax-h3-key-frames", position_ids=longer)


def test_sizes_of_minimax_h3() -> None:
    pipe = SimpleNamespace(
        transformer=tiny.minimax_h3(), canvas_multiple=32, vae_frames_per_chunk=17,
        vae_latents_per_chunk=5, fps=24, min_duration=5.0, max_duration=15.0,
    )  # fmt: skip
    assert pipeline_grid(pipe, 480, 832, 124) == TokenGrid(37, 15, 26)
    assert pipeline_grid(pipe, 768, 1344, 345) == TokenGrid(102, 24, 42)
    for frames, message in ((120, "try 124"), (362, "try 345"), (200, "try 192 or 209")):
        with pytest.raises(ValueError, match=f"num_frames is {frames}, .*{message}"):
            pipeline_grid(pipe, 480, 832, frames)
    with pytest.raises(ValueError, match="width is 840, but this model needs a multiple of 32"):
        pipeline_grid(pipe, 480, 840, 124)


# --- sizes


def pipeline(model: torch.nn.Module, **factors: int) -> Any:
    return SimpleNamespace(
        transformer=model, vae_scale_factor_spatial=8, vae_scale_factor_temporal=4, **factors
    )


def test_sizes_of_kandinsky6() -> None:
    pipe = pipeline(tiny.kandinsky6())
    assert pipeline_grid(pipe, 512, 768, 121) == TokenGrid(31, 32, 48)
    with pytest.raises(ValueError, match="height is 520, but this model needs a multiple of 16"):
        pipeline_grid(pipe, 520, 768, 121)
    with pytest.raises(ValueError, match="at most 509"):
        pipeline_grid(pipe, 512, 768, 517)


def test_sizes_of_cosmos() -> None:
    learned = pipeline(tiny.cosmos(max_size=(24, 80, 88), extra_pos_embed_type="learnable"))
    assert pipeline_grid(learned, 640, 640, 93) == TokenGrid(24, 40, 40)
    with pytest.raises(ValueError, match=r"num_frames is 97, .* 24 \(max_size of its transformer"):
        pipeline_grid(learned, 640, 640, 97)
    with pytest.raises(ValueError, match=r"width is 656, .* positions for 40"):
        pipeline_grid(learned, 640, 656, 93)
    rotary = pipeline(tiny.cosmos(max_size=(24, 80, 88)))
    assert pipeline_grid(rotary, 704, 704, 173) == TokenGrid(44, 44, 44)


def test_sizes_of_motif_video() -> None:
    patches = {"transformer_spatial_patch_size": 2, "transformer_temporal_patch_size": 1}
    rules = size_rules(pipeline(tiny.motif_video(), **patches))
    assert rules.grid(736, 1280, 121) == TokenGrid(31, 46, 80)
