"""LTX-Video: text to video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from diffattn.lora.recipes.base import (
    Recipe,
    call_default,
    common_settings,
    encode_pixels,
    one_by_one,
    per_channel,
    refuse_conditions,
)

_RATE = "frame_rate"


@dataclass(frozen=True, kw_only=True)
class LTXRecipe(Recipe):
    """LTX-Video's recipe.

    Attributes:
        patch: latent frames, rows and columns of a token; the denoiser takes a sequence of tokens.
        compression: frames, rows and columns of pixels of a latent.
        frame_rate: frames a second, an input of the denoiser in the form of scaled positions. Clips
            with a rate of their own among their conditions have that.
    """

    patch: tuple[int, int, int]
    compression: tuple[int, int, int]
    frame_rate: float

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; the VAE has a mean, a deviation per channel, and a factor."""
        vae = pipe.vae
        latents = encode_pixels(pipe, pixels, generator)
        mean, std = (per_channel(x, latents) for x in (vae.latents_mean, vae.latents_std))
        return (latents - mean) * vae.config.scaling_factor / std

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The text and the text's mask."""

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, mask, _, _ = pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_length
            )
            return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

        return one_by_one(prompts, encode)

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`."""
        frames, height, width = noisy.shape[2:]
        per_frame, rows, columns = self.compression
        rate: Any = self.frame_rate
        if _RATE in conditions:
            # Positions are (batch, axis, frame, row, column).
            rate = conditions[_RATE].view(-1, 1, 1, 1, 1)
        out: Tensor = model(
            hidden_states=self._pack(noisy).to(self.dtype),
            encoder_hidden_states=conditions["prompt_embeds"].to(self.dtype),
            timestep=self.model_times(times),
            encoder_attention_mask=conditions["prompt_attention_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(per_frame / rate, rows, columns),
            return_dict=False,
        )[0]
        return self._unpack(out, height, width)

    def tokens_of_shift(self, size: Sequence[int]) -> int:
        """See `Recipe.tokens_of_shift`; the pipeline counts latents."""
        return math.prod(size)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """See `Recipe.from_pipeline`."""
        _, rows, columns = self.compression
        return self._unpack(latents, height // rows, width // columns)

    def encode_origin(
        self, fps: float | None, size: tuple[int, int], crop: tuple[int, int]
    ) -> dict[str, Tensor]:
        """See `Recipe.encode_origin`."""
        return {_RATE: torch.tensor([self.frame_rate if fps is None else fps])}

    def at_rate(self, fps: float | None) -> Self:
        """See `Recipe.at_rate`."""
        return self if fps is None else replace(self, frame_rate=fps)

    def call_arguments(self, pipe: Any, num_frames: int) -> dict[str, Any]:
        """See `Recipe.call_arguments`."""
        return super().call_arguments(pipe, num_frames) | {"frame_rate": self.frame_rate}

    def _pack(self, latents: Tensor) -> Tensor:
        """Latents as a sequence of tokens, (batch, tokens, channels of a token)."""
        tokens = latents
        for axis, size in zip((2, 4, 6), self.patch, strict=True):
            tokens = tokens.unflatten(axis, (-1, size))
        return tokens.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def _unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Latents of `height` x `width` from a sequence (batch, tokens, channels of a token)."""
        _, patch_h, patch_w = self.patch
        blocks = tokens.unflatten(1, (-1, height // patch_h, width // patch_w))
        blocks = blocks.unflatten(4, (-1, *self.patch)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return blocks.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def ltx_recipe(pipe: Any, denoiser: str, text_length: int | None) -> LTXRecipe:
    """The recipe of a text-to-video pipeline."""
    model = getattr(pipe, denoiser)
    config = model.config
    refuse_conditions(model, config.in_channels == config.out_channels)
    spatial = pipe.vae_spatial_compression_ratio
    return LTXRecipe(
        **common_settings(pipe, "ltx", denoiser, text_length, flow=True),
        patch=(config.patch_size_t, config.patch_size, config.patch_size),
        compression=(pipe.vae_temporal_compression_ratio, spatial, spatial),
        frame_rate=call_default(pipe, "frame_rate"),
    )
