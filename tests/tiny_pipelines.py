"""Tiny pipelines over the models of tiny_families, built offline.

Prompts come encoded and latents are not decoded, so none has text encoders, and those that can do
without have no VAE: they then take the factors of the VAE that they are made for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import tiny_families as tiny
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

TEXT, WIDTH = 7, 16


@dataclass(frozen=True)
class PipelineCase:
    """A pipeline and a call of it.

    Attributes:
        build: makes the pipeline.
        inputs: what is particular to its call.
        size: height, width and number of frames, for a grid of 3 x 4 x 6 or 1 x 6 x 9 tokens.
        forwards: calls of the model in a step.
    """

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    size: tuple[int, int, int]
    forwards: int = 1

    def run(self, pipe: Any, steps: int = 2, size: tuple[int, int, int] | None = None) -> Any:
        """Latents of a short seeded call."""
        height, width, num_frames = size or self.size
        inputs = self.inputs() | {"height": height, "width": width}
        if "num_frames" in type(pipe).__call__.__annotations__:
            inputs["num_frames"] = num_frames
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            **inputs,
            num_inference_steps=steps,
            output_type="latent",
            generator=torch.Generator().manual_seed(3),
            return_dict=False,
        )[0]


def _pipeline(name: str, **parts: Any) -> Any:
    absent = ("vae", "text_encoder", "tokenizer", *(parts.pop("absent", ())))
    parts = dict.fromkeys(absent) | {"scheduler": FlowMatchEulerDiscreteScheduler()} | parts
    return getattr(diffusers, name)(**parts)


def _prompts(*lengths: int, mask: str | None = "prompt_attention_mask") -> dict[str, Any]:
    """Encoded prompts, the negative one too where a second length is given, with their masks."""
    out = {}
    for prefix, length in zip(("", "negative_"), lengths, strict=False):
        out[f"{prefix}prompt_embeds"] = tiny.noise(1, TEXT, WIDTH, seed=len(prefix))
        if mask is not None:
            out[prefix + mask] = tiny.valid_text(TEXT, length)
    return out


def _pooled(*names: str, width: int = 8) -> dict[str, torch.Tensor]:
    return {name: tiny.noise(1, width, seed=i) for i, name in enumerate(names)}


_SECOND = ("text_encoder_2", "tokenizer_2")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def _hunyuanvideo15() -> Any:
    vae = tiny.make(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
    )
    pipe = _pipeline(
        "HunyuanVideo15Pipeline",
        transformer=tiny.hunyuanvideo15(),
        vae=vae,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        absent=_SECOND,
    )
    # 729 tokens that stand for an image, all of them padding.
    pipe.vision_num_semantic_tokens = 3
    return pipe


def _flux2() -> Any:
    vae = tiny.make(
        "AutoencoderKLFlux2",
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    return _pipeline("Flux2KleinPipeline", transformer=tiny.flux2(), vae=vae)


def _glyphs() -> dict[str, torch.Tensor]:
    """What ByT5 makes of quoted text: none, in tests."""
    out = {}
    for prefix in ("", "negative_"):
        out[f"{prefix}prompt_embeds_2"] = tiny.noise(1, 4, 8, seed=5)
        out[f"{prefix}prompt_embeds_mask_2"] = tiny.valid_text(4, 0)
    return out


PIPELINES: dict[str, PipelineCase] = {
    "hunyuanvideo": PipelineCase(
        lambda: _pipeline("HunyuanVideoPipeline", transformer=tiny.hunyuanvideo(), absent=_SECOND),
        lambda: _prompts(5, 3) | _pooled(*_POOLED) | {"true_cfg_scale": 3.0},
        size=(64, 96, 9),
        forwards=2,
    ),
    "cogvideox-2b": PipelineCase(
        lambda: _pipeline(
            "CogVideoXPipeline",
            transformer=tiny.cogvideox(),
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        ),
        lambda: _prompts(TEXT, TEXT, mask=None),
        size=(64, 96, 9),
    ),
    "cogvideox-5b": PipelineCase(
        lambda: _pipeline(
            "CogVideoXPipeline",
            transformer=tiny.cogvideox(use_rotary_positional_embeddings=True),
            scheduler=diffusers.CogVideoXDPMScheduler(),
        ),
        lambda: _prompts(TEXT, TEXT, mask=None),
        size=(64, 96, 9),
    ),
    "cogvideox-1.5": PipelineCase(
        lambda: _pipeline(
            "CogVideoXPipeline",
            transformer=tiny.cogvideox(
                use_rotary_positional_embeddings=True,
                patch_size_t=2,
                patch_bias=False,
                sample_width=24,
            ),
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        ),
        lambda: _prompts(TEXT, TEXT, mask=None),
        size=(64, 96, 17),
    ),
    "ltx": PipelineCase(
        lambda: _pipeline("LTXPipeline", transformer=tiny.ltx()),
        lambda: _prompts(5, 3),
        size=(128, 192, 17),
    ),
    "flux": PipelineCase(
        lambda: _pipeline("FluxPipeline", transformer=tiny.flux(), absent=_SECOND),
        lambda: _prompts(TEXT, TEXT, mask=None) | _pooled(*_POOLED) | {"true_cfg_scale": 3.0},
        size=(96, 144, 1),
        forwards=2,
    ),
    "mochi": PipelineCase(
        lambda: _pipeline("MochiPipeline", transformer=tiny.mochi()),
        lambda: _prompts(5, 3),
        size=(64, 96, 13),
    ),
    "sd3": PipelineCase(
        lambda: _pipeline(
            "StableDiffusion3Pipeline",
            transformer=tiny.sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
            absent=(*_SECOND, "text_encoder_3", "tokenizer_3"),
        ),
        lambda: _prompts(TEXT, TEXT, mask=None) | _pooled(*_POOLED),
        size=(96, 144, 1),
    ),
    "sd1.5": PipelineCase(
        lambda: _pipeline(
            "StableDiffusionPipeline",
            unet=tiny.unet(),
            scheduler=DDIMScheduler(),
            absent=("safety_checker", "feature_extractor"),
            requires_safety_checker=False,
        ),
        lambda: _prompts(TEXT, TEXT, mask=None),
        size=(96, 128, 1),
    ),
    "sdxl": PipelineCase(
        lambda: _pipeline(
            "StableDiffusionXLPipeline",
            unet=tiny.sdxl_unet(),
            scheduler=DDIMScheduler(),
            absent=_SECOND,
        ),
        lambda: _prompts(TEXT, TEXT, mask=None) | _pooled(*_POOLED),
        size=(96, 128, 1),
    ),
    "qwen-image": PipelineCase(
        lambda: _pipeline("QwenImagePipeline", transformer=tiny.qwen_image()),
        lambda: _prompts(5, TEXT, mask="prompt_embeds_mask") | {"true_cfg_scale": 3.0},
        size=(96, 144, 1),
        forwards=2,
    ),
    "allegro": PipelineCase(
        lambda: _pipeline("AllegroPipeline", transformer=tiny.allegro(), scheduler=DDIMScheduler()),
        lambda: _prompts(5, 3) | {"negative_prompt": None},
        size=(64, 96, 12),
    ),
    "hunyuanvideo-1.5": PipelineCase(
        _hunyuanvideo15,
        lambda: _prompts(5, 3, mask="prompt_embeds_mask") | _glyphs(),
        size=(64, 96, 9),
        forwards=2,
    ),
    "flux.2": PipelineCase(
        _flux2,
        lambda: _prompts(TEXT, TEXT, mask=None) | {"guidance_scale": 3.0},
        size=(96, 144, 1),
        forwards=2,
    ),
    "skyreels-v2": PipelineCase(
        lambda: _pipeline(
            "SkyReelsV2Pipeline",
            transformer=tiny.wan_shaped("SkyReelsV2Transformer3DModel"),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True
            ),
        ),
        lambda: _prompts(TEXT, TEXT, mask=None),
        size=(64, 96, 9),
        forwards=2,
    ),
    "animatediff": PipelineCase(
        lambda: _pipeline(
            "AnimateDiffPipeline",
            unet=tiny.motion_unet(),
            scheduler=DDIMScheduler(),
            absent=("motion_adapter",),
        ),
        lambda: _prompts(TEXT, TEXT, mask=None),
        size=(96, 128, 3),
    ),
}
