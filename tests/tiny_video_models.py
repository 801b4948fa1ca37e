"""Tiny video models whose sequences hold more than text and a video, and Cosmos."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from tiny_case import BATCH, Case, make, names, noise, valid_text

from diffattn import TokenGrid
from diffattn.grid import Reference

_BOTH = names(("transformer_blocks.{}.attn", 2), ("single_transformer_blocks.{}.attn", 2))

# --- FramePack and Helios: coarser tokens for older frames, before the video

# The oldest frames fill their tokens along no axis: 6 of 8 frames, 10 of 16 rows.
_PAST = {"oldest": (6, 10, 12), "older": (2, 10, 12), "recent": (2, 10, 12)}


def framepack() -> torch.nn.Module:
    return make(
        "HunyuanVideoFramepackTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=False,
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )


def framepack_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 3, 10, 12),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_attention_mask": valid_text(7, 7, 4),
        "pooled_projections": noise(BATCH, 8, seed=2),
        "image_embeds": noise(BATCH, 3, 8, seed=3),
        # The pipeline makes a video from its end: later frames are known.
        "indices_latents": torch.arange(3, 6),
        "latents_clean": noise(BATCH, 4, *_PAST["recent"], seed=4),
        "indices_latents_clean": torch.tensor([0, 6]),
        "latents_history_2x": noise(BATCH, 4, *_PAST["older"], seed=5),
        "indices_latents_history_2x": torch.arange(7, 9),
        "latents_history_4x": noise(BATCH, 4, *_PAST["oldest"], seed=6),
        "indices_latents_history_4x": torch.arange(9, 15),
    }


_FRAMEPACK_TIMES = ((7.5, 10.75), (4.5,), (-3.0, 3.0))


def behind(times: tuple[tuple[float, ...], ...]) -> TokenGrid:
    """A video of 3 x 5 x 6 tokens behind frames of the past of `_PAST`."""
    references = (
        Reference(0, 2, 2, 2, times=times[0]),
        Reference(8, 1, 3, 3, times=times[1]),
        Reference(17, 2, 5, 6, times=times[2]),
    )
    return TokenGrid(3, 5, 6, text_before=77, references=references)


_STEPS = ((4, 8, 8), (2, 4, 4), (1, 2, 2))


def _past_pixel(*arguments: str) -> Any:
    def pixel(n: int, t: int, h: int, w: int) -> tuple[str, tuple[int, ...]]:
        frames, height, width = _STEPS[n]
        return arguments[n], (0, 1, frames * t, height * h, width * w)

    return pixel


CASES: dict[str, Case] = {
    "framepack": Case(
        build=framepack,
        inputs=framepack_inputs,
        grids=(behind(_FRAMEPACK_TIMES),),
        sites=_BOTH,
        # Tokens of the image encoder stand before the text.
        text=("after", 10),
        pixel=lambda t, h, w: (0, 1, t, 2 * h + 1, 2 * w),
        reference_pixel=_past_pixel("latents_history_4x", "latents_history_2x", "latents_clean"),
    )
}


def helios(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_dim": (4, 6, 6),
        "is_amplify_history": True,
    }
    return make("HeliosTransformer3DModel", **(config | changes))


def helios_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 3, 10, 12),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "indices_hidden_states": torch.arange(10, 13)[None],
        "indices_latents_history_short": torch.tensor([[0, 9]]),
        "indices_latents_history_mid": torch.arange(7, 9)[None],
        "indices_latents_history_long": torch.arange(1, 7)[None],
        "latents_history_short": noise(BATCH, 4, *_PAST["recent"], seed=4),
        "latents_history_mid": noise(BATCH, 4, *_PAST["older"], seed=5),
        "latents_history_long": noise(BATCH, 4, *_PAST["oldest"], seed=6),
    }


CASES["helios"] = Case(
    build=helios,
    inputs=helios_inputs,
    grids=(behind(((-7.5, -4.25), (-2.5,), (-10.0, -1.0))),),
    sites=names(("blocks.{}.attn1", 2)),
    pixel=lambda t, h, w: (0, 1, t, 2 * h + 1, 2 * w),
    reference_pixel=_past_pixel(
        "latents_history_long", "latents_history_mid", "latents_history_short"
    ),
)

# --- Kandinsky 6


def kandinsky6(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 8,
        "time_dim": 8,
        "model_dim": 32,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "visual_cond": True,
        "in_audio_dim": 5,
        "out_audio_dim": 5,
        "visual_token_type_num_embeddings": 2,
    }
    return make("Kandinsky6Transformer3DModel", **(config | changes))


def _kandinsky6_inputs(frames: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, frames, 8, 12, 9),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "pooled_projections": noise(BATCH, 8, seed=2),
        "timestep": torch.tensor([900.0, 400.0]),
        "audio_hidden_states": noise(BATCH, 5, 5, seed=3),
    }


def kandinsky6_inputs() -> dict[str, Any]:
    """Image to video: the first frame, clean, after the last."""
    return _kandinsky6_inputs(4) | {
        "visual_rope_pos": (torch.tensor([0, 1, 2, 0]), torch.arange(4), torch.arange(6)),
        "visual_token_type_ids": torch.tensor([[0, 0, 0, 1]]).expand(BATCH, -1),
    }


_KANDINSKY6: dict[str, Any] = {
    "build": kandinsky6,
    "sites": names(("visual_transformer_blocks.{}.video_dec_block.self_attention", 2)),
    "pixel": lambda t, h, w: (0, t, 2 * h + 1, 2 * w, 1),
}
CASES |= {
    "kandinsky-6": Case(
        inputs=lambda: _kandinsky6_inputs(3), grids=(TokenGrid(3, 4, 6),), **_KANDINSKY6
    ),
    "kandinsky-6-i2v": Case(
        inputs=kandinsky6_inputs,
        grids=(TokenGrid(3, 4, 6, 0, 24, references=(Reference(72, 1, 4, 6, times=(0.0,)),)),),
        reference_pixel=lambda n, t, h, w: ("hidden_states", (0, 3, 2 * h + 1, 2 * w, 1)),
        **_KANDINSKY6,
    ),
}

# --- Cosmos


def cosmos(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 5,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (8, 32, 32),
        "extra_pos_embed_type": None,
        # Needs torchvision.
        "concat_padding_mask": False,
    }
    return make("CosmosTransformer3DModel", **(config | changes))


def _cosmos_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 3, 8, 12),
        "timestep": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "condition_mask": torch.zeros(BATCH, 1, 3, 8, 12),
        "fps": 16,
    }


_COSMOS: dict[str, Any] = {
    "grids": (TokenGrid(3, 4, 6),),
    "sites": names(("transformer_blocks.{}.attn1", 2)),
    "pixel": lambda t, h, w: (0, 1, t, 2 * h + 1, 2 * w),
}
CASES |= {
    "cosmos-2": Case(build=cosmos, inputs=_cosmos_inputs, **_COSMOS),
    # Predict 1 has a position embedding that is learned; 2.5 sees pictures in cross-attention.
    "cosmos-1": Case(
        build=lambda: cosmos(in_channels=4, extra_pos_embed_type="learnable"),
        inputs=lambda: _cosmos_inputs() | {"condition_mask": None},
        **_COSMOS,
    ),
    "cosmos-2.5": Case(
        build=lambda: cosmos(
            img_context_dim_in=6, img_context_num_tokens=3, img_context_dim_out=32
        ),
        inputs=lambda: (
            _cosmos_inputs()
            | {"encoder_hidden_states": (noise(BATCH, 7, 16, seed=1), noise(BATCH, 3, 6, seed=2))}
        ),
        **_COSMOS,
    ),
}

# --- Motif-Video


def motif_video(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 3,
        "num_decoder_layers": 2,
        "text_embed_dim": 16,
        "image_embed_dim": 8,
        "rope_axes_dim": (4, 6, 6),
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    }
    return make("MotifVideoTransformer3DModel", **(config | changes))


def _motif_video_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 3, 8, 12),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 69, 16, seed=1),
        "encoder_attention_mask": valid_text(69, 69, 40),
        "image_embeds": noise(BATCH, 3, 8, seed=2),
    }


CASES["motif-video"] = Case(
    build=motif_video,
    inputs=_motif_video_inputs,
    grids=(TokenGrid(3, 4, 6),),
    sites=(
        "transformer_blocks.0.attn",
        *names(("single_transformer_blocks.{}.attn", 3)),
    ),
    # As many tokens of images and text as of the video, which the last blocks see in their place.
    text=("after", 72),
    pixel=lambda t, h, w: (0, 1, t, 2 * h + 1, 2 * w),
)

# --- MiniMax-H3


def minimax_h3(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "in_channels": 4,
        "audio_in_channels": 6,
        "text_dim": 16,
        "freq_dim": 16,
        "time_embed_hidden_dim": 16,
        "time_embed_dim": 8,
        "rope_freq_dim": 2,
    }
    return make("MiniMaxH3Transformer3DModel", **(config | changes))


_TEXT, _SOUND = 7, 5
_VIDEO: dict[str, Any] = {
    "num_latent_frames": 3,
    "latent_height": 8,
    "latent_width": 12,
    "num_audio_latents": _SOUND,
    "patch_size": (1, 2, 2),
    "audio_channels": 2,
    "audio_tag": 2,
    "video_tag": 0,
}


def _layout_steps() -> Any:
    return pytest.importorskip("diffusers.modular_pipelines.minimax_h3.before_denoise")


def _text_tags() -> torch.Tensor:
    tags = torch.ones(_TEXT, dtype=torch.long)
    tags[2:5] = 0  # what the text encoder sees of a picture counts as video
    return tags


def key_frame_layout(**changes: Any) -> tuple[Any, ...]:
    """The pipeline's layout of text, a first and a last key frame, sound, and the video."""
    build = _layout_steps().MiniMaxH3PrepareLayoutStep.build_packed_sequence
    given = {"text_token_tags": _text_tags(), "keyframe_anchors": ("first", "last")}
    return build(**(_VIDEO | given | changes))


