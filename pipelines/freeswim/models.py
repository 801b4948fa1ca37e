"""Stock pipelines of Wan and LTX-Video, in the terms of FreeSwim's two stages.

Latents are (batch, channels, frames, height, width). Those of the denoiser are normalised to mean 0
and variance 1 by `statistics`; those of the VAE are not.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import torch

from diffattn._checks import check, number
from diffattn.models.wan import encode_all_frames, frames_to_ask_for

# Encoded prompts (prompts, tokens, channels), and the mask of tokens that count, if not all count.
Text: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]


class FreeSwimModel(Protocol):
    """A stock pipeline in the terms of FreeSwim."""

    @property
    def least_steps(self) -> int:
        """The smallest number of denoising steps that the pipeline's scheduler takes."""

    def base_arguments(self, num_frames: int) -> dict[str, Any]:
        """Arguments that only this pipeline takes in this form, for `num_frames` frames."""

    def encode_prompts(
        self, prompts: list[str], negative: list[str], guided: bool, max_sequence_length: int
    ) -> tuple[Text, Text | None]:
        """Encode the prompts and, if `guided`, the negative prompts."""

    def set_timesteps(self, scheduler: Any, steps: int, device: torch.device) -> None:
        """Set the timesteps of a scheduler as the pipeline sets those of its own."""

    def model_at(self, timestep: torch.Tensor | None) -> Any:
        """The denoiser for a timestep; for None the first denoiser."""

    def predict(
        self, model: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Text
    ) -> torch.Tensor:
        """Call a denoiser; the batch of latents may be a multiple of the batch of texts."""

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents, (channels,) each."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The VAE's likeliest latents of a video (1, 3, frames, height, width) in [-1, 1]."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The video (1, 3, frames, height, width) of the VAE's latents of one sample."""


def model_of(pipe: Any, frame_rate: float | None) -> FreeSwimModel:
    """A stock pipeline in the terms of FreeSwim.

    Args:
        pipe: a stock pipeline.
        frame_rate: frames a second, for a pipeline that takes the frame rate; the default of its
            call when None.

    Raises:
        ValueError: if the pipeline is not one of Wan or LTX-Video, or refuses the frame rate.
    """
    if type(pipe).__name__ == "LTXPipeline":
        rate = given_or_default(pipe, "frame_rate", frame_rate)
        check("frame_rate", rate, number(above=0))
        return LTX(pipe, rate)
    check_pipeline(pipe)
    if frame_rate is not None:
        raise ValueError(
            f"frame_rate is {frame_rate}, but {type(pipe).__name__} is not told how many frames"
            f" make a second; leave it out"
        )
    return Wan(pipe)


def check_pipeline(pipe: Any) -> None:
    """Raise ValueError unless the pipeline is a `WanPipeline` or an `LTXPipeline`."""
    name = type(pipe).__name__
    if name not in ("WanPipeline", "LTXPipeline"):
        raise ValueError(
            f"FreeSwim upscales with a WanPipeline or an LTXPipeline, not with a {name}; as a mask"
            f" alone FreeSwimAttn works on every family"
        )


def given_or_default(pipe: Any, argument: str, given: Any) -> Any:
    """The given value, or else the default of the pipeline's call."""
    if given is not None:
        return given
    return inspect.signature(type(pipe).__call__).parameters[argument].default


