"""Tiny models of pictures whose grid follows from shapes, for the tests of all families."""

import importlib
from typing import Any

import diffusers
import torch
from tiny_case import BATCH, Case, make, names, noise, valid_text

from diffattn import TokenGrid
from diffattn.grid import Reference

CASES: dict[str, Case] = {}

# --- Z-Image


def z_image(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 6, 6],
        "axes_lens": [256, 64, 64],
    }
    model = make("ZImageTransformer2DModel", **(config | changes))
    # diffusers 0.36 leaves these parameters uninitialised.
    for token in (model.x_pad_token, model.cap_pad_token):
        token.data = noise(*token.shape, seed=4)
    return model


def _in_one_tensor(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose samples come out in one tensor instead of a list."""
    model.register_forward_hook(lambda module, args, out: (torch.stack(out[0]), *out[1:]))
    return model


def _z_image_inputs() -> dict[str, Any]:
    return {
        "x": noise(BATCH, 4, 1, 12, 18),
        "t": torch.tensor([0.9, 0.4]),
        "cap_feats": [noise(7, 16, seed=1), noise(40, 16, seed=2)],
    }


CASES["z-image"] = Case(
    build=lambda: _in_one_tensor(z_image()),
    inputs=_z_image_inputs,
    # 54 tokens and 10 of padding; then the longer text and its padding
    grids=(TokenGrid(1, 6, 9, text_after=10),),
    sites=names(("layers.{}.attention", 2)),
    text=("after", 64),
    pixel=lambda t, h, w: (0, 1, 0, 2 * h + 1, 2 * w),
)


def _omni_inputs() -> dict[str, Any]:
    texts = [[noise(length, 16, seed=length) for length in (5, 40, 6)] for _ in range(BATCH)]
    # The model stands in for an absent picture by patches of 64 channels.
    pictures = [
        [noise(16, 1, 8, 12, seed=3 + i), None, noise(16, 1, 12, 18, seed=i)] for i in range(BATCH)
    ]
    return {
        "x": pictures,
        "t": torch.tensor([0.9, 0.4]),
        "cap_feats": texts,
        "siglip_feats": [[noise(3, 4, 8), None, None]] * BATCH,
        "image_noise_mask": [[0, 0, 1]] * BATCH,
    }


CASES["z-image-omni"] = Case(
    build=lambda: _in_one_tensor(z_image(in_channels=16, siglip_feat_dim=8)),
    inputs=_omni_inputs,
    # texts of 32 + 64 + 32; pictures of 24 + 8, 0 + 32 and 54 + 10; SigLIP of 12 + 20, 32 and 32
    grids=(TokenGrid(1, 6, 9, 128 + 32 + 32, 10, references=(Reference(128, 1, 4, 6),)),),
    sites=names(("layers.{}.attention", 2)),
    text=("after", 3 * 32),
    pixel=lambda t, h, w: (0, 2, 1, 0, 2 * h + 1, 2 * w),
    reference_pixel=lambda n, t, h, w: ("x", (0, n, 1, 0, 2 * h + 1, 2 * w)),
)

# --- HunyuanImage 2.1 and its refiner


def hunyuan_image(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": (1, 1),
        "text_embed_dim": 16,
        "text_embed_2_dim": 8,
        "rope_axes_dim": (8, 8),
    }
    return make("HunyuanImageTransformer2DModel", **(config | changes))


def hunyuan_image_refiner() -> torch.nn.Module:
    return hunyuan_image(
        patch_size=(1, 2, 2), text_embed_2_dim=None, rope_axes_dim=(4, 6, 6), guidance_embeds=True
    )


def _hunyuan_image_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 6, 9),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_attention_mask": valid_text(7, 7, 4),
        "encoder_hidden_states_2": noise(BATCH, 3, 8, seed=2),
        "encoder_attention_mask_2": valid_text(3, 2, 3),
    }


def _refiner_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 1, 12, 18),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_attention_mask": valid_text(7, 7, 4),
        "guidance": torch.tensor([3250.0, 3250.0]),
    }


_HUNYUAN_IMAGE: dict[str, Any] = {
    "grids": (TokenGrid(1, 6, 9),),
    "sites": names(("transformer_blocks.{}.attn", 2), ("single_transformer_blocks.{}.attn", 2)),
    # The class passes its checkpointing function keywords that the function does not take.
    "checkpoints": False,
}
CASES |= {
    "hunyuan-image": Case(
        build=hunyuan_image,
        inputs=_hunyuan_image_inputs,
        text=("after", 7 + 3),
        pixel=lambda t, h, w: (0, 1, h, w),
        **_HUNYUAN_IMAGE,
    ),
    "hunyuan-image-refiner": Case(
        build=hunyuan_image_refiner,
        inputs=_refiner_inputs,
        text=("after", 7),
        pixel=lambda t, h, w: (0, 1, 0, 2 * h + 1, 2 * w),
        **_HUNYUAN_IMAGE,
    ),
}

# --- ERNIE-Image


def ernie_image() -> torch.nn.Module:
    return make(
        "ErnieImageTransformer2DModel",
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=8,
        out_channels=8,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )


CASES["ernie-image"] = Case(
    build=ernie_image,
    inputs=lambda: {
        "hidden_states": noise(BATCH, 8, 6, 9),
        "timestep": torch.tensor([900.0, 400.0]),
        "text_bth": noise(BATCH, 7, 16, seed=1),
        "text_lens": torch.tensor([7, 4]),
    },
    grids=(TokenGrid(1, 6, 9),),
    sites=names(("layers.{}.self_attention", 2)),
    text=("after", 7),
    pixel=lambda t, h, w: (0, 1, h, w),
)

# --- GLM-Image


def glm_image() -> torch.nn.Module:
    return make(
        "GlmImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=64,
    )


def glm_inputs(height: int = 6, width: int = 9, text: int = 7) -> dict[str, Any]:
    """The arguments of a call over so many tokens."""
    tokens = height * width
    return {
        "hidden_states": noise(BATCH, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(BATCH, text, 16, seed=1),
        "prior_token_id": torch.arange(tokens).expand(BATCH, -1),
        "prior_token_drop": torch.zeros(BATCH, tokens, dtype=torch.bool),
        "timestep": torch.tensor([900, 400]),
        "target_size": torch.tensor([[16.0 * height, 16.0 * width]]).expand(BATCH, -1),
        "crop_coords": torch.zeros(BATCH, 2),
    }


CASES["glm-image"] = Case(
    build=glm_image,
    inputs=glm_inputs,
    grids=(TokenGrid(1, 6, 9),),
    sites=names(("transformer_blocks.{}.attn1", 2)),
    text=("before", 7),
    pixel=lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
)

# --- PixArt and Latte


def _pixart_shaped(name: str, **changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 32,
        "sample_size": 12,
        "patch_size": 2,
        "norm_type": "ada_norm_single",
        "caption_channels": 16,
    }
    return make(name, **(config | changes))


def pixart() -> torch.nn.Module:
    return _pixart_shaped("PixArtTransformer2DModel", use_additional_conditions=False)


def latte() -> torch.nn.Module:
    return _pixart_shaped(
        "LatteTransformer3DModel",
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        video_length=3,
    )


def _pixart_inputs(*frames: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, *frames, 12, 18),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
    }


_PIXART: dict[str, Any] = {
    "grids": (TokenGrid(1, 6, 9),),
    "sites": names(("transformer_blocks.{}.attn1", 2)),
}
CASES |= {
    "pixart": Case(
        build=pixart,
        inputs=lambda: (
            _pixart_inputs() | {"added_cond_kwargs": dict.fromkeys(("resolution", "aspect_ratio"))}
        ),
        pixel=lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
        **_PIXART,
    ),
    "latte": Case(
        build=latte,
        inputs=lambda: _pixart_inputs(3),
        # Of the frames, each a sample of the batch, the first.
        pixel=lambda t, h, w: (0, 1, 0, 2 * h + 1, 2 * w),
        **_PIXART,
    ),
}

# --- JoyImage Edit and Edit Plus


def joyimage(name: str = "JoyImageEditTransformer3DModel") -> torch.nn.Module:
    return make(
        name,
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )


def joyimage_plus() -> torch.nn.Module:
    return joyimage("JoyImageEditPlusTransformer3DModel")


_JOYIMAGE: dict[str, Any] = {"sites": names(("double_blocks.{}.attn", 2)), "text": ("after", 7)}
CASES |= {
    "joyimage-edit": Case(
        build=joyimage,
        inputs=lambda: {
            "hidden_states": noise(BATCH, 3, 4, 1, 12, 18),
            "timestep": torch.tensor([900.0, 400.0]),
            "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        },
        # The last picture of the three is denoised, and comes first.
        grids=(
            TokenGrid(
                1, 6, 9, 0, 108, references=(Reference(54, 1, 6, 9), Reference(108, 1, 6, 9))
            ),
        ),
        pixel=lambda t, h, w: (0, 2, 1, 0, 2 * h + 1, 2 * w),
        reference_pixel=lambda n, t, h, w: ("hidden_states", (0, n, 1, 0, 2 * h + 1, 2 * w)),
        **_JOYIMAGE,
    ),
    "joyimage-edit-plus": Case(
        build=joyimage_plus,
        inputs=lambda: {
            # 54 patches of the picture, 20 and 12 of the references, and 3 of padding
            "hidden_states": noise(BATCH, 54 + 20 + 12 + 3, 4, 1, 2, 2),
            "timestep": torch.tensor([900.0, 400.0]),
            "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
            "encoder_hidden_states_mask": valid_text(7, 7, 4).float(),
            "shape_list": [[(1, 6, 9), (1, 4, 5), (1, 3, 4)]] * BATCH,
        },
        grids=(
            TokenGrid(1, 6, 9, 0, 35, references=(Reference(54, 1, 4, 5), Reference(74, 1, 3, 4))),
        ),
        pixel=lambda t, h, w: (0, h * 9 + w),
        reference_pixel=lambda n, t, h, w: (
            "hidden_states",
            (0, 54 + (h * 5 + w, 20 + h * 4 + w)[n]),
        ),
        **_JOYIMAGE,
    ),
}

# --- PRX and Nucleus-Image, without queries of the text


def prx() -> torch.nn.Module:
    return make(
        "PRXTransformer2DModel",
        in_channels=4,
        patch_size=2,
        context_in_dim=16,
        hidden_size=32,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )


CASES["prx"] = Case(
    build=prx,
    inputs=lambda: {
        "hidden_states": noise(BATCH, 4, 12, 18),
        "timestep": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "attention_mask": valid_text(7, 7, 4),
    },
    grids=(TokenGrid(1, 6, 9),),
    sites=names(("blocks.{}.attention", 2)),
    text=("before", 7),
    pixel=lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
    queries=lambda queries, keys: (slice(keys - queries, keys),),
)


def nucleus_image() -> torch.nn.Module:
    return make(
        "NucleusMoEImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        moe_enabled=False,
    )


CASES["nucleus-image"] = Case(
    build=nucleus_image,
    inputs=lambda: {
        "hidden_states": noise(BATCH, 54, 16),
        "img_shapes": [(1, 6, 9)] * BATCH,
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_hidden_states_mask": valid_text(7, 7, 4).bool(),
        "timestep": torch.tensor([0.9, 0.4]),
    },
    grids=(TokenGrid(1, 6, 9),),
    sites=names(("transformer_blocks.{}.attn", 2)),
    text=("after", 7),
    pixel=lambda t, h, w: (0, h * 9 + w),
    queries=lambda queries, keys: (slice(0, queries),),
)

# --- HunyuanDiT


def hunyuandit() -> torch.nn.Module:
    return make(
        "HunyuanDiT2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=12,
        hidden_size=32,
        num_layers=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=7,
        text_len_t5=5,
        use_style_cond_and_image_meta_size=False,
    )


def _hunyuandit_inputs() -> dict[str, Any]:
    angle = noise(54, 8, seed=3).repeat_interleave(2, dim=1)
    return {
        "hidden_states": noise(BATCH, 4, 12, 18),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "text_embedding_mask": valid_text(7, 7, 4),
        "encoder_hidden_states_t5": noise(BATCH, 5, 16, seed=2),
        "text_embedding_mask_t5": valid_text(5, 2, 5),
        "image_rotary_emb": (angle.cos(), angle.sin()),
    }


CASES["hunyuandit"] = Case(
    build=hunyuandit,
    inputs=_hunyuandit_inputs,
    grids=(TokenGrid(1, 6, 9),),
    sites=names(("blocks.{}.attn1", 4)),
    pixel=lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
    checkpoints=False,
)

# --- HiDream


def hidream() -> torch.nn.Module:
    return make(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[16, 8],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 0, 1],
        force_inference_output=True,
    )


def _hidream_inputs(height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 2 * height, 2 * width),
        "timesteps": torch.tensor([900, 400]),
        "encoder_hidden_states_t5": noise(BATCH, 5, 16, seed=1),
        "encoder_hidden_states_llama3": noise(2, BATCH, 4, 8, seed=2),
        "pooled_embeds": noise(BATCH, 8, seed=3),
    }


_HIDREAM: dict[str, Any] = {
    "build": hidream,
    "sites": names(
        ("double_stream_blocks.{}.block.attn1", 2), ("single_stream_blocks.{}.block.attn1", 2)
    ),
    # T5, the last of Llama's layers, and the block's own
    "text": ("after", 5 + 4 + 4),
    "pixel": lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
}
CASES |= {
    "hidream": Case(inputs=lambda: _hidream_inputs(6, 6), grids=(TokenGrid(1, 6, 6),), **_HIDREAM),
    # Padded to 8 x 8 tokens.
    "hidream-wide": Case(
        inputs=lambda: _hidream_inputs(6, 9),
        grids=(TokenGrid(1, 6, 9, text_after=10),),
        **_HIDREAM,
    ),
}

# --- Lumina 2


def lumina2() -> torch.nn.Module:
    return make(
        "Lumina2Transformer2DModel",
        sample_size=18,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 24, 24),
        cap_feat_dim=16,
    )


CASES["lumina-2"] = Case(
    build=lumina2,
    inputs=lambda: {
        "hidden_states": noise(BATCH, 4, 12, 18),
        "timestep": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": noise(BATCH, 9, 16, seed=1),
        # The padding is left out of the sequence.
        "encoder_attention_mask": valid_text(9, 7, 7),
    },
    grids=(TokenGrid(1, 6, 9),),
    sites=("noise_refiner.0.attn", *names(("layers.{}.attn", 2))),
    text=("before", 7),
    pixel=lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
)

# --- CogView 4 and CogView 3 Plus


def _cogview(name: str, **changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "condition_dim": 8,
        "sample_size": 12,
        "pos_embed_max_size": 18,
    }
    return make(name, **(config | changes))


def cogview4() -> torch.nn.Module:
    return _cogview("CogView4Transformer2DModel", rope_axes_dim=(32, 32))


def cogview3plus() -> torch.nn.Module:
    return _cogview("CogView3PlusTransformer2DModel")


def _cogview_inputs() -> dict[str, Any]:
    size = torch.tensor([[96.0, 144.0]]).expand(BATCH, -1)
    return {
        "hidden_states": noise(BATCH, 4, 12, 18),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "timestep": torch.tensor([900, 400]),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(BATCH, 2),
    }


_COGVIEW: dict[str, Any] = {
    "inputs": _cogview_inputs,
    "grids": (TokenGrid(1, 6, 9),),
    "sites": names(("transformer_blocks.{}.attn1", 2)),
    "text": ("before", 7),
    "pixel": lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
}
CASES |= {
    "cogview-4": Case(build=cogview4, **_COGVIEW),
    "cogview-3-plus": Case(build=cogview3plus, **_COGVIEW),
}

# --- AuraFlow


def auraflow() -> torch.nn.Module:
    model = make(
        "AuraFlowTransformer2DModel",
        sample_size=18,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=18 * 18,
    )
    # Without biases, the gates of attention would be next to 0.
    for name, parameter in model.named_parameters():
        if "norm1" in name:
            parameter.data *= 10
    return model


CASES["auraflow"] = Case(
    build=auraflow,
    inputs=lambda: {
        "hidden_states": noise(BATCH, 4, 12, 18),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "timestep": torch.tensor([0.9, 0.4]),
    },
    grids=(TokenGrid(1, 6, 9),),
    sites=names(("joint_transformer_blocks.{}.attn", 2), ("single_transformer_blocks.{}.attn", 2)),
    # Registers come before the text.
    text=("before", 8 + 7),
    pixel=lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
)

# --- Ideogram 4


def ideogram4() -> torch.nn.Module:
    return make(
        "Ideogram4Transformer2DModel",
        in_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=16,
        mrope_section=(4, 2, 2),
    )


def ideogram4_inputs(*lengths: int, height: int = 6, width: int = 9) -> dict[str, Any]:
    """The arguments of a call with texts of these lengths, padded on the left to 7 tokens."""
    batch, tokens = len(lengths), 7 + height * width
    ids = torch.zeros(batch, tokens, 3, dtype=torch.long)
    places = torch.cartesian_prod(*map(torch.arange, (1, height, width)))
    segments = torch.full((batch, tokens), -1)
    roles = torch.zeros(batch, tokens, dtype=torch.long)
    for sample, length in enumerate(lengths):
        ids[sample, 7 - length : 7] = torch.arange(length)[:, None]
        ids[sample, 7:] = 65536 + places
        segments[sample, 7 - length :] = 1
        roles[sample, 7 - length : 7] = 3
        roles[sample, 7:] = 2
    return {
        "hidden_states": noise(batch, tokens, 8),
        "timestep": torch.tensor([0.9, 0.4])[:batch],
        "encoder_hidden_states": noise(batch, tokens, 16, seed=1),
        "position_ids": ids,
        "segment_ids": segments,
        "indicator": roles,
    }


def _image_alone(model: torch.nn.Module) -> torch.nn.Module:
    """A model without the output for text and padding, which nobody uses."""
    model.register_forward_hook(lambda module, args, out: (out[0][:, 7:], *out[1:]))
    return model


CASES["ideogram-4"] = Case(
    build=lambda: _image_alone(ideogram4()),
    inputs=lambda: ideogram4_inputs(4, 7),
    grids=(TokenGrid(1, 6, 9),),
    sites=names(("layers.{}.attention", 2)),
    text=("before", 7),
    pixel=lambda t, h, w: (0, 7 + h * 9 + w),
)

# --- U-Nets of videos, and of DreamLite and Kandinsky 3

_ATTENTIONS = "{}.attentions.{}.transformer_blocks.0.attn1"


def _video_unet(name: str, kind: str, **changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "sample_size": 12,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    }
    return make(name, **(config | changes))


def svd(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
        "num_attention_heads": 2,
        "num_frames": 3,
    }
    return _video_unet("UNetSpatioTemporalConditionModel", "SpatioTemporal", **(config | changes))


def unet_3d(name: str = "UNet3DConditionModel") -> torch.nn.Module:
    return _video_unet(name, "3D", attention_head_dim=8, norm_num_groups=8)


def _video_unet_case(blocks: tuple[tuple[str, int], ...], **parts: Any) -> Case:
    return Case(
        grids=(TokenGrid(1, 12, 18), TokenGrid(1, 6, 9)),
        sites=tuple(_ATTENTIONS.format(block, i) for block, count in blocks for i in range(count)),
        pixel=lambda t, h, w: (0, slice(None, 3), h, w),
        entry="down_blocks.0.attentions.0",
        checkpoints=False,
        **parts,
    )


_VIDEO_BLOCKS = (("down_blocks.0", 1), ("up_blocks.1", 2), ("mid_block", 1))
CASES |= {
    "svd": _video_unet_case(
        _VIDEO_BLOCKS,
        build=svd,
        inputs=lambda: {
            "sample": noise(BATCH, 3, 8, 12, 18),
            "timestep": torch.tensor([900, 400]),
            "encoder_hidden_states": noise(BATCH, 1, 16, seed=1),
            "added_time_ids": torch.ones(BATCH, 3),
        },
    ),
    "modelscope": _video_unet_case(
        _VIDEO_BLOCKS,
        build=unet_3d,
        inputs=lambda: {
            "sample": noise(BATCH, 4, 3, 12, 18),
            "timestep": torch.tensor([900, 400]),
            "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        },
    ),
    "i2vgen-xl": _video_unet_case(
        _VIDEO_BLOCKS,
        build=lambda: unet_3d("I2VGenXLUNet"),
        inputs=lambda: {
            "sample": noise(BATCH, 4, 3, 12, 18),
            "timestep": torch.tensor([900, 400]),
            "fps": torch.tensor([16, 16]),
            "image_latents": noise(BATCH, 4, 3, 12, 18, seed=2),
            "image_embeddings": noise(BATCH, 16, seed=3),
            "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        },
    ),
}


def dreamlite() -> torch.nn.Module:
    return make(
        "DreamLiteUNetModel",
        sample_size=12,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=(
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
    )


CASES["dreamlite"] = Case(
    build=dreamlite,
    inputs=lambda: {
        "sample": noise(BATCH, 4, 12, 18),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
    },
    grids=(TokenGrid(1, 6, 9),),
    sites=tuple(
        _ATTENTIONS.format(block, i)
        for block, count in (("down_blocks.1", 1), ("up_blocks.0", 2), ("mid_block", 1))
        for i in range(count)
    ),
    pixel=lambda t, h, w: (0, slice(None, 3), h, w),
    entry="down_blocks.1.attentions.0",
)


def kandinsky3() -> torch.nn.Module:
    return make(
        "Kandinsky3UNet",
        in_channels=4,
        time_embedding_dim=16,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16, 32, 64),
        cross_attention_dim=16,
        encoder_hid_dim=16,
    )


CASES["kandinsky-3"] = Case(
    build=kandinsky3,
    inputs=lambda: {
        "sample": noise(BATCH, 4, 24, 32),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_attention_mask": valid_text(7, 7, 4),
    },
    grids=(TokenGrid(1, 12, 16), TokenGrid(1, 6, 8), TokenGrid(1, 3, 4)),
    sites=(
        *(f"down_blocks.{i}.attentions.0.attention" for i in (1, 2, 3)),
        *(f"up_blocks.{i}.attentions.0.attention" for i in (0, 1, 2)),
    ),
    pixel=lambda t, h, w: (0, slice(None, 3), h, w),
    entry="down_blocks.1.attentions.0",
    checkpoints=False,
)

# --- DiT and Lumina-Next


def dit() -> torch.nn.Module:
    return make(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


CASES["dit"] = Case(
    build=dit,
    # The class unpatchifies squares alone.
    inputs=lambda: {
        "hidden_states": noise(BATCH, 4, 16, 16),
        "timestep": torch.tensor([900, 400]),
        "class_labels": torch.tensor([3, 7]),
    },
    grids=(TokenGrid(1, 8, 8),),
    sites=names(("transformer_blocks.{}.attn1", 2)),
    pixel=lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
)


def lumina_next() -> torch.nn.Module:
    return make(
        "LuminaNextDiT2DModel",
        sample_size=18,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
        learn_sigma=False,
    )


CASES["lumina-next"] = Case(
    build=lumina_next,
    inputs=lambda: {
        "hidden_states": noise(BATCH, 4, 12, 18),
        "timestep": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_mask": valid_text(7, 7, 4),
        "image_rotary_emb": torch.polar(torch.ones(16, 16, 8), noise(16, 16, 8, seed=2)),
        "cross_attention_kwargs": {},
    },
    grids=(TokenGrid(1, 6, 9),),
    sites=names(("layers.{}.attn1", 2)),
    pixel=lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
    checkpoints=False,
)

# --- Qwen-Image 2.1, whose cache has the keys of text and of a condition image


def qwen_image21() -> torch.nn.Module:
    return make(
        "QwenImage21Transformer2DModel",
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def _cached_inputs() -> dict[str, Any]:
    """A step after the first: text of 3, an image of 2 x 4, text of 2, and the target of 6 x 8.

    The mask marks a slot for each 2 x 2 tokens of an image.
    """
    module = importlib.import_module(diffusers.QwenImage21Transformer2DModel.__module__)
    cache = module.QwenImage21KVCache(2)
    for layer, kept in enumerate(cache.layer_caches):
        kept.store(*(noise(BATCH, 13, 2, 16, seed=2 * layer + i) for i in range(2)))
    return {
        "hidden_states": noise(BATCH, 8 + 48, 16),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_hidden_states_mask": torch.tensor([[1] * 7, [1, 1, 1, 1, 1, 1, 0]]),
        "timestep": torch.tensor([0.9]),
        "img_shapes": [[(1, 2, 4), (1, 6, 8)]] * BATCH,
        "img_mask": torch.tensor([[0, 0, 0, 1, 1, 0, 0] + [1] * 12] * BATCH).bool(),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
    }


CASES["qwen-image-2.1"] = Case(
    build=qwen_image21,
    inputs=_cached_inputs,
    grids=(TokenGrid(1, 6, 8),),
    sites=names(("transformer_blocks.{}.attn", 2)),
    text=("before", 3 + 8 + 2),
    pixel=lambda t, h, w: (0, 8 + h * 8 + w),
    queries=lambda queries, keys: (slice(keys - queries, keys),),
)