def reference_layout() -> tuple[Any, ...]:
    """The pipeline's layout of text, a picture, sound, a video with sound, sound, and the video."""

    class Medium:
        def __init__(self, kind: str, has_audio: bool = False) -> None:
            self.kind, self.has_audio = kind, has_audio

    return _layout_steps().MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        _text_tags(),
        [Medium("image"), Medium("audio"), Medium("video", has_audio=True)],
        [torch.zeros(1, 4, 1, 6, 8), torch.zeros(1, 4, 2, 8, 8)],
        [torch.zeros(6, 6), torch.zeros(4, 6)],
        **_VIDEO,
    )


def _minimax_inputs(layout: tuple[Any, ...]) -> dict[str, Any]:
    ids, tags, video, audio, text = layout[:5]
    return {
        "hidden_states": noise(BATCH, len(video), 16),
        "audio_hidden_states": noise(BATCH, len(audio), 6, seed=1),
        "encoder_hidden_states": noise(BATCH, len(text), 16, seed=2),
        "timestep": torch.tensor([0.3, 0.9]),
        "timestep_indices": (torch.arange(len(ids)) >= len(ids) - 72).long(),
        "token_tags": tags,
        "position_ids": ids,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


_MINIMAX: dict[str, Any] = {"build": minimax_h3, "sites": names(("transformer_blocks.{}.attn", 2))}
CASES |= {
    "minimax-h3-key-frames": Case(
        inputs=lambda: _minimax_inputs(key_frame_layout()),
        grids=(
            TokenGrid(3, 4, 6, _TEXT + 58, references=(Reference(7, 2, 4, 6, times=(0.0, 2.0)),)),
        ),
        pixel=lambda t, h, w: (0, 48 + (t * 4 + h) * 6 + w, 1),
        reference_pixel=lambda n, t, h, w: ("hidden_states", (0, (t * 4 + h) * 6 + w, 1)),
        **_MINIMAX,
    ),
    "minimax-h3-references": Case(
        inputs=lambda: _minimax_inputs(reference_layout()),
        grids=(
            TokenGrid(
                3, 4, 6, _TEXT + 64, references=(Reference(7, 1, 3, 4), Reference(29, 2, 4, 4))
            ),
        ),
        pixel=lambda t, h, w: (0, 44 + (t * 4 + h) * 6 + w, 1),
        reference_pixel=lambda n, t, h, w: (
            "hidden_states",
            (0, h * 4 + w if n == 0 else 12 + (t * 4 + h) * 4 + w, 1),
        ),
        **_MINIMAX,
    ),
}

# --- LTX-Video with conditions, LTX-2 with key frames


def ltx_coordinates(*parts: tuple[int, int], height: int = 4, width: int = 6) -> torch.Tensor:
    """(batch, 3, tokens) of videos of latents, each with its number of frames and first frame."""
    pipe = diffusers.LTXConditionPipeline
    ids = [
        pipe._scale_video_ids(pipe._prepare_video_ids(BATCH, f, height, width), frame_index=at)
        for f, at in parts
    ]
    coords = torch.cat(ids, 2).float()
    coords[:, 0] /= 25
    return coords


def ltx_inputs(coords: torch.Tensor) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, coords.shape[2], 8),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        # Conditions are less noisy.
        "timestep": torch.linspace(100, 900, coords.shape[2]).expand(BATCH, -1),
        "encoder_attention_mask": valid_text(7, 7, 4),
        "video_coords": coords,
    }


