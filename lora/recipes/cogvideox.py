"""CogVideoX 2b, 5b and 1.5: text to video."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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


@dataclass(frozen=True)
class Rotary:
    """The parameters of a model's rotary positions; hashable.

    Attributes:
        head_dim: channels of a head.
        patch: latent rows and columns of a token.
        frames_per_token: latent frames of a token; None for the models before 1.5, which stretch
            the positions of their trained size to other sizes.
        base: rows and columns of tokens at the trained size.
    """

    head_dim: int
    patch: int
    frames_per_token: int | None
    base: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class CogVideoXRecipe(Recipe):
    """CogVideoX's recipe.

    Attributes:
        frames_per_token: latent frames of a token; two for 1.5.
        rotary: the parameters of the rotary positions; None for 2b, which has learnt positions.
    """

    frames_per_token: int
    rotary: Rotary | None

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; the first latent frame is repeated to fill whole tokens.

        The pipeline denoises whole tokens, and leaves surplus frames at the start out of the video.
        """
        latents = encode_pixels(pipe, pixels, generator) * pipe.vae.config.scaling_factor
        surplus = -latents.shape[2] % self.frames_per_token
        return torch.cat([latents[:, :, :1].expand(-1, -1, surplus, -1, -1), latents], dim=2)

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The padded text, without a mask."""

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, _ = pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_length
            )
            return {"prompt_embeds": embeds}

        return one_by_one(prompts, encode)

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`; the denoiser takes frames before channels."""
        frames, height, width = noisy.shape[2:]
        rotary = None
        if self.rotary is not None:
            rotary = _rotary_table(self.rotary, frames, height, width, noisy.device)
        out: Tensor = model(
            hidden_states=noisy.transpose(1, 2).to(self.dtype),
            timestep=self.model_times(times),
            encoder_hidden_states=conditions["prompt_embeds"].to(self.dtype),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return out.transpose(1, 2)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """See `Recipe.from_pipeline`."""
        return latents.transpose(1, 2)


@lru_cache(maxsize=8)
def _rotary_table(
    rotary: Rotary, frames: int, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The cosines and sines, (tokens, head_dim) each, for latents of a size."""
    # Imported late: pipelines import transformers, which looks for a top-level `kernels`.
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    grid = height // rotary.patch, width // rotary.patch
    base_height, base_width = rotary.base
    if rotary.frames_per_token is None:
        region = get_resize_crop_region_for_grid(grid, base_width, base_height)
        table = get_3d_rotary_pos_embed(rotary.head_dim, region, grid, frames, device=device)
    else:
        table = get_3d_rotary_pos_embed(
            rotary.head_dim,
            None,
            grid,
            frames // rotary.frames_per_token,
            grid_type="slice",
            max_size=rotary.base,
            device=device,
        )
    cosines, sines = table
    return cosines, sines


def cogvideox_recipe(pipe: Any, denoiser: str, text_length: int | None) -> CogVideoXRecipe:
    """The recipe of a text-to-video pipeline."""
    model = getattr(pipe, denoiser)
    config = model.config
    refuse_conditions(
        model,
        type(model).__name__ == "CogVideoXTransformer3DModel"
        and config.in_channels == config.out_channels,
    )
    patch = config.patch_size
    rotary = Rotary(
        config.attention_head_dim,
        patch,
        config.patch_size_t,
        (config.sample_height // patch, config.sample_width // patch),
    )
    return CogVideoXRecipe(
        **common_settings(pipe, "cogvideox", denoiser, text_length, flow=False),
        frames_per_token=config.patch_size_t or 1,
        rotary=rotary if config.use_rotary_positional_embeddings else None,
    )
