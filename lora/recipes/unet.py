"""The U-Nets of Stable Diffusion 1.5, 2 and XL: text to image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffattn.lora.errors import LoraError
from diffattn.lora.recipes.base import (
    Recipe,
    common_settings,
    encode_pixels,
    one_by_one,
    per_channel,
    refuse_conditions,
)

_ORIGIN = "origin"


@dataclass(frozen=True, kw_only=True)
class UNetRecipe(Recipe):
    """The recipe of Stable Diffusion 1.5 and 2."""

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; images only. The VAE has one factor."""
        latents = encode_pixels(pipe, pixels.squeeze(2), generator)
        return (latents * pipe.vae.config.scaling_factor).unsqueeze(2)

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The padded text, without a mask."""

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, _ = pipe.encode_prompt(prompt, pipe._execution_device, 1, False)
            return {"prompt_embeds": embeds}

        return one_by_one(prompts, encode)

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`."""
        out: Tensor = model(
            noisy.squeeze(2).to(self.dtype),
            self.model_times(times),
            encoder_hidden_states=conditions["prompt_embeds"].to(self.dtype),
            return_dict=False,
        )[0]
        return out.unsqueeze(2)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """See `Recipe.from_pipeline`."""
        return latents.unsqueeze(2)


@dataclass(frozen=True, kw_only=True)
class XLRecipe(UNetRecipe):
    """The recipe of Stable Diffusion XL.

    Attributes:
        latent_pixels: pixels per latent along rows and columns. The denoiser's inputs include the
            size of the picture's file and its crop. Pictures of a pipeline have their own size and
            no crop.
        zeros_for_empty: whether the conditions of an empty prompt are zeros.
    """

    latent_pixels: int
    zeros_for_empty: bool

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; the VAE may have a mean and a deviation per channel."""
        latents = encode_pixels(pipe, pixels.squeeze(2), generator)
        config = pipe.vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = (per_channel(x, latents) for x in (config.latents_mean, config.latents_std))
            latents = (latents - mean) / std
        return (latents * config.scaling_factor).unsqueeze(2)

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The padded text, without a mask, and the second encoder's pooled embedding."""

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
            if self.zeros_for_empty and not prompt:
                embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
            return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

        return one_by_one(prompts, encode)

    def encode_origin(
        self, fps: float | None, size: tuple[int, int], crop: tuple[int, int]
    ) -> dict[str, Tensor]:
        """See `Recipe.encode_origin`."""
        return {_ORIGIN: torch.tensor([[*size, *crop]])}

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`."""
        height, width = (size * self.latent_pixels for size in noisy.shape[3:])
        size = torch.tensor([[height, width]], device=noisy.device).expand(len(noisy), -1)
        origin = conditions.get(_ORIGIN)
        if origin is None:
            origin = torch.cat([size, torch.zeros_like(size)], dim=1)
        told = {name: value.to(self.dtype) for name, value in conditions.items()}
        ids = torch.cat([origin.to(self.dtype), size.to(self.dtype)], dim=1)
        out: Tensor = model(
            noisy.squeeze(2).to(self.dtype),
            self.model_times(times),
            encoder_hidden_states=told["prompt_embeds"],
            added_cond_kwargs={"text_embeds": told["pooled_prompt_embeds"], "time_ids": ids},
            return_dict=False,
        )[0]
        return out.unsqueeze(2)


def unet_recipe(pipe: Any, denoiser: str, text_length: int | None) -> UNetRecipe:
    """The recipe of a text-to-image pipeline."""
    model = getattr(pipe, denoiser)
    config = model.config
    added = config.addition_embed_type
    if type(model).__name__ == "UNetMotionModel":
        raise LoraError(
            "there is no training recipe for AnimateDiff: train the U-Net of a"
            " StableDiffusionPipeline, which its spatial attention is"
        )
    refuse_conditions(
        model, config.in_channels == config.out_channels and added in (None, "text_time")
    )
    encoder_length = getattr(getattr(pipe, "tokenizer", None), "model_max_length", 77)
    if text_length not in (None, encoder_length):
        raise LoraError(
            f"text_length is {text_length}, but {type(pipe).__name__} pads every prompt to"
            f" {encoder_length} tokens: leave it out"
        )
    settings = common_settings(pipe, "unet", denoiser, encoder_length, flow=False)
    if added is None:
        return UNetRecipe(**settings)
    return XLRecipe(
        **settings,
        latent_pixels=pipe.vae_scale_factor,
        zeros_for_empty=pipe.config.get("force_zeros_for_empty_prompt", False),
    )
