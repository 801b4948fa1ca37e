"""Calls of video models whose arguments contradict one another, and sizes of video models."""

from types import SimpleNamespace
from typing import Any

import pytest
import stock
import tiny_video_models as tiny
import torch
from tiny_case import noise
from tiny_pipelines import PIPELINES

import diffattn
from diffattn import TokenGrid
from diffattn.models import family_of, pipeline_grid, size_rules
from diffattn.planning.folder import denoiser_shape


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


def minimax_h3_pipeline() -> Any:
    blocks = pytest.importorskip("diffusers.modular_pipelines.minimax_h3.before_denoise")
    pipe = blocks.MiniMaxH3PrepareLayoutStep().init_pipeline()
    # The step itself needs no model.
    pipe.transformer = tiny.minimax_h3()
    return pipe


def test_sizes_of_minimax_h3() -> None:
    pipe = minimax_h3_pipeline()
    assert pipeline_grid(pipe, 480, 832, 124) == TokenGrid(37, 15, 26)
    assert pipeline_grid(pipe, 768, 1344, 345) == TokenGrid(102, 24, 42)
    for frames, message in ((120, "try 124"), (362, "try 345"), (200, "try 192 or 209")):
        with pytest.raises(ValueError, match=f"num_frames is {frames}, .*{message}"):
            pipeline_grid(pipe, 480, 832, frames)
    with pytest.raises(ValueError, match="width is 840, but this model needs a multiple of 32"):
        pipeline_grid(pipe, 480, 840, 124)


# --- LTX-Video and LTX-2


def test_sizes_decide_where_they_make_all_tokens() -> None:
    """Pipelines without conditions pass coordinates too; these are not read."""
    inputs = {"hidden_states": noise(2, 72, 8), "video_coords": noise(2, 3, 72, 2)}
    assert grid_of("ltx-2-key-frames", **inputs) == TokenGrid(3, 4, 6)
    sizes = {"num_frames": 3, "height": 4, "width": 6}
    inputs = {"hidden_states": noise(2, 72, 8), "video_coords": noise(2, 3, 72)}
    assert grid_of("ltx-conditions", **inputs, **sizes) == TokenGrid(3, 4, 6)


def test_coordinates_without_conditions() -> None:
    inputs = tiny.ltx_inputs(tiny.ltx_coordinates((5, 0)))
    assert grid_of("ltx-conditions", **inputs) == TokenGrid(5, 4, 6)


def test_a_long_video_has_its_target_first() -> None:
    """LTXI2VLongMultiPromptPipeline: the window, then what overlaps, guides and repels it."""
    long = pytest.importorskip("diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt")
    coords = long.build_video_coords_for_window(
        noise(2, 8, 11, 4, 6), overlap_len=3, guiding_len=2, negative_len=1, frame_rate=25,
        rope_interpolation_scale=(8, 32, 32),
    )  # fmt: skip
    sizes = {"num_frames": 1, "height": 1, "width": 1}
    grid = grid_of("ltx-conditions", **tiny.ltx_inputs(coords), **sizes)
    assert (grid.frames, grid.height, grid.width) == (5, 4, 6)
    assert (grid.text_before, grid.text_after) == (0, 6 * 24)
    # What guides follows what overlaps; the frame that repels is before the video.
    assert [(r.start, r.frames) for r in grid.references] == [(120, 5), (240, 1)]
    assert grid.references[0].times == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert grid.references[1].times[0] < 0


def test_a_reference_of_the_size_of_the_video() -> None:
    target = tiny.ltx2_coordinates(3, 4, 6)
    grid = grid_of("ltx-2-key-frames", **tiny.ltx2_inputs(target, target))
    assert (grid.text_before, grid.text_after) == (0, 72)
    assert [(r.start, r.frames, r.aligned) for r in grid.references] == [(72, 3, True)]


def test_memories_before_the_video() -> None:
    """Echo: as many pictures as the video has frames, each at a time of its own."""
    memories = [tiny.ltx2_coordinates(1, 4, 6).clone() for _ in range(3)]
    for slot, coords in enumerate(memories):
        coords[:, 0] += 100 + 10 * slot
    inputs = tiny.ltx2_inputs(*memories, tiny.ltx2_coordinates(3, 4, 6))
    grid = grid_of("ltx-2-key-frames", **inputs)
    assert (grid.text_before, grid.text_after) == (72, 0)
    assert [(r.start, r.frames) for r in grid.references] == [(0, 1), (24, 1), (48, 1)]


@pytest.mark.parametrize("at", [9, 16])
def test_a_key_frame_at_the_end_is_not_a_frame_more(at: int) -> None:
    """The last latent frame is of frames 9 to 16, whose mean time is before that of frame 16."""
    coords = torch.cat([tiny.ltx2_coordinates(3, 4, 6), tiny.ltx2_key_frame(at)], 2)
    grid = grid_of("ltx-2-key-frames", **tiny.ltx2_inputs(coords))
    assert (grid.frames, grid.references[0].frames) == (3, 1)
    assert grid.references[0].times == (2.0,)


