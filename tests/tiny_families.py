"""Tiny models with random weights, one or more per family, and what a test has to know of them."""

import inspect
from typing import Any

import diffusers
import tiny_edit_models
import tiny_picture_models
import tiny_video_models
import torch
from tiny_case import BATCH, Case, make, names, noise, valid_text

from diffattn import TokenGrid

# --- HunyuanVideo


def hunyuanvideo(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }
    return make("HunyuanVideoTransformer3DModel", **(config | changes))


def _hunyuanvideo_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 3, 8, 12),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_attention_mask": valid_text(7, 7, 4),
        "pooled_projections": noise(BATCH, 8, seed=2),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


_HUNYUANVIDEO: dict[str, Any] = {
    "inputs": _hunyuanvideo_inputs,
    "grids": (TokenGrid(3, 4, 6),),
    "sites": names(("transformer_blocks.{}.attn", 2), ("single_transformer_blocks.{}.attn", 2)),
    "text": ("after", 7),
    "pixel": lambda t, h, w: (0, 1, t, 2 * h + 1, 2 * w),
}

CASES: dict[str, Case] = {
    "hunyuanvideo": Case(build=hunyuanvideo, **_HUNYUANVIDEO),
    "hunyuanvideo-i2v": Case(
        build=lambda: hunyuanvideo(image_condition_type="token_replace"), **_HUNYUANVIDEO
    ),
}


# --- CogVideoX


def cogvideox(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 9,
        "max_text_seq_length": 7,
    }
    return make("CogVideoXTransformer3DModel", **(config | changes))


def _cogvideox_inputs(frames: int, rope_tokens: int = 0) -> dict[str, Any]:
    inputs = {
        "hidden_states": noise(BATCH, frames, 4, 8, 12),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
    }
    if rope_tokens:
        angle = noise(rope_tokens, 8, seed=3).repeat_interleave(2, dim=1)
        inputs["image_rotary_emb"] = (angle.cos(), angle.sin())
    return inputs


def _cogvideox_case(frames: int, rope: bool, patch_t: int | None = None) -> Case:
    grid = TokenGrid(frames // (patch_t or 1), 4, 6)
    changes: dict[str, Any] = {"use_rotary_positional_embeddings": True} if rope else {}
    if patch_t is not None:
        changes |= {"patch_size_t": patch_t, "patch_bias": False}
    return Case(
        build=lambda: cogvideox(**changes),
        inputs=lambda: _cogvideox_inputs(frames, grid.tokens if rope else 0),
        grids=(grid,),
        sites=names(("transformer_blocks.{}.attn1", 2)),
        text=("before", 7),
        pixel=lambda t, h, w: (0, (patch_t or 1) * t, 1, 2 * h, 2 * w + 1),
    )


CASES |= {
    "cogvideox-2b": _cogvideox_case(3, rope=False),
    "cogvideox-5b": _cogvideox_case(3, rope=True),
    "cogvideox-1.5": _cogvideox_case(6, rope=True, patch_t=2),
}

# --- ConsisID


def consisid(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "max_text_seq_length": 7,
        "use_rotary_positional_embeddings": True,
        "is_train_face": True,
        "cross_attn_interval": 1,
        "cross_attn_dim_head": 8,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 6,
        "LFE_vit_dim": 8,
        "LFE_depth": 5,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 2,
        "LFE_num_querie": 3,
        "LFE_output_dim": 21,
        "LFE_ff_mult": 1,
        "LFE_num_scale": 5,
    }
    return make("ConsisIDTransformer3DModel", **(config | changes))


def face(batch: int) -> dict[str, Any]:
    """What ConsisID is told of a person."""
    return {
        "id_cond": noise(batch, 6, seed=4),
        "id_vit_hidden": [noise(batch, 5, 8, seed=5 + i) for i in range(5)],
    }


def _consisid_inputs() -> dict[str, Any]:
    return _cogvideox_inputs(3, rope_tokens=72) | face(BATCH)


CASES["consisid"] = Case(
    build=consisid,
    inputs=_consisid_inputs,
    grids=(TokenGrid(3, 4, 6),),
    sites=names(("transformer_blocks.{}.attn1", 2)),
    text=("before", 7),
    pixel=lambda t, h, w: (0, t, 1, 2 * h, 2 * w + 1),
)

# --- LTX-Video and LTX-2


def ltx() -> torch.nn.Module:
    return make(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )


def _ltx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 3 * 4 * 6, 8),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_attention_mask": valid_text(7, 7, 4),
        "num_frames": 3,
        "height": 4,
        "width": 6,
    }


