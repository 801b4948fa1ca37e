"""Tiny text-to-video and text-to-image pipelines that are complete: text encoders and VAE included.

Built offline, with random weights: tokenizers that read bytes, and encoders of one or two layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import numpy as np
import tiny_families as tiny
import tiny_wan
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BatchFeature,
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    T5Config,
    T5EncoderModel,
)

FLOW = diffusers.FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True)
class CompleteCase:
    """A pipeline and a call of it.

    Attributes:
        build: makes the pipeline.
        size: height, width and number of frames.
        call: arguments of its call beyond the prompts and the size.
        guided: whether the call has a negative prompt beside the prompt, in one batch.
        text_length: tokens that prompts are padded to, where it is not the pipeline's own number.
    """

    build: Callable[[], Any]
    size: tuple[int, int, int]
    call: dict[str, Any] = field(default_factory=dict)
    guided: bool = True
    text_length: int | None = None

    def run(self, pipe: Any, prompt: str, negative: str = "", steps: int = 2, **more: Any) -> Any:
        """What a short seeded call returns."""
        height, width, num_frames = self.size
        inputs = {"prompt": prompt, "height": height, "width": width} | self.call | more
        if "num_frames" in type(pipe).__call__.__annotations__:
            inputs["num_frames"] = num_frames
        if self.guided:
            inputs |= {"negative_prompt": negative, "guidance_scale": 3.0}
        if self.text_length is not None:
            inputs["max_sequence_length"] = self.text_length
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        return pipe(**inputs, num_inference_steps=steps, generator=generator)[0]


def t5(width: int = 16) -> T5EncoderModel:
    torch.manual_seed(1)
    return T5EncoderModel(
        T5Config(vocab_size=384, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with an end mark, padded to 77."""
    specials = ["<start>", "<pad>", "<end>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<start>",
        pad_token="<pad>",
        eos_token="<end>",
        model_max_length=77,
    )


def clip(width: int, projected: bool = False) -> torch.nn.Module:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=8,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _llama(layers: int = 3) -> LlamaModel:
    torch.manual_seed(3)
    return LlamaModel(
        LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=512,
        )
    ).eval()


def _image_vae(**changes: Any) -> torch.nn.Module:
    config = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
    }
    return tiny.make("AutoencoderKL", **(config | changes))


def _t5_parts() -> dict[str, Any]:
    return {"text_encoder": t5(), "tokenizer": ByT5Tokenizer()}


def wan(**changes: Any) -> Any:
    parts = {"vae": tiny_wan.vae(), "scheduler": FLOW(shift=3.0)}
    parts |= {"transformer": tiny_wan.transformer()} | changes
    return diffusers.WanPipeline(**_t5_parts(), **parts)


def _wan_two_experts() -> Any:
    torch.manual_seed(0)
    other = tiny_wan.transformer(num_layers=1)
    parts = wan().components | {"transformer_2": other}
    return diffusers.WanPipeline(**parts, boundary_ratio=0.7)


def _wan_ti2v() -> Any:
    vae = tiny_wan.vae(
        z_dim=48,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=torch.linspace(-1, 1, 48).tolist(),
        latents_std=torch.linspace(0.5, 2, 48).tolist(),
    )
    transformer = tiny_wan.transformer(in_channels=48, out_channels=48)
    parts = wan().components | {"vae": vae, "transformer": transformer}
    return diffusers.WanPipeline(**parts, expand_timesteps=True)


