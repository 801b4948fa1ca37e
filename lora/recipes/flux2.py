"""Flux.2, dev and Klein: text to image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.lora.errors import LoraError
from diffattn.lora.recipes import noising
from diffattn.lora.recipes.base import (
    Recipe,
    call_default,
    common_settings,
    encode_pixels,
    one_by_one,
    per_channel,
    refuse_conditions,
)
from diffattn.lora.recipes.packed import PATCH

# Klein's pipeline tells its denoiser no guidance scale.
_PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline")


@dataclass(frozen=True, kw_only=True)
class Flux2Recipe(Recipe):
    """Flux.2's recipe. Its latents are tokens: 2 x 2 latents of the VAE, normalised together.

    Attributes:
        token_pixels: pixels of a token along rows and columns.
        sampling_steps: number of steps of the pipeline's call, which its shift depends on.
        mean, variance: statistics of each channel of the VAE's tokens, epsilon included.
    """

    token_pixels: int
    sampling_steps: int
    mean: tuple[float, ...]
    variance: tuple[float, ...]

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; images only. The VAE has the statistics of its tokens."""
        return self._tokens(encode_pixels(pipe, pixels.squeeze(2), generator))

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The padded text of the pipeline's layers, without a mask."""

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, _ = pipe.encode_prompt(prompt, max_sequence_length=self.text_length)
            return {"prompt_embeds": embeds}

        return one_by_one(prompts, encode)

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`; the denoiser takes a sequence of tokens, and times up to 1."""
        batch, _, _, height, width = noisy.shape
        text = conditions["prompt_embeds"].to(self.dtype)
        guidance = None
        if self.guidance is not None:
            guidance = noisy.new_full((batch,), self.guidance, dtype=torch.float32)
        out: Tensor = model(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(self.dtype).contiguous(),
            timestep=self.model_times(times).to(self.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=_ids((1, 1, 1, text.shape[1]), batch, noisy.device),
            img_ids=_ids((1, height, width, 1), batch, noisy.device),
            return_dict=False,
        )[0]
        return _unpack(out, height, width)

    def steps(self, scheduler: Any, size: Sequence[int], shift: float | None) -> noising.Steps:
        """See `Recipe.steps`; the shift is that of the pipeline's usual number of steps."""
        config = scheduler.config
        if shift is None and config.get("use_dynamic_shifting", False):
            exponent = _empirical(math.prod(size), self.sampling_steps)
            linear = config.get("time_shift_type") == "linear"
            shift = exponent if linear else math.exp(exponent)
        return super().steps(scheduler, size, shift)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """See `Recipe.from_pipeline`; Klein's pipeline returns latents of its VAE."""
        if latents.ndim == 4:
            return self._tokens(latents)
        return _unpack(latents, height // self.token_pixels, width // self.token_pixels)

    def _tokens(self, latents: Tensor) -> Tensor:
        """The recipe's latents of the VAE's, (batch, channels, height, width)."""
        tokens = F.pixel_unshuffle(latents, PATCH)
        mean, variance = (per_channel(x, tokens) for x in (self.mean, self.variance))
        return ((tokens - mean) / variance.sqrt()).unsqueeze(2)


def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (1, height, width))


def _empirical(tokens: int, steps: int) -> float:
    """The exponent of the shift, by the pipelines' fit to 10 and 200 steps."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190
    return slope * steps + many - 200 * slope


# Every call of a size gets the same tensor: sparse attention reads the values of each tensor once,
# and reading waits for the device.
@lru_cache(maxsize=8)
def _ids(sizes: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """(batch, tokens, 4): image, row, column, place in the text."""
    return torch.cartesian_prod(*map(torch.arange, sizes)).to(device).expand(batch, -1, -1)


def flux2_recipe(pipe: Any, denoiser: str, text_length: int | None) -> Flux2Recipe:
    """The recipe of a text-to-image pipeline."""
    name = type(pipe).__name__
    if name not in _PIPELINES:
        raise LoraError(
            f"there is no training recipe for {name}: train its model in {' or '.join(_PIPELINES)}"
        )
    model = getattr(pipe, denoiser)
    config = model.config
    refuse_conditions(model, config.out_channels in (None, config.in_channels))
    told = config.guidance_embeds and name == "Flux2Pipeline"
    mean: list[float] = []
    variance: list[float] = []
    if pipe.vae is not None:
        mean = pipe.vae.bn.running_mean.tolist()
        variance = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).tolist()
    return Flux2Recipe(
        **common_settings(pipe, "flux.2", denoiser, text_length, flow=True),
        token_pixels=pipe.vae_scale_factor * PATCH,
        sampling_steps=call_default(pipe, "num_inference_steps"),
        mean=tuple(mean),
        variance=tuple(variance),
        guidance=call_default(pipe, "guidance_scale") if told else None,
    )