CASES["ltx"] = Case(
    build=ltx,
    inputs=_ltx_inputs,
    grids=(TokenGrid(3, 4, 6),),
    sites=names(("transformer_blocks.{}.attn1", 2)),
    pixel=lambda t, h, w: (0, (t * 4 + h) * 6 + w),
)

# --- Flux and Flux.2


def flux() -> torch.nn.Module:
    return make(
        "FluxTransformer2DModel",
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


def image_ids(height: int, width: int) -> torch.Tensor:
    """(tokens, 3): image, row, column."""
    return torch.cartesian_prod(*map(torch.arange, (1, height, width))).float()


def _flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 6 * 9, 16),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "pooled_projections": noise(BATCH, 8, seed=2),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_ids": image_ids(6, 9),
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }


CASES["flux"] = Case(
    build=flux,
    inputs=_flux_inputs,
    grids=(TokenGrid(1, 6, 9),),
    sites=names(("transformer_blocks.{}.attn", 2), ("single_transformer_blocks.{}.attn", 2)),
    text=("before", 7),
    pixel=lambda t, h, w: (0, h * 9 + w),
)

# --- Mochi


def mochi() -> torch.nn.Module:
    return make(
        "MochiTransformer3DModel",
        in_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=7,
    )


def _mochi_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 3, 8, 12),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "timestep": torch.tensor([900, 400]),
        "encoder_attention_mask": valid_text(7, 7, 4).bool(),
    }


CASES["mochi"] = Case(
    build=mochi,
    inputs=_mochi_inputs,
    grids=(TokenGrid(3, 4, 6),),
    sites=names(("transformer_blocks.{}.attn1", 2)),
    text=("after", 7),
    pixel=lambda t, h, w: (0, 1, t, 2 * h + 1, 2 * w),
)

# --- Stable Diffusion 3 and 3.5


def sd3(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "sample_size": 12,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 18,
    }
    return make("SD3Transformer2DModel", **(config | changes))


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 12, 18),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "pooled_projections": noise(BATCH, 8, seed=2),
        "timestep": torch.tensor([900, 400]),
    }


_SD3: dict[str, Any] = {
    "inputs": _sd3_inputs,
    "grids": (TokenGrid(1, 6, 9),),
    "text": ("after", 7),
    "pixel": lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
}

CASES |= {
    "sd3": Case(build=sd3, sites=names(("transformer_blocks.{}.attn", 2)), **_SD3),
    "sd3.5": Case(
        build=lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
        sites=(
            "transformer_blocks.0.attn",
            "transformer_blocks.0.attn2",
            "transformer_blocks.1.attn",
        ),
        **_SD3,
    ),
}

# --- U-Nets


def unet(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "sample_size": 12,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return make("UNet2DConditionModel", **(config | changes))


def sdxl_unet() -> torch.nn.Module:
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 + 6 * 8,
    )


def _unet_inputs(**more: Any) -> dict[str, Any]:
    return {
        "sample": noise(BATCH, 4, 12, 16),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
    } | more


_XL_CONDITIONS = {
    "added_cond_kwargs": {"text_embeds": noise(BATCH, 8, seed=2), "time_ids": torch.ones(BATCH, 6)}
}
_ATTENTIONS = "{}.attentions.{}.transformer_blocks.{}.attn1"