def test_tiles_of_a_refined_video() -> None:
    """DFR: a rectangle of the video, and the parts of a key frame and a reference in it."""
    layout = pytest.importorskip("diffusers.pipelines.ltx2.dfr_layout")
    target = tiny.ltx2_coordinates(5, 8, 12)
    others = [tiny.ltx2_key_frame(9, height=8, width=12), tiny.ltx2_reference(5, 8, 12, factor=2)]
    coords = torch.cat([target, *others], 2)
    tiles = [
        layout.LTX2DFREpilogueTile(
            frames=slice(*t), heights=slice(*h), widths=slice(*w),
            blend_weight=torch.ones(t[1] - t[0], h[1] - h[0], w[1] - w[0]),
        )
        for t in ((0, 3), (2, 5)) for h in ((0, 5), (3, 8)) for w in ((0, 7), (5, 12))
    ]  # fmt: skip
    for tile in layout.video_tile_plan(tiles, coords, 5, 8, 12):
        inputs = tiny.ltx2_inputs(tile.coords) | dict.fromkeys(("num_frames", "height", "width"))
        grid = grid_of("ltx-2-key-frames", **inputs)
        assert (grid.frames, grid.height, grid.width) == (3, 5, 7)
        assert grid.tokens == len(tile.keep)
        assert sum(r.tokens for r in grid.references) == grid.tokens - 105


def test_sizes_without_coordinates() -> None:
    message = (
        r"has 80 tokens, but num_frames, height and width make 3x4x6 = 72, and no video_coords say"
    )
    with pytest.raises(ValueError, match=message):
        grid_of("ltx-2-key-frames", hidden_states=noise(2, 80, 8), video_coords=None)
    with pytest.raises(
        ValueError, match=r"has 144 tokens, .* are missing or 1, and no video_coords"
    ):
        grid_of("ltx-conditions", video_coords=None)


def test_coordinates_of_another_number_of_tokens() -> None:
    with pytest.raises(
        ValueError, match=r"has 80 tokens in hidden_states, but video_coords of 114"
    ):
        grid_of("ltx-2-key-frames", hidden_states=noise(2, 80, 8))


def test_coordinates_that_contradict_the_sizes() -> None:
    message = (
        "video_coords of LTX2.* do not place a video of 3x6x4, as num_frames, height and width say,"
        " from time 0 on, but 3x4x6 from 0 on, 1x4x6 from 0.375 on, 3x2x3 from 0 on"
    )
    with pytest.raises(ValueError, match=message):
        grid_of("ltx-2-key-frames", height=6, width=4)
    late = tiny.ltx_coordinates((1, 5), (3, 1))
    with pytest.raises(
        ValueError, match=r"do not place a video from time 0 on, but 1x4x6 from 0\.2"
    ):
        grid_of("ltx-conditions", **tiny.ltx_inputs(late))


def test_coordinates_that_are_no_rectangles() -> None:
    with pytest.raises(ValueError, match="video_coords of LTXVideoTransformer3DModel"):
        grid_of("ltx-conditions", video_coords=tiny.ltx_coordinates((6, 0)).flip(2))


def test_strengths_between_tokens() -> None:
    """IC-LoRA with conditioning_attention_strength below 1."""
    strengths = torch.full((2, 114, 114), 0.5)
    with pytest.raises(ValueError, match="conditioning_attention_strength=1 and no conditioning_"):
        grid_of("ltx-2-key-frames", video_self_attention_mask=strengths)


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


@pytest.mark.parametrize(
    "name",
    [
        "cosmos-1",
        "framepack",
        "helios",
        "kandinsky-6",
        "ltx-2-key-frames",
        "minimax-h3-references",
        "motif-video",
    ],
)
def test_plans_know_the_heads_of_a_model(name: str) -> None:
    """By the configuration, which names heads differently in each class."""
    case = tiny.CASES[name]
    model, recorder = case.build(), stock.Recording()
    diffattn.set_attn_processor(model, recorder)
    with torch.no_grad():
        model(**case.inputs())
    shape = denoiser_shape(model)
    assert (shape.heads, shape.head_dim) == tuple(recorder.calls[0][1].shape[2:])
    assert len(shape.block_of_site) == len(case.sites)


def test_plans_of_a_pipeline_know_its_sound() -> None:
    method = diffattn.DenseAttn()
    pipe = minimax_h3_pipeline()
    got = diffattn.plan(pipe, method, height=480, width=832, num_frames=124, text=200)
    assert got.tokens == 15044


# --- image to video in pipelines


def test_a_run_of_kandinsky6_with_a_picture() -> None:
    """The pipeline appends the picture's latents, and drops them afterwards."""
    pipe, case = PIPELINES["kandinsky-6"].build(), PIPELINES["kandinsky-6"]
    pipe.encode_image = lambda *args: noise(1, 8, 12, 4)
    image = {"image": torch.zeros(1, 3, 64, 96)}
    want = case.run(pipe, **image)
    recorder = stock.Recording()
    diffattn.set_attn_processor(pipe, recorder)
    torch.testing.assert_close(case.run(pipe, **image), want, atol=1e-5, rtol=1e-4)
    assert {site.grid for site, _ in recorder.calls} == set(tiny.CASES["kandinsky-6-i2v"].grids)
