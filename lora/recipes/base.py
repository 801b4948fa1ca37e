"""What is particular to training a model family: latents, text, noise, target, and the call."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from diffattn.lora.errors import LoraError
from diffattn.lora.recipes import noising
from diffattn.lora.recipes.noising import Prediction


@dataclass(frozen=True)
class Recipe(ABC):
    """How a denoiser is trained as its pipeline calls it.

    Latents are (batch, channels, latent frames, height, width) for every family, normalised as the
    denoiser takes them; images have one frame. What a denoiser wants to have them as, its
    `predict` knows.

    Attributes:
        family: name in `diffattn.models.FAMILIES`.
        denoiser: the pipeline's component that this is for, such as "transformer".
        prediction: what the denoiser predicts.
        dtype: that of the denoiser's weights and inputs.
        text_length: tokens that prompts are padded to.
        timesteps: how many training timesteps the scheduler counts.
        noise_range: the noise levels that this denoiser sees in sampling; of a flow only.
        inverted: whether the denoiser counts from noise to clean, as Mochi does; of a flow only.
    """

    family: str
    denoiser: str
    prediction: Prediction
    dtype: torch.dtype
    text_length: int
    timesteps: int
    noise_range: tuple[float, float] = (0.0, 1.0)
    inverted: bool = False

    @abstractmethod
    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents, float32, of clips (batch, 3, frames, height, width) in [-1, 1].

        They are drawn from what the VAE's encoder says with `generator`; its mean without one.
        """

    @abstractmethod
    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """What the denoiser is told of each prompt: tensors with the batch first."""

    @abstractmethod
    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """Call the denoiser as its pipeline does; differentiable.

        Args:
            model: the denoiser, or what wraps it.
            noisy: latents with noise, from `add_noise`.
            times: (batch,), from `sample_times`.
            conditions: from `encode_prompt`.

        Returns:
            The prediction in the shape of `noisy`, to be compared with `target`.
        """

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents of a recipe from those that its pipeline returns for `output_type="latent"`.

        Args:
            latents: as the pipeline returns them.
            height, width: pixels of the pipeline's call.
        """
        return latents

    def at_rate(self, fps: float | None) -> Self:
        """The recipe for clips of so many frames a second, where the denoiser is told; or None."""
        return self

    def call_arguments(self, pipe: Any, num_frames: int) -> dict[str, Any]:
        """What the pipeline's call must be given to make so many frames, as the recipe has them."""
        ours = {"num_frames": num_frames, "max_sequence_length": self.text_length}
        known = inspect.signature(type(pipe).__call__).parameters
        return {name: value for name, value in ours.items() if name in known}

    def sample_times(
        self,
        scheduler: Any,
        batch: int,
        generator: torch.Generator,
        shift: float | None = None,
    ) -> Tensor:
        """Draw times to train at, (batch,), on the generator's device.

        For a flow they are noise levels in (0, 1) of a logit-normal distribution with a time shift
        (the scheduler's own unless given), within `noise_range`; otherwise timesteps, all of them
        equally often.
        """
        if self.prediction == "flow":
            shift = noising.default_shift(scheduler) if shift is None else shift
            if shift <= 0:
                raise LoraError(f"shift is {shift}, but must be above 0 (1 shifts nothing)")
            return noising.sample_levels(batch, generator, shift, self.noise_range)
        if shift is not None:
            raise LoraError(
                f"shift is {shift}, but this model predicts {self.prediction}, whose timesteps are"
                f" drawn equally often: leave it out"
            )
        device = generator.device
        return torch.randint(self.timesteps, (batch,), generator=generator, device=device)

    def add_noise(self, scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents with as much of the noise as there is at `times`."""
        if self.prediction == "flow":
            return noising.mix(latents, noise, times)
        signal, strength = noising.amplitudes(scheduler, times, latents)
        return signal * latents + strength * noise

    def target(self, scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What a perfect denoiser predicts."""
        if self.prediction == "flow":
            return latents - noise if self.inverted else noise - latents
        if self.prediction == "epsilon":
            return noise
        signal, strength = noising.amplitudes(scheduler, times, latents)
        return signal * noise - strength * latents

    def model_times(self, times: Tensor) -> Tensor:
        """The timesteps that the denoiser is told."""
        if self.prediction != "flow":
            return times
        return (1 - times if self.inverted else times) * self.timesteps


def common_settings(
    pipe: Any, family: str, denoiser: str, text_length: int | None, flow: bool
) -> dict[str, Any]:
    """The settings that every recipe has, read from a pipeline.

    Args:
        pipe: the pipeline.
        family: name of the family.
        denoiser: name of the component.
        text_length: tokens that prompts are padded to; those of the pipeline's call when None.
        flow: whether models of this family are flows.

    Raises:
        LoraError: if the scheduler is missing or is none for such models.
    """
    prediction = noising.prediction_of(pipe.scheduler)
    if (prediction == "flow") != flow:
        kind = "a flow" if flow else "epsilon or v"
        raise LoraError(
            f"{type(pipe.scheduler).__name__} takes the model's output for {prediction}, but models"
            f" of {family} predict {kind}: give the pipeline the scheduler it was published with"
        )
    if text_length is None:
        text_length = call_default(pipe, "max_sequence_length")
    config = pipe.scheduler.config
    return {
        "family": family,
        "denoiser": denoiser,
        "prediction": prediction,
        "dtype": getattr(pipe, denoiser).dtype,
        "text_length": text_length,
        "timesteps": config.num_train_timesteps,
        "inverted": config.get("invert_sigmas", False),
    }


def call_default(pipe: Any, name: str) -> Any:
    """What a pipeline's call takes for an argument that is not given."""
    return inspect.signature(type(pipe).__call__).parameters[name].default


def encode_pixels(pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    """What the VAE's encoder makes of pixels, float32, not normalised."""
    # An offloaded VAE is elsewhere until it is called.
    pixels = pixels.to(pipe._execution_device, pipe.vae.dtype)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    drawn = posterior.mode() if generator is None else posterior.sample(generator)
    return drawn.float()


def per_channel(values: Any, latents: Tensor) -> Tensor:
    """A value per channel, to be combined with latents (batch, channels, ...)."""
    shape = (1, -1, *(1 for _ in latents.shape[2:]))
    return torch.as_tensor(values, dtype=latents.dtype, device=latents.device).view(shape)


def one_by_one(prompts: list[str], encode: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Encode each prompt alone, so that what comes out does not depend on the others."""
    with torch.no_grad():
        encoded = [encode(prompt) for prompt in prompts]
    return {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}


def refuse_conditions(denoiser: Any, wanted: bool) -> None:
    """Refuse a denoiser that is conditioned on more than text."""
    if not wanted:
        raise LoraError(
            f"this {type(denoiser).__name__} is conditioned on more than text (an image, a mask, a"
            f" control video): there are recipes for text-to-video and text-to-image models only"
        )
