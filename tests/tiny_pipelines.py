"""Tiny pipelines over the models of tiny_families, built offline.

Prompts come encoded and latents are not decoded, so none has text encoders, and those that can do
without have no VAE: they then take the factors of the VAE that they are made for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_edit_models as edit
import tiny_families as tiny
import tiny_picture_models
import tiny_video_models as tiny_video
import tiny_wan
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

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

    def run(
        self,
        pipe: Any,
        steps: int = 2,
        size: tuple[int, int, int] | None = None,
        **changes: Any,
    ) -> Any:
        """Latents of a short seeded call."""
        height, width, num_frames = size or self.size
        inputs = self.inputs() | {"height": height, "width": width} | changes
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
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
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


def _ltx2() -> Any:
    transformer = tiny.ltx2()
    vae = tiny.make(
        "AutoencoderKLLTX2Video",
        latent_channels=8,
        block_out_channels=(4,),
        decoder_block_out_channels=(4,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = tiny.make(
        "AutoencoderKLLTX2Audio",
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    parts = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_learnable_registers=None,
        **{f"{kind}_connector_{k}": v for kind in ("video", "audio") for k, v in parts.items()},
    )
    return _pipeline(
        "LTX2Pipeline",
        transformer=transformer,
        vae=vae,
        audio_vae=audio_vae,
        connectors=connectors.eval(),
        absent=("vocoder",),
    )


def _bria() -> Any:
    vae = tiny.make(
        "AutoencoderKL",
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    return _pipeline(
        "BriaPipeline",
        transformer=edit.bria(),
        vae=vae,
        absent=("image_encoder", "feature_extractor"),
    )


def _prompts_by_layers(*lengths: int) -> dict[str, Any]:
    """Encoded prompts of Krea 2: of several layers of the text encoder."""
    out = _prompts(*lengths, mask="prompt_embeds_mask")
    masks = {name: value.bool() for name, value in out.items() if name.endswith("mask")}
    return masks | {
        name: torch.stack([value, value.flip(1)], 2)
        for name, value in out.items()
        if name.endswith("embeds")
    }


def picture(height: int = 64, width: int = 96, seed: int = 0) -> Image.Image:
    """An image of noise."""
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def _image_prompts(*lengths: int) -> dict[str, Any]:
    """Prompts of Wan's models with an image, which count 512 text tokens from the end."""
    prompts = _prompts(*lengths, mask=None)
    padding = (0, 0, 0, 512 - TEXT)
    return {name: torch.nn.functional.pad(x, padding) for name, x in prompts.items()}


def _chronoedit() -> Any:
    transformer = tiny.wan_shaped(
        "ChronoEditTransformer3DModel",
        in_channels=36,
        out_channels=16,
        image_dim=8,
        added_kv_proj_dim=48,
    )
    return _pipeline(
        "ChronoEditPipeline",
        transformer=transformer,
        vae=tiny_wan.vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
        image_encoder=tiny_wan.image_encoder(),
        image_processor=tiny_wan.ImageProcessor(),
    )


def _consisid() -> Any:
    transformer = tiny.consisid(in_channels=8)
    vae = tiny.make(
        "AutoencoderKLCogVideoX",
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return _pipeline(
        "ConsisIDPipeline",
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.CogVideoXDPMScheduler(),
    )


def _easyanimate() -> Any:
    transformer = tiny.easyanimate()
    blocks = ("Spatial{}Block3D", *("SpatialTemporal{}Block3D",) * 3)
    vae = tiny.make(
        "AutoencoderKLMagvit",
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=[block.format("Down") for block in blocks],
        up_block_types=[block.format("Up") for block in blocks],
        layers_per_block=1,
        norm_num_groups=2,
    )
    return _pipeline("EasyAnimatePipeline", transformer=transformer, vae=vae)


def _kandinsky5_prompts() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for prefix, length in (("", 5), ("negative_", 3)):
        out[f"{prefix}prompt_embeds_qwen"] = tiny.noise(1, length, WIDTH, seed=length)
        out[f"{prefix}prompt_embeds_clip"] = tiny.noise(1, 8, seed=length)
        out[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, length], dtype=torch.int32)
    return out


def _anyflow() -> Any:
    transformer = tiny.wan_shaped("AnyFlowTransformer3DModel")
    return _pipeline(
        "AnyFlowPipeline",
        transformer=transformer,
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
    )


def wan_animate() -> Any:
    """Wan 2.2 Animate, whose number of frames is not an argument of its call."""
    return _pipeline(
        "WanAnimatePipeline",
        transformer=tiny.wan_animate(
            in_channels=36, latent_channels=16, out_channels=16, image_dim=8, added_kv_proj_dim=48
        ),
        vae=tiny_wan.vae(),
        image_encoder=tiny_wan.image_encoder(),
        image_processor=tiny_wan.ImageProcessor(),
    )


