"""Stable Diffusion 3 and 3.5: text to image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffattn.lora.recipes.base import (
    Recipe,
    common_settings,
    encode_pixels,
    one_by_one,
    refuse_conditions,
)


@dataclass(frozen=True, kw_only=True)
class SD3Recipe(Recipe):
    """The recipe of Stable Diffusion 3.

    Attributes:
        patch: latent rows and columns of a token.
    """

    patch: int

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; images only. The VAE has a shift and a factor."""
        latents = encode_pixels(pipe, pixels.squeeze(2), generator)
        config = pipe.vae.config
        return ((latents - config.shift_factor) * config.scaling_factor).unsqueeze(2)

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """CLIP's text before T5's, padded, without a mask, and CLIP's two pooled embeddings.

        A pipeline without T5 has zeros in its place.
        """

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, _, pooled, _ = pipe.encode_prompt(
                prompt,
                None,
                None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
            )
            return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

        return one_by_one(prompts, encode)

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`."""
        out: Tensor = model(
            hidden_states=noisy.squeeze(2).to(self.dtype),
            timestep=self.model_times(times),
            encoder_hidden_states=conditions["prompt_embeds"].to(self.dtype),
            pooled_projections=conditions["pooled_prompt_embeds"].to(self.dtype),
            return_dict=False,
        )[0]
        return out.unsqueeze(2)

    def tokens_of_shift(self, size: Sequence[int]) -> int:
        """See `Recipe.tokens_of_shift`; for 3.5's schedulers with a dynamic shift."""
        _, height, width = size
        return (height // self.patch) * (width // self.patch)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """See `Recipe.from_pipeline`."""
        return latents.unsqueeze(2)


def sd3_recipe(pipe: Any, denoiser: str, text_length: int | None) -> SD3Recipe:
    """The recipe of a text-to-image pipeline."""
    model = getattr(pipe, denoiser)
    config = model.config
    refuse_conditions(model, config.in_channels == config.out_channels)
    return SD3Recipe(
        **common_settings(pipe, "sd3", denoiser, text_length, flow=True), patch=config.patch_size
    )