@dataclass(frozen=True)
class Wan:
    """A `diffusers.WanPipeline` with one expert or two."""

    pipe: Any

    least_steps: ClassVar[int] = 1

    def base_arguments(self, num_frames: int) -> dict[str, Any]:
        return {"num_frames": frames_to_ask_for(self.pipe, num_frames)}

    def encode_prompts(
        self, prompts: list[str], negative: list[str], guided: bool, max_sequence_length: int
    ) -> tuple[Text, Text | None]:
        text, without = self.pipe.encode_prompt(
            prompts,
            negative,
            guided,
            max_sequence_length=max_sequence_length,
            device=self.pipe._execution_device,
        )
        return (text, None), (without, None) if guided else None

    def set_timesteps(self, scheduler: Any, steps: int, device: torch.device) -> None:
        scheduler.set_timesteps(steps, device=device)

    def model_at(self, timestep: torch.Tensor | None) -> Any:
        first, second = self.pipe.transformer, self.pipe.transformer_2
        ratio = self.pipe.config.boundary_ratio
        if first is None:
            return second
        if ratio is None or timestep is None:
            return first
        early = timestep >= ratio * self.pipe.scheduler.config.num_train_timesteps
        return first if early else second

    def predict(
        self, model: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Text
    ) -> torch.Tensor:
        shape: tuple[int, ...] = (len(latents),)
        if self.pipe.config.expand_timesteps:
            sides = zip(latents.shape[2:], model.config.patch_size, strict=True)
            shape = (len(latents), math.prod(size // side for size, side in sides))
        out: torch.Tensor = model(
            hidden_states=latents,
            timestep=timestep.expand(shape),
            encoder_hidden_states=text[0],
            return_dict=False,
        )[0]
        return out

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.pipe.vae.config
        return torch.tensor(config.latents_mean), torch.tensor(config.latents_std)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return encode_all_frames(
            lambda frames: self.pipe.vae.encode(frames).latent_dist.mode(),
            pixels,
            self.pipe.vae_scale_factor_temporal,
        )

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        video: torch.Tensor = self.pipe.vae.decode(latents, return_dict=False)[0]
        return video


@dataclass(frozen=True)
class LTX:
    """A `diffusers.LTXPipeline`, whose position embedding depends on the frame rate."""

    pipe: Any
    frame_rate: float

    @property
    def least_steps(self) -> int:
        # Steps that are stretched to end at a given noise level need a first and a last.
        return 2 if self.pipe.scheduler.config.get("shift_terminal") else 1

    def base_arguments(self, num_frames: int) -> dict[str, Any]:
        return {"num_frames": num_frames, "frame_rate": self.frame_rate}

    def encode_prompts(
        self, prompts: list[str], negative: list[str], guided: bool, max_sequence_length: int
    ) -> tuple[Text, Text | None]:
        text, mask, without, mask_without = self.pipe.encode_prompt(
            prompts,
            negative,
            guided,
            max_sequence_length=max_sequence_length,
            device=self.pipe._execution_device,
        )
        return (text, mask), (without, mask_without) if guided else None

    def set_timesteps(self, scheduler: Any, steps: int, device: torch.device) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)

    def model_at(self, timestep: torch.Tensor | None) -> Any:
        return self.pipe.transformer

    def predict(
        self, model: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Text
    ) -> torch.Tensor:
        spatial = self.pipe.vae_spatial_compression_ratio
        temporal = self.pipe.vae_temporal_compression_ratio
        sizes = latents.shape[2:]
        # LTX takes one text for each sample of the latents.
        times = len(latents) // len(text[0])
        words, mask = (None if x is None else torch.cat([x] * times) for x in text)
        out: torch.Tensor = model(
            # A token is a latent.
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=words,
            timestep=timestep.expand(len(latents)),
            encoder_attention_mask=mask,
            num_frames=sizes[0],
            height=sizes[1],
            width=sizes[2],
            rope_interpolation_scale=(temporal / self.frame_rate, spatial, spatial),
            return_dict=False,
        )[0]
        # Guidance is taken in float32 here, as the pipeline does.
        return out.float().transpose(1, 2).unflatten(2, sizes)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        vae = self.pipe.vae
        return vae.latents_mean, vae.latents_std / vae.config.scaling_factor

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self.pipe.vae.encode(pixels).latent_dist.mode()
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        # The pipeline's default: latents without noise.
        timestep = latents.new_zeros(1) if vae.config.timestep_conditioning else None
        video: torch.Tensor = vae.decode(latents, timestep, return_dict=False)[0]
        return video
