"""Wan 2.1 and 2.2: text to video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffattn.lora.recipes.base import (
    Recipe,
    common_settings,
    encode_pixels,
    one_by_one,
    per_channel,
    refuse_conditions,
)
from diffattn.models.wan import encode_all_frames, frames_to_ask_for


@dataclass(frozen=True, kw_only=True)
class WanRecipe(Recipe):
    """Wan's recipe.

    Attributes:
        token_pixels: latent rows and columns of a token, for a denoiser with a timestep for every
            token (TI2V-5B); None for a denoiser with one timestep for all tokens.
    """

    token_pixels: tuple[int, int] | None

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; the VAE has a mean and a deviation for each channel.

        Latents are the posterior's mode whatever the generator is: so Wan's own encoder takes them.
        """
        latents = encode_all_frames(
            lambda frames: encode_pixels(pipe, frames, None),
            pixels,
            pipe.vae_scale_factor_temporal,
        )
        config = pipe.vae.config
        mean, std = (per_channel(x, latents) for x in (config.latents_mean, config.latents_std))
        return (latents - mean) / std

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The text, padded with zeros, without a mask."""

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, _ = pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_length
            )
            return {"prompt_embeds": embeds}

        return one_by_one(prompts, encode)

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`."""
        timestep = self.model_times(times)
        if self.token_pixels is not None:
            frames, height, width = noisy.shape[2:]
            rows, columns = self.token_pixels
            tokens = frames * (height // rows) * (width // columns)
            timestep = timestep[:, None].expand(-1, tokens)
        out: Tensor = model(
            hidden_states=noisy.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=conditions["prompt_embeds"].to(self.dtype),
            return_dict=False,
        )[0]
        return out

    def call_arguments(self, pipe: Any, num_frames: int) -> dict[str, Any]:
        """See `Recipe.call_arguments`."""
        return super().call_arguments(pipe, frames_to_ask_for(pipe, num_frames))


def wan_recipe(pipe: Any, denoiser: str, text_length: int | None) -> WanRecipe:
    """The recipe of one of a pipeline's experts, or of its only denoiser."""
    model = getattr(pipe, denoiser)
    refuse_conditions(
        model,
        type(model).__name__ == "WanTransformer3DModel"
        and model.config.in_channels == model.config.out_channels
        and model.config.image_dim is None,
    )
    settings = common_settings(pipe, "wan", denoiser, text_length, flow=True)
    boundary = pipe.config.get("boundary_ratio")
    if boundary is not None:
        # The second expert takes over below the boundary.
        low_noise = denoiser == "transformer_2"
        settings["noise_range"] = (0.0, boundary) if low_noise else (boundary, 1.0)
    _, rows, columns = model.config.patch_size
    per_token = pipe.config.get("expand_timesteps", False)
    return WanRecipe(**settings, token_pixels=(rows, columns) if per_token else None)
