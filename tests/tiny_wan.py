"""Tiny Wan models and pipelines with random weights, one per member of the family."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from transformers import BatchFeature, CLIPVisionConfig, CLIPVisionModel

LAYERS = 3
TEXT_DIM = 16
_CHANNELS = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": TEXT_DIM,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": LAYERS,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}


def transformer(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """A T2V denoiser of three blocks over 16 latent channels."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        **(_CHANNELS | {"in_channels": 16, "out_channels": 16} | changes)
    ).eval()


def vace_transformer() -> WanVACETransformer3DModel:
    torch.manual_seed(0)
    return WanVACETransformer3DModel(
        **_CHANNELS, in_channels=16, out_channels=16, vace_layers=[0, 2], vace_in_channels=96
    ).eval()


def vae(**changes: Any) -> AutoencoderKLWan:
    torch.manual_seed(0)
    shape = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    return AutoencoderKLWan(**(shape | changes)).eval()


def _embeds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "prompt_embeds": torch.randn(1, 6, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 6, TEXT_DIM, generator=generator),
    }


def _text_to_video(**changes: Any) -> WanPipeline:
    parts = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": transformer(),
    }
    return WanPipeline(**(parts | changes))


def _two_experts() -> WanPipeline:
    return _text_to_video(
        transformer_2=transformer(),
        boundary_ratio=0.9,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _ti2v() -> WanPipeline:
    big_vae = vae(
        z_dim=48,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    )
    return _text_to_video(
        transformer=transformer(in_channels=48, out_channels=48), vae=big_vae, expand_timesteps=True
    )


class ImageProcessor:
    """CLIP's processor without its dependency on torchvision."""

    def __call__(self, images: Image.Image, return_tensors: str) -> BatchFeature:
        small = np.asarray(images.resize((16, 16)), np.float32).transpose(2, 0, 1) / 255
        return BatchFeature({"pixel_values": torch.tensor(small)[None]})


def image_encoder() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            image_size=16, patch_size=8,
        )
    ).eval()  # fmt: skip


def _image_to_video() -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(in_channels=36, image_dim=8, added_kv_proj_dim=48),
        image_encoder=image_encoder(),
        image_processor=ImageProcessor(),
    )


def _vace() -> WanVACEPipeline:
    return WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=vace_transformer(),
    )


# A pipeline of each kind, and the inputs that are particular to it.
PIPELINES: dict[str, Callable[[], Any]] = {
    "t2v": _text_to_video,
    "two experts": _two_experts,
    "ti2v-5b": _ti2v,
    "i2v": _image_to_video,
    "vace": _vace,
}


def run(
    pipe: Any,
    height: int = 96,
    width: int = 64,
    num_frames: int = 9,
    steps: int = 2,
    **changes: Any,
) -> Any:
    """Latents of a short seeded call, with guidance unless told otherwise."""
    inputs: dict[str, Any] = _embeds()
    if isinstance(pipe, WanImageToVideoPipeline):
        # The text length is fixed there: image tokens are told apart by counting 512 from the end.
        inputs = {k: torch.nn.functional.pad(v, (0, 0, 0, 506)) for k, v in inputs.items()}
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        inputs["image"] = Image.fromarray(noise)
    pipe.set_progress_bar_config(disable=True)
    inputs |= {"guidance_scale": 3.0} | changes
    return pipe(
        **inputs,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).frames