def run_wan_animate(pipe: Any, frames: int, steps: int = 2) -> torch.Tensor:
    """Latents of the last segment of an animation of so many frames, in segments of 9."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **_image_prompts(TEXT, TEXT),
        image=picture(),
        pose_video=[picture(seed=i) for i in range(frames)],
        face_video=[picture(16, 16, seed=i) for i in range(frames)],
        height=64,
        width=96,
        segment_frame_length=9,
        guidance_scale=3.0,
        num_inference_steps=steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        return_dict=False,
    )[0]


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
        # Pipelines that tell the model the lengths take no padding.
        lambda: (
            _prompts(TEXT if tiny.qwen_takes_lengths() else 5, TEXT, mask="prompt_embeds_mask")
            | {"true_cfg_scale": 3.0}
        ),
        size=(96, 144, 1),
        forwards=2,
    ),
    "chroma": PipelineCase(
        lambda: _pipeline(
            "ChromaPipeline",
            transformer=edit.chroma(),
            absent=("image_encoder", "feature_extractor"),
        ),
        lambda: {
            name: value.bool() if name.endswith("mask") else value
            for name, value in _prompts(5, 3).items()
        },
        size=(96, 144, 1),
        forwards=2,
    ),
    "ovis-image": PipelineCase(
        lambda: _pipeline("OvisImagePipeline", transformer=edit.ovis()),
        lambda: _prompts(TEXT, TEXT, mask=None) | {"negative_prompt": None},
        size=(96, 144, 1),
        forwards=2,
    ),
    "bria": PipelineCase(
        _bria,
        lambda: _prompts(TEXT, TEXT, mask=None),
        size=(96, 144, 1),
    ),
    "krea-2": PipelineCase(
        lambda: _pipeline("Krea2Pipeline", transformer=edit.krea2()),
        lambda: _prompts_by_layers(5, 3),
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
    "ltx-2": PipelineCase(
        _ltx2,
        # Two branches in one batch, and another without sound and video seeing each other.
        lambda: (
            _prompts(5, 3)
            | {"guidance_scale": 3.0, "modality_scale": 2.0}
            | {"stg_scale": 0.0, "audio_stg_scale": 0.0}
        ),
        size=(128, 192, 17),
        forwards=2,
    ),
    "chronoedit": PipelineCase(
        _chronoedit,
        lambda: (
            _image_prompts(TEXT, TEXT)
            | {"image": picture(), "enable_temporal_reasoning": True}
            | {"num_temporal_reasoning_steps": 99}
        ),
        size=(64, 96, 9),
        forwards=2,
    ),
    "anyflow": PipelineCase(
        _anyflow,
        lambda: _prompts(TEXT, TEXT, mask=None) | {"guidance_scale": 3.0},
        size=(64, 96, 9),
    ),
    "consisid": PipelineCase(
        _consisid,
        lambda: _prompts(TEXT, TEXT, mask=None) | {"image": picture()} | tiny.face(1),
        size=(64, 96, 9),
    ),
    "kandinsky-5": PipelineCase(
        lambda: _pipeline("Kandinsky5T2VPipeline", transformer=tiny.kandinsky5(), absent=_SECOND),
        _kandinsky5_prompts,
        size=(64, 96, 9),
        forwards=2,
    ),
    "easyanimate": PipelineCase(
        _easyanimate,
        lambda: _prompts(5, 3),
        size=(64, 96, 9),
    ),
}

# --- Pictures whose grid follows from shapes


def _texts(*lengths: int) -> dict[str, Any]:
    """Encoded prompts of their own lengths, without padding."""
    prefixes = ("", "negative_")
    return {
        f"{prefix}prompt_embeds": [tiny.noise(length, WIDTH, seed=length)]
        for prefix, length in zip(prefixes, lengths, strict=False)
    }


def _second_prompts() -> dict[str, Any]:
    """What HunyuanDiT's second text encoder makes of the prompts."""
    out = {}
    for prefix in ("", "negative_"):
        out[f"{prefix}prompt_embeds_2"] = tiny.noise(1, 5, WIDTH, seed=5)
        out[f"{prefix}prompt_attention_mask_2"] = tiny.valid_text(5, 5)
    return out