_BY_COORDINATES = names(("transformer_blocks.{}.attn1", 2))
CASES["ltx-conditions"] = Case(
    build=lambda: make(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    ),
    # Frames of the video begin at 0, 1 and 9.
    inputs=lambda: ltx_inputs(ltx_coordinates((1, 5), (2, 2), (3, 0))),
    grids=(
        TokenGrid(
            3,
            4,
            6,
            72,
            references=(
                Reference(0, 1, 4, 6, times=(1.5,)),
                Reference(24, 2, 4, 6, times=(1.125, 1.25)),
            ),
        ),
    ),
    sites=_BY_COORDINATES,
    pixel=lambda t, h, w: (0, 72 + (t * 4 + h) * 6 + w),
    reference_pixel=lambda n, t, h, w: ("hidden_states", (0, 24 * n + (t * 4 + h) * 6 + w)),
)


def ltx2_coordinates(frames: int, height: int, width: int) -> torch.Tensor:
    """(batch, 3, tokens, 2) of a video of latents, by the model itself."""
    return (
        CASES["ltx-2-key-frames"]
        .build()
        .rope.prepare_video_coords(BATCH, frames, height, width, torch.device("cpu"), fps=24.0)
    )


def ltx2_key_frame(at: int, frames: int = 1, height: int = 4, width: int = 6) -> torch.Tensor:
    """(batch, 3, tokens, 2) of a key frame, or of a video, from frame `at` on, by the pipeline."""
    factors = SimpleNamespace(
        transformer_spatial_patch_size=1,
        transformer_temporal_patch_size=1,
        vae_temporal_compression_ratio=8,
        vae_spatial_compression_ratio=32,
    )
    coords = diffusers.LTX2ConditionPipeline._prepare_keyframe_coords(
        factors,
        keyframe_latent_num_frames=frames,
        keyframe_latent_height=height,
        keyframe_latent_width=width,
        pixel_frame_idx=at,
        num_pixel_frames=1 if frames == 1 else 8 * frames,
        fps=24.0,
        device=torch.device("cpu"),
    )
    return coords.expand(BATCH, -1, -1, -1)


