"""Qwen-Image: text to image; and how every model of its kind takes texts and pictures."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.lora.errors import LoraError
from diffattn.lora.recipes.base import (
    Recipe,
    common_settings,
    encode_pixels,
    one_by_one,
    per_channel,
    refuse_conditions,
)
from diffattn.lora.recipes.packed import PATCH, pack, unpack

TEXT, MASK = "prompt_embeds", "prompt_embeds_mask"


@dataclass(frozen=True, kw_only=True)
class QwenImageRecipe(Recipe):
    """Qwen-Image's recipe.

    Attributes:
        latent_pixels: pixels per latent along rows and columns.
    """

    latent_pixels: int

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; the VAE has a mean and a deviation for each channel."""
        return normalised(pipe, encode_pixels(pipe, pixels, generator))

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The text in the pipeline's template, padded with zeros, and the text's mask."""

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, _ = pipe.encode_prompt(prompt, max_sequence_length=self.text_length)
            return padded_text(embeds, self.text_length)

        return one_by_one(prompts, encode)

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`; the denoiser takes a sequence of tokens, and times up to 1."""
        height, width = noisy.shape[3:]
        text, mask = valid_text(conditions[TEXT], conditions[MASK])
        out: Tensor = model(
            hidden_states=pack(noisy).to(self.dtype),
            timestep=self.model_times(times).to(self.dtype) / 1000,
            encoder_hidden_states=text.to(self.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(out, height, width)

    def tokens_of_shift(self, size: Sequence[int]) -> int:
        """See `Recipe.tokens_of_shift`."""
        return math.prod(size) // PATCH**2

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """See `Recipe.from_pipeline`."""
        return unpack(latents, height // self.latent_pixels, width // self.latent_pixels)


def padded_text(embeds: Tensor, length: int) -> dict[str, Tensor]:
    """A text without padding, (1, tokens, channels), padded to `length` tokens, and the mask."""
    tokens = embeds.shape[1]
    mask = torch.arange(length, device=embeds.device) < tokens
    return {TEXT: F.pad(embeds, (0, 0, 0, length - tokens)), MASK: mask.long()[None]}


def valid_text(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Texts up to the end of the longest, and the mask of these tokens; None for no padding.

    So the pipeline calls the denoiser, whose work grows with the padding.
    """
    # Reading the mask waits for the device, as sparse attention under a mask does anyway.
    longest = int(mask.sum(dim=1).max())
    embeds, mask = embeds[:, :longest], mask[:, :longest]
    return embeds, None if mask.all() else mask


def normalised(pipe: Any, latents: Tensor) -> Tensor:
    """Latents of the VAE with its mean and deviation for each channel taken off."""
    config = pipe.vae.config
    mean, std = (per_channel(x, latents) for x in (config.latents_mean, config.latents_std))
    return (latents - mean) / std


def qwen_image_settings(pipe: Any, denoiser: str, text_length: int | None) -> dict[str, Any]:
    """The attributes of `QwenImageRecipe`, by name.

    Raises:
        LoraError: if the model is of another kind, or diffusers is too old.
    """
    model = getattr(pipe, denoiser)
    config = model.config
    refuse_conditions(
        model,
        config.in_channels == config.out_channels * PATCH**2 and not config.use_additional_t_cond,
    )
    if config.guidance_embeds:
        raise LoraError(
            "this Qwen-Image model has a guidance scale among its inputs (guidance_embeds), which"
            " no published one has: there is no training recipe for such a model"
        )
    if "txt_seq_lens" in inspect.signature(type(model).forward).parameters:
        raise LoraError(
            "this diffusers tells Qwen-Image how long texts are, and does not hide their padding:"
            " install a newer one, which tells a mask, to train on texts of several lengths"
        )
    common = common_settings(pipe, "qwen-image", denoiser, text_length, flow=True)
    return common | {"latent_pixels": pipe.vae_scale_factor}