def _nucleus_image() -> Any:
    if not hasattr(diffusers, "NucleusMoEImagePipeline"):
        pytest.skip(f"diffusers {diffusers.__version__} has no NucleusMoEImagePipeline")
    return diffusers.NucleusMoEImagePipeline(
        transformer=tiny_picture_models.nucleus_image(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(("vae", "text_encoder", "processor")),
    )


PIPELINES |= {
    "z-image": PipelineCase(
        lambda: _pipeline("ZImagePipeline", transformer=tiny_picture_models.z_image()),
        lambda: _texts(7, 40),
        size=(96, 144, 1),
    ),
    "hunyuan-image": PipelineCase(
        lambda: _pipeline(
            "HunyuanImagePipeline",
            transformer=tiny_picture_models.hunyuan_image(),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
            absent=_SECOND,
        ),
        lambda: _prompts(5, 3, mask="prompt_embeds_mask") | _glyphs(),
        size=(192, 288, 1),
        forwards=2,
    ),
    "ernie-image": PipelineCase(
        lambda: _pipeline("ErnieImagePipeline", transformer=tiny_picture_models.ernie_image()),
        lambda: _texts(7, 4),
        size=(96, 144, 1),
    ),
    "pixart": PipelineCase(
        lambda: _pipeline(
            "PixArtSigmaPipeline",
            transformer=tiny_picture_models.pixart(),
            scheduler=DDIMScheduler(),
        ),
        lambda: _prompts(5, 3) | {"negative_prompt": None, "use_resolution_binning": False},
        size=(96, 144, 1),
    ),
    "latte": PipelineCase(
        lambda: _pipeline(
            "LattePipeline", transformer=tiny_picture_models.latte(), scheduler=DDIMScheduler()
        ),
        lambda: _prompts(TEXT, TEXT, mask=None) | {"video_length": 3, "negative_prompt": None},
        size=(96, 144, 3),
    ),
    "prx": PipelineCase(
        lambda: _pipeline("PRXPipeline", transformer=tiny_picture_models.prx()),
        lambda: (
            _prompts(5, 3)
            | {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 3.0}
        ),
        size=(96, 144, 1),
    ),
    "nucleus-image": PipelineCase(
        _nucleus_image,
        lambda: _prompts(5, 3, mask="prompt_embeds_mask") | {"guidance_scale": 3.0},
        size=(96, 144, 1),
        forwards=2,
    ),
    "hunyuandit": PipelineCase(
        lambda: _pipeline(
            "HunyuanDiTPipeline",
            transformer=tiny_picture_models.hunyuandit(),
            scheduler=DDIMScheduler(),
            absent=(*_SECOND, "safety_checker", "feature_extractor"),
            requires_safety_checker=False,
        ),
        lambda: _prompts(5, 3) | _second_prompts() | {"use_resolution_binning": False},
        size=(96, 144, 1),
    ),
    "lumina-2": PipelineCase(
        lambda: _pipeline("Lumina2Pipeline", transformer=tiny_picture_models.lumina2()),
        lambda: _prompts(5, 3),
        size=(96, 144, 1),
        forwards=2,
    ),
    "cogview-4": PipelineCase(
        lambda: _pipeline("CogView4Pipeline", transformer=tiny_picture_models.cogview4()),
        lambda: _prompts(TEXT, TEXT, mask=None),
        size=(96, 144, 1),
        forwards=2,
    ),
    "cogview-3-plus": PipelineCase(
        lambda: _pipeline(
            "CogView3PlusPipeline",
            transformer=tiny_picture_models.cogview3plus(),
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        ),
        lambda: _prompts(TEXT, TEXT, mask=None),
        size=(96, 144, 1),
    ),
    "auraflow": PipelineCase(
        lambda: _pipeline("AuraFlowPipeline", transformer=tiny_picture_models.auraflow()),
        lambda: _prompts(TEXT, TEXT),
        size=(96, 144, 1),
    ),
    "modelscope": PipelineCase(
        lambda: _pipeline(
            "TextToVideoSDPipeline",
            unet=tiny_picture_models.unet_3d(),
            scheduler=DDIMScheduler(),
        ),
        lambda: _prompts(TEXT, TEXT, mask=None),
        size=(96, 144, 3),
    ),
}

# --- Videos beside sound, and Cosmos


def _motif_video() -> Any:
    channels = 2  # of the latents; the model also gets those of an image, and a mask
    return _pipeline(
        "MotifVideoPipeline",
        transformer=tiny_video.motif_video(
            in_channels=2 * channels + 1, out_channels=channels, image_embed_dim=None
        ),
        vae=tiny.make(
            "AutoencoderKLWan",
            base_dim=3,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        ),
        guider=diffusers.guiders.ClassifierFreeGuidance(guidance_scale=3.0),
    )


def _cosmos() -> Any:
    class Guard:
        """Instead of NVIDIA's, which only looks at prompts and at finished videos."""

        def to(self, device: Any) -> None: ...

    return _pipeline(
        "CosmosTextToWorldPipeline",
        transformer=tiny_video.cosmos(in_channels=4, extra_pos_embed_type="learnable"),
        scheduler=diffusers.EDMEulerScheduler(),
        safety_checker=Guard(),
    )


PIPELINES |= {
    "kandinsky-6": PipelineCase(
        lambda: _pipeline(
            "Kandinsky6TI2VAPipeline", transformer=tiny_video.kandinsky6(), absent=_SECOND
        ),
        lambda: _prompts(TEXT, TEXT, mask=None) | _pooled(*_POOLED) | {"sample_audio": False},
        size=(64, 96, 9),
        forwards=2,
    ),
    "motif-video": PipelineCase(
        _motif_video, lambda: _prompts(TEXT, 5), size=(64, 96, 9), forwards=2
    ),
    "cosmos": PipelineCase(
        _cosmos, lambda: _prompts(TEXT, TEXT, mask=None), size=(64, 96, 17), forwards=2
    ),
}