def _hunyuanvideo() -> Any:
    vae = tiny.make(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=_llama(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(8),
        tokenizer_2=clip_tokenizer(),
        vae=vae,
        scheduler=FLOW(shift=7.0),
        transformer=tiny.hunyuanvideo(),
    )


def _cogvideox(scheduler: type[Any], **changes: Any) -> Any:
    vae = tiny.make(
        "AutoencoderKLCogVideoX",
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    # As published.
    noise = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    return diffusers.CogVideoXPipeline(
        **_t5_parts(),
        vae=vae,
        scheduler=scheduler(**noise, snr_shift_scale=1.0, timestep_spacing="trailing"),
        transformer=tiny.cogvideox(**changes),
    )


def _ltx() -> Any:
    vae = tiny.make(
        "AutoencoderKLLTXVideo",
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
        scaling_factor=1.3,
    )
    vae.latents_mean.copy_(torch.linspace(-1, 1, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 2, 8))
    scheduler = FLOW(use_dynamic_shifting=True, shift_terminal=0.1)
    return diffusers.LTXPipeline(
        **_t5_parts(), vae=vae, scheduler=scheduler, transformer=tiny.ltx()
    )


def _mochi(**vae_changes: Any) -> Any:
    vae = tiny.make(
        "AutoencoderKLMochi",
        **(
            {
                "latent_channels": 12,
                "encoder_block_out_channels": (32, 32, 32, 32),
                "decoder_block_out_channels": (32, 32, 32, 32),
                "layers_per_block": (1, 1, 1, 1, 1),
            }
            | vae_changes
        ),
    )
    transformer = tiny.make(
        "MochiTransformer3DModel",
        in_channels=12,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=256,
    )
    # As published: the model counts from noise to clean.
    return diffusers.MochiPipeline(
        **_t5_parts(),
        vae=vae,
        scheduler=FLOW(invert_sigmas=True),
        transformer=transformer,
        force_zeros_for_empty_prompt=True,
    )


def _flux_kontext() -> Any:
    blocks = {
        "block_out_channels": (4, 4, 4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = _image_vae(shift_factor=0.1159, scaling_factor=0.3611, **blocks)
    parts = _flux().components | {"vae": vae}
    return diffusers.FluxKontextPipeline(**parts)


def _flux() -> Any:
    return diffusers.FluxPipeline(
        text_encoder=clip(8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=ByT5Tokenizer(),
        vae=_image_vae(shift_factor=0.1159, scaling_factor=0.3611),
        scheduler=FLOW(use_dynamic_shifting=True),
        transformer=tiny.flux(),
    )


_CHAT = (
    "{% for m in messages %}<start>{{ m.role }} {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<end>{% endfor %}"
)


def _flux2(kind: str = "Flux2Pipeline", **more: Any) -> Any:
    vae = tiny.make(
        "AutoencoderKLFlux2",
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    tokenizer = clip_tokenizer()
    tokenizer.chat_template = _CHAT
    transformer = tiny.make(
        "Flux2Transformer2DModel",
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=kind == "Flux2Pipeline",
    )
    pipe = getattr(diffusers, kind)(
        # Texts are outputs of three layers, the last of them the 27th or 30th.
        text_encoder=_llama(30),
        tokenizer=tokenizer,
        vae=vae,
        scheduler=FLOW(use_dynamic_shifting=True),
        transformer=transformer,
        **more,
    )
    pipe.system_message = ""
    return pipe


_QWEN_MARKS = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the marks of Qwen's templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|pad|>", *_QWEN_MARKS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", additional_special_tokens=list(_QWEN_MARKS)
    )


def _qwen_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(4)
    marks = {mark: i for i, mark in enumerate(_QWEN_MARKS, start=1)}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 300,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 4096,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "rope_parameters": {
                    "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4,
                },
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [0],
            },
            image_token_id=marks["<|image_pad|>"],
            video_token_id=marks["<|video_pad|>"],
            vision_start_token_id=marks["<|vision_start|>"],
            vision_end_token_id=marks["<|vision_end|>"],
        )
    ).eval()  # fmt: skip


class _QwenProcessor:
    """Qwen's processor, which transformers makes only where torchvision is."""

    def __init__(self) -> None:
        self.tokenizer = _qwen_tokenizer()
        self._images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=84 * 84)

    def __call__(self, text: list[str], images: Any, **how: Any) -> BatchFeature:
        found = self._images(images=images, return_tensors="pt")
        merged = found["image_grid_thw"].prod(dim=1) // 4
        assert text[0].count("<|image_pad|>") == len(merged)
        for count in merged.tolist():
            text = [each.replace("<|image_pad|>", "<|video_pad|>" * count, 1) for each in text]
        text = [each.replace("<|video_pad|>", "<|image_pad|>") for each in text]
        return BatchFeature({**self.tokenizer(text, return_tensors="pt", padding=True), **found})


def qwen_image_edit(kind: str) -> Any:
    return _qwen_image(kind, processor=_QwenProcessor())


def _qwen_image(kind: str = "QwenImagePipeline", **parts: Any) -> Any:
    vae = tiny.make(
        "AutoencoderKLQwenImage",
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.5, 0.1, 0.2, 1.0],
        latents_std=[0.5, 1.5, 2.0, 3.0],
    )
    # As published.
    shift = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    pipe = getattr(diffusers, kind)(
        scheduler=FLOW(use_dynamic_shifting=True, shift_terminal=0.02, **shift),
        vae=vae,
        text_encoder=_qwen_text_encoder(),
        tokenizer=_qwen_tokenizer(),
        transformer=tiny.qwen_image(),
        **parts,
    )
    # Its template has more bytes than tokens.
    before = pipe.prompt_template_encode.split("<|vision_start|>")[0].split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(before).input_ids)
    return pipe