CASES |= {
    "sd1.5": Case(
        build=unet,
        inputs=_unet_inputs,
        grids=(TokenGrid(1, 12, 16), TokenGrid(1, 6, 8)),
        sites=tuple(
            _ATTENTIONS.format(block, i, 0)
            for block, count in (
                ("down_blocks.0", 1),
                ("down_blocks.1", 1),
                ("up_blocks.0", 2),
                ("up_blocks.1", 2),
                ("mid_block", 1),
            )
            for i in range(count)
        ),
        pixel=lambda t, h, w: (0, slice(None, 3), h, w),
        entry="down_blocks.0.attentions.0",
    ),
    "sdxl": Case(
        build=sdxl_unet,
        inputs=lambda: _unet_inputs(**_XL_CONDITIONS),
        grids=(TokenGrid(1, 6, 8),),
        sites=tuple(
            _ATTENTIONS.format(block, i, layer)
            for block, count in (("down_blocks.1", 1), ("up_blocks.0", 2), ("mid_block", 1))
            for i in range(count)
            for layer in range(2)
        ),
        pixel=lambda t, h, w: (0, slice(None, 3), h, w),
        entry="down_blocks.1.attentions.0",
    ),
}

# --- Qwen-Image


def qwen_image() -> torch.nn.Module:
    return make(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def qwen_takes_lengths() -> bool:
    """Must the model be told how long texts are (older diffusers)? Newer reads the embeddings."""
    forward = diffusers.QwenImageTransformer2DModel.forward
    return "txt_seq_lens" in inspect.signature(forward).parameters


def _qwen_image_inputs(*lengths: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 6 * 9, 16),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_hidden_states_mask": valid_text(7, *lengths),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_shapes": [[(1, 6, 9)]] * BATCH,
    } | ({"txt_seq_lens": [7] * BATCH} if qwen_takes_lengths() else {})


_QWEN_IMAGE: dict[str, Any] = {
    "build": qwen_image,
    "grids": (TokenGrid(1, 6, 9),),
    "sites": names(("transformer_blocks.{}.attn", 2)),
    "text": ("before", 7),
    "pixel": lambda t, h, w: (0, h * 9 + w),
}
CASES |= {
    "qwen-image": Case(inputs=lambda: _qwen_image_inputs(7, 7), **_QWEN_IMAGE),
    "qwen-image-padded": Case(inputs=lambda: _qwen_image_inputs(7, 4), **_QWEN_IMAGE),
}

# --- Allegro


def allegro() -> torch.nn.Module:
    return make(
        "AllegroTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        caption_channels=16,
        sample_height=8,
        sample_width=12,
        sample_frames=3,
    )


def _allegro_inputs(masked: bool) -> dict[str, Any]:
    places = torch.cartesian_prod(*map(torch.arange, (3, 4, 6)))
    angles = noise(72, 8, seed=3)
    freqs = tuple((angles.cos(), angles.sin()) for _ in range(3))
    inputs = {
        "hidden_states": noise(BATCH, 4, 3, 8, 12),
        "encoder_hidden_states": noise(BATCH, 1, 7, 16, seed=1),
        "timestep": torch.tensor([900, 400]),
        "encoder_attention_mask": valid_text(7, 7, 4),
        "image_rotary_emb": (freqs, tuple(places.T[:, None])),
    }
    if masked:
        # Padding of a frame, as the model can have it where videos of two sizes are in a batch.
        inputs["attention_mask"] = torch.ones(BATCH, 3, 8, 12)
        inputs["attention_mask"][1, :, :, 8:] = 0
    return inputs


_ALLEGRO: dict[str, Any] = {
    "build": allegro,
    "grids": (TokenGrid(3, 4, 6),),
    "sites": names(("transformer_blocks.{}.attn1", 2)),
    "pixel": lambda t, h, w: (0, 1, t, 2 * h + 1, 2 * w),
}
CASES |= {
    "allegro": Case(inputs=lambda: _allegro_inputs(masked=False), **_ALLEGRO),
    "allegro-padded": Case(inputs=lambda: _allegro_inputs(masked=True), **_ALLEGRO),
}