def ltx2_reference(frames: int, height: int, width: int, factor: int) -> torch.Tensor:
    """(batch, 3, tokens, 2) of a reference video, smaller than the video by a factor."""
    coords = ltx2_coordinates(frames, height // factor, width // factor).clone()
    coords[:, 1:] *= factor
    return coords


def ltx2_inputs(*coords: torch.Tensor) -> dict[str, Any]:
    together = torch.cat(coords, 2)
    return ltx_inputs(together) | {
        "audio_hidden_states": noise(BATCH, 5, 4, seed=4),
        "audio_encoder_hidden_states": noise(BATCH, 7, 16, seed=5),
        "audio_encoder_attention_mask": valid_text(7, 7, 4),
        "audio_timestep": torch.tensor([900.0, 400.0]),
        "audio_num_frames": 5,
        "num_frames": 3,
        "height": 4,
        "width": 6,
    }


def _ltx2_inputs() -> dict[str, Any]:
    return ltx2_inputs(
        ltx2_coordinates(3, 4, 6), ltx2_key_frame(9), ltx2_reference(3, 4, 6, factor=2)
    )


CASES["ltx-2-key-frames"] = Case(
    build=lambda: make(
        "LTX2VideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    ),
    inputs=_ltx2_inputs,
    grids=(
        TokenGrid(
            3,
            4,
            6,
            0,
            42,
            references=(
                Reference(72, 1, 4, 6, times=(2.0,)),
                Reference(96, 3, 2, 3, aligned=False, times=(0.0, 1.0, 2.0)),
            ),
        ),
    ),
    sites=_BY_COORDINATES,
    pixel=lambda t, h, w: (0, (t * 4 + h) * 6 + w),
    reference_pixel=lambda n, t, h, w: (
        "hidden_states",
        (0, 72 + h * 6 + w if n == 0 else 96 + (t * 2 + h) * 3 + w),
    ),
)