def _sd3(dynamic: bool = False, **changes: Any) -> Any:
    return diffusers.StableDiffusion3Pipeline(
        text_encoder=clip(8, projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(8, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=ByT5Tokenizer(),
        vae=_image_vae(shift_factor=0.0609, scaling_factor=1.5305),
        scheduler=FLOW(use_dynamic_shifting=True) if dynamic else FLOW(shift=3.0),
        transformer=tiny.sd3(pooled_projection_dim=16, **changes),
    )


def _sd() -> Any:
    return diffusers.StableDiffusionPipeline(
        text_encoder=clip(16),
        tokenizer=clip_tokenizer(),
        vae=_image_vae(),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        unet=tiny.unet(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(force_zeros: bool, **vae_changes: Any) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        text_encoder=clip(8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(8, projected=True),
        tokenizer_2=clip_tokenizer(),
        vae=_image_vae(scaling_factor=0.13025, **vae_changes),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        unet=tiny.sdxl_unet(),
        force_zeros_for_empty_prompt=force_zeros,
    )


_PER_CHANNEL = {"latents_mean": [-0.5, 0.1, 0.2, 1.0], "latents_std": [0.5, 1.5, 2.0, 3.0]}
_SHORT = 7

COMPLETE: dict[str, CompleteCase] = {
    "wan": CompleteCase(wan, (32, 48, 9), guided=False, call={"guidance_scale": 1.0}),
    "wan-two-experts": CompleteCase(
        _wan_two_experts, (32, 48, 5), guided=False, call={"guidance_scale": 1.0}
    ),
    "wan-ti2v-5b": CompleteCase(
        _wan_ti2v, (32, 64, 5), guided=False, call={"guidance_scale": 1.0}
    ),
    "hunyuanvideo": CompleteCase(_hunyuanvideo, (32, 48, 5), guided=False),
    "cogvideox-2b": CompleteCase(
        lambda: _cogvideox(diffusers.CogVideoXDDIMScheduler), (64, 96, 9), text_length=_SHORT
    ),
    "cogvideox-5b": CompleteCase(
        lambda: _cogvideox(
            diffusers.CogVideoXDPMScheduler, use_rotary_positional_embeddings=True
        ),
        (48, 96, 5),
        text_length=_SHORT,
    ),
    "cogvideox-1.5": CompleteCase(
        lambda: _cogvideox(
            diffusers.CogVideoXDDIMScheduler,
            use_rotary_positional_embeddings=True,
            patch_size_t=2,
            patch_bias=False,
            sample_width=24,
        ),
        (64, 96, 9),
        text_length=_SHORT,
    ),
    "ltx": CompleteCase(_ltx, (32, 64, 9)),
    "mochi": CompleteCase(_mochi, (32, 48, 7)),
    "mochi-one-factor": CompleteCase(
        lambda: _mochi(latents_mean=None, latents_std=None), (32, 48, 7)
    ),
    "flux": CompleteCase(_flux, (16, 24, 1), guided=False),
    "flux.2": CompleteCase(_flux2, (32, 48, 1), guided=False, text_length=40),
    "flux.2-klein": CompleteCase(
        lambda: _flux2("Flux2KleinPipeline", is_distilled=True),
        (32, 48, 1),
        guided=False,
        text_length=40,
    ),
    "qwen-image": CompleteCase(_qwen_image, (32, 48, 1), guided=False, text_length=40),
    "sd3": CompleteCase(_sd3, (16, 24, 1), text_length=_SHORT),
    "sd3.5": CompleteCase(
        lambda: _sd3(dynamic=True, dual_attention_layers=(0,), qk_norm="rms_norm"),
        (16, 24, 1),
        text_length=_SHORT,
    ),
    "sd1.5": CompleteCase(_sd, (16, 24, 1)),
    "sdxl": CompleteCase(lambda: _sdxl(True), (16, 24, 1)),
    "sdxl-per-channel": CompleteCase(lambda: _sdxl(False, **_PER_CHANNEL), (16, 24, 1)),
}  # fmt: skip
"""Pipelines of every family that can be trained, one or more each."""


def _noise_picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


EDITING: dict[str, CompleteCase] = {
    name: CompleteCase(
        partial(qwen_image_edit, kind),
        (32, 48, 1),
        call={"image": _noise_picture(64, 96)},
        guided=False,
        text_length=40,
    )
    for name, kind in (
        ("qwen-image-edit", "QwenImageEditPipeline"),
        ("qwen-image-edit-plus", "QwenImageEditPlusPipeline"),
    )
} | {
    "flux-kontext": CompleteCase(
        _flux_kontext,
        (32, 48, 1),
        call={"image": _noise_picture(64, 96), "max_area": 32 * 48},
        guided=False,
        text_length=40,
    )
}
"""Pipelines that edit a picture, and can be trained."""