# --- HunyuanVideo 1.5


def hunyuanvideo15() -> torch.nn.Module:
    return make(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 4, 4),
        target_size=64,
    )


def _hunyuanvideo15_inputs(image: bool) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 9, 3, 4, 6),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_attention_mask": valid_text(7, 7, 4),
        "encoder_hidden_states_2": noise(BATCH, 4, 8, seed=2),
        "encoder_attention_mask_2": valid_text(4, 1, 3),
        "image_embeds": noise(BATCH, 3, 8, seed=3) if image else torch.zeros(BATCH, 3, 8),
    }


_HUNYUANVIDEO15: dict[str, Any] = {
    "build": hunyuanvideo15,
    "grids": (TokenGrid(3, 4, 6),),
    "sites": names(("transformer_blocks.{}.attn", 2)),
    "text": ("after", 7 + 4 + 3),
    "pixel": lambda t, h, w: (0, 1, t, h, w),
}
CASES |= {
    "hunyuanvideo-1.5": Case(inputs=lambda: _hunyuanvideo15_inputs(image=False), **_HUNYUANVIDEO15),
    "hunyuanvideo-1.5-i2v": Case(
        inputs=lambda: _hunyuanvideo15_inputs(image=True), **_HUNYUANVIDEO15
    ),
}

# --- LTX-2


