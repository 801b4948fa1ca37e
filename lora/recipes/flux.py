"""Flux.1: text to image; Kontext's model takes a picture beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from diffattn.lora.recipes.base import (
    Recipe,
    call_default,
    common_settings,
    encode_pixels,
    one_by_one,
    refuse_conditions,
)
from diffattn.lora.recipes.packed import PATCH, pack, unpack

SOURCE = "source"  # the condition with the latents of what is edited


@dataclass(frozen=True, kw_only=True)
class FluxRecipe(Recipe):
    """Flux's recipe.

    Attributes:
        latent_pixels: pixels per latent along rows and columns.
    """

    latent_pixels: int

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; images only. The VAE has a shift and a factor."""
        latents = encode_pixels(pipe, pixels.squeeze(2), generator)
        config = pipe.vae.config
        return ((latents - config.shift_factor) * config.scaling_factor).unsqueeze(2)

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The padded text, without a mask, and CLIP's pooled embedding of the text."""

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, pooled, _ = pipe.encode_prompt(
                prompt, None, max_sequence_length=self.text_length
            )
            return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

        return one_by_one(prompts, encode)

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`; the denoiser takes a sequence of tokens, and times up to 1."""
        height, width = noisy.shape[3:]
        told = {name: value.to(self.dtype) for name, value in conditions.items()}
        guidance = None
        if self.guidance is not None:
            guidance = noisy.new_full((len(noisy),), self.guidance, dtype=torch.float32)
        tokens = pack(noisy)
        count = tokens.shape[1]
        sizes = [(height // PATCH, width // PATCH)]
        if SOURCE in told:
            tokens = torch.cat([tokens, pack(told[SOURCE]).to(tokens)], dim=1)
            rows, columns = told[SOURCE].shape[3:]
            sizes.append((rows // PATCH, columns // PATCH))
        out: Tensor = model(
            hidden_states=tokens.to(self.dtype),
            timestep=self.model_times(times).to(self.dtype) / 1000,
            guidance=guidance,
            pooled_projections=told["pooled_prompt_embeds"],
            encoder_hidden_states=told["prompt_embeds"],
            txt_ids=_text_ids(told["prompt_embeds"].shape[1], self.dtype, noisy.device),
            img_ids=_image_ids(tuple(sizes), self.dtype, noisy.device),
            return_dict=False,
        )[0]
        return unpack(out[:, :count], height, width)

    def tokens_of_shift(self, size: Sequence[int]) -> int:
        """See `Recipe.tokens_of_shift`."""
        return math.prod(size) // PATCH**2

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """See `Recipe.from_pipeline`."""
        return unpack(latents, height // self.latent_pixels, width // self.latent_pixels)


# Every call of a size gets the same tensor: sparse attention reads the values of each tensor once,
# and reading waits for the device.
@lru_cache(maxsize=8)
def _image_ids(
    sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(tokens, 3): image, row, column."""
    ids = [
        torch.cartesian_prod(torch.tensor([image]), torch.arange(height), torch.arange(width))
        for image, (height, width) in enumerate(sizes)
    ]
    return torch.cat(ids).to(device, dtype)


@lru_cache(maxsize=8)
def _text_ids(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(tokens, 3, dtype=dtype, device=device)


def flux_settings(pipe: Any, denoiser: str, text_length: int | None) -> dict[str, Any]:
    """The attributes of `FluxRecipe`, by name."""
    model = getattr(pipe, denoiser)
    config = model.config
    refuse_conditions(model, config.out_channels in (None, config.in_channels))
    guidance = call_default(pipe, "guidance_scale") if config.guidance_embeds else None
    common = common_settings(pipe, "flux", denoiser, text_length, flow=True)
    return common | {"latent_pixels": pipe.vae_scale_factor, "guidance": guidance}