def ltx2(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return make("LTX2VideoTransformer3DModel", **(config | changes))


def _ltx2_inputs() -> dict[str, Any]:
    return _ltx_inputs() | {
        "audio_hidden_states": noise(BATCH, 5, 4, seed=4),
        "audio_encoder_hidden_states": noise(BATCH, 7, 16, seed=5),
        "audio_encoder_attention_mask": valid_text(7, 7, 4),
        "audio_num_frames": 5,
    }


_LTX2: dict[str, Any] = {
    "inputs": _ltx2_inputs,
    "grids": (TokenGrid(3, 4, 6),),
    "sites": names(("transformer_blocks.{}.attn1", 2)),
    "pixel": lambda t, h, w: (0, (t * 4 + h) * 6 + w),
}
CASES |= {
    "ltx-2": Case(build=ltx2, **_LTX2),
    "ltx-2.3": Case(
        build=lambda: ltx2(gated_attn=True, rope_type="split", perturbed_attn=True), **_LTX2
    ),
}

# --- Flux.2


def flux2() -> torch.nn.Module:
    return make(
        "Flux2Transformer2DModel",
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _flux2_inputs() -> dict[str, Any]:
    ids = torch.nn.functional.pad(image_ids(6, 9), (0, 1))
    return {
        "hidden_states": noise(BATCH, 6 * 9, 16),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_ids": ids.expand(BATCH, -1, -1),
        "txt_ids": torch.zeros(BATCH, 7, 4),
        "guidance": torch.tensor([3.5, 3.5]),
    }


CASES["flux.2"] = Case(
    build=flux2,
    inputs=_flux2_inputs,
    grids=(TokenGrid(1, 6, 9),),
    sites=names(("transformer_blocks.{}.attn", 2), ("single_transformer_blocks.{}.attn", 2)),
    text=("before", 7),
    pixel=lambda t, h, w: (0, h * 9 + w),
)

# --- Models with Wan's blocks


def wan_shaped(name: str, **changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return make(name, **(config | changes))


def wan_animate(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 12,
        "latent_channels": 4,
        "image_dim": 16,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }
    return wan_shaped("WanAnimateTransformer3DModel", **(config | changes))


def _wan_inputs(channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, channels, 3, 8, 12),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
    }


def _anyflow() -> torch.nn.Module:
    return wan_shaped("AnyFlowTransformer3DModel")


def _anyflow_inputs() -> dict[str, Any]:
    return _wan_inputs() | {
        "hidden_states": noise(BATCH, 3, 4, 8, 12),
        "timestep": torch.full((BATCH, 3), 900.0),
        "r_timestep": torch.full((BATCH, 3), 400.0),
    }


def _wan_animate_inputs() -> dict[str, Any]:
    return _wan_inputs(12) | {
        "encoder_hidden_states_image": noise(BATCH, 5, 16, seed=2),
        "pose_hidden_states": noise(BATCH, 4, 2, 8, 12, seed=3),
        "face_pixel_values": noise(BATCH, 3, 5, 16, 16, seed=4),
    }


_WAN: dict[str, Any] = {
    "grids": (TokenGrid(3, 4, 6),),
    "sites": names(("blocks.{}.attn1", 2)),
    "pixel": lambda t, h, w: (0, 1, t, 2 * h + 1, 2 * w),
}
CASES |= {
    "skyreels-v2": Case(
        build=lambda: wan_shaped("SkyReelsV2Transformer3DModel"), inputs=_wan_inputs, **_WAN
    ),
    "chronoedit": Case(
        build=lambda: wan_shaped("ChronoEditTransformer3DModel"), inputs=_wan_inputs, **_WAN
    ),
    "anyflow": Case(
        build=_anyflow,
        inputs=_anyflow_inputs,
        grids=_WAN["grids"],
        sites=_WAN["sites"],
        pixel=lambda t, h, w: (0, t, 1, 2 * h + 1, 2 * w),
    ),
    "wan-animate": Case(build=wan_animate, inputs=_wan_animate_inputs, **_WAN),
}

# --- AnimateDiff


def motion_unet() -> torch.nn.Module:
    return make(
        "UNetMotionModel",
        sample_size=12,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )


CASES["animatediff"] = Case(
    build=motion_unet,
    inputs=lambda: _unet_inputs(
        sample=noise(BATCH, 4, 3, 12, 16),
        encoder_hidden_states=noise(BATCH * 3, 7, 16, seed=1),
    ),
    grids=(TokenGrid(1, 12, 16), TokenGrid(1, 6, 8)),
    sites=tuple(
        _ATTENTIONS.format(block, i, 0)
        for block, count in (("down_blocks.0", 1), ("up_blocks.1", 2), ("mid_block", 1))
        for i in range(count)
    ),
    pixel=lambda t, h, w: (0, slice(None, 3), h, w),
    entry="down_blocks.0.attentions.0",
)

# --- Kandinsky 5


def kandinsky5(**changes: Any) -> torch.nn.Module:
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
    }
    return make("Kandinsky5Transformer3DModel", **(config | changes))


def _kandinsky5_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 3, 8, 12, 4),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "timestep": torch.tensor([900.0, 400.0]),
        "pooled_projections": noise(BATCH, 8, seed=2),
        "visual_rope_pos": [torch.arange(size) for size in (3, 4, 6)],
        "text_rope_pos": torch.arange(7),
    }


CASES["kandinsky-5"] = Case(
    build=kandinsky5,
    inputs=_kandinsky5_inputs,
    grids=(TokenGrid(3, 4, 6),),
    sites=names(("visual_transformer_blocks.{}.self_attention", 2)),
    pixel=lambda t, h, w: (0, t, 2 * h + 1, 2 * w, 1),
)

# --- EasyAnimate


def easyanimate() -> torch.nn.Module:
    return make(
        "EasyAnimateTransformer3DModel",
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
    )


def _easyanimate_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 3, 8, 12),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
    }


CASES["easyanimate"] = Case(
    build=easyanimate,
    inputs=_easyanimate_inputs,
    grids=(TokenGrid(3, 4, 6),),
    sites=names(("transformer_blocks.{}.attn1", 2)),
    text=("before", 7),
    pixel=lambda t, h, w: (0, 1, t, 2 * h + 1, 2 * w),
)

CASES |= tiny_picture_models.CASES
CASES |= tiny_video_models.CASES
CASES |= tiny_edit_models.CASES
