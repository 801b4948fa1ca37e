"""The training recipe of a model family: latents, text, noise, target, and the denoiser's call."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from diffattn.lora.errors import LoraError
from diffattn.lora.recipes import noising
from diffattn.lora.recipes.noising import Prediction
from diffattn.lora.settings import USUAL_LEVELS, TrainSettings

# The noise level from which on the layout of a video is decided.
_STRONG = 0.9


@dataclass(frozen=True)
class Recipe(ABC):
    """The recipe for training a denoiser with the same inputs as in its pipeline.

    Latents are (batch, channels, latent frames, height, width) for every family, with the
    denoiser's normalisation; images have one frame. `predict` converts latents to the denoiser's
    own format.

    Attributes:
        family: the family's name in `diffattn.models.FAMILIES`.
        denoiser: the pipeline's component to train, such as "transformer".
        prediction: the quantity that the denoiser predicts.
        dtype: the dtype of the denoiser's weights and inputs.
        text_length: tokens that prompts are padded to.
        timesteps: number of the scheduler's training timesteps.
        noise_range: lowest and highest noise level of this denoiser in sampling; for flows only.
        inverted: whether time runs from noise to clean, as in Mochi; for flows only.
        guidance: the guidance scale among the denoiser's inputs, which guidance is distilled into;
            None for a denoiser without this input.
        edits: whether the denoiser edits pictures, so that each clip has a picture that the clip
            was edited from, the source, and `encode_source` gives the conditions.
    """

    edits: ClassVar[bool] = False

    family: str
    denoiser: str
    prediction: Prediction
    dtype: torch.dtype
    text_length: int
    timesteps: int
    noise_range: tuple[float, float] = (0.0, 1.0)
    inverted: bool = False
    guidance: float | None = None

    @abstractmethod
    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Encode clips by the pipeline's VAE.

        Args:
            pipe: the pipeline.
            pixels: (batch, 3, frames, height, width) in [-1, 1].
            generator: draws the latents from the VAE's posterior; None takes the posterior's mode.

        Returns:
            float32 (batch, channels, latent frames, height, width).
        """

    @abstractmethod
    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The denoiser's conditions for each prompt: tensors by name, batch first."""

    @abstractmethod
    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """Call the denoiser as its pipeline does; differentiable.

        Args:
            model: the denoiser, or a wrapper of the denoiser.
            noisy: latents with noise, from `add_noise`.
            times: (batch,), from `sample_times`.
            conditions: the conditions from `encode_prompt`.

        Returns:
            The prediction in the shape of `noisy`, to be compared with `target`.
        """

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The recipe's latents from a pipeline's result with `output_type="latent"`.

        Args:
            latents: the pipeline's result.
            height, width: pixels of the pipeline's call.

        Returns:
            (batch, channels, latent frames, height, width).
        """
        return latents

    def encode_origin(
        self, fps: float | None, size: tuple[int, int], crop: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The denoiser's conditions by the file of a clip, batch first.

        Args:
            fps: frames a second; None for a picture.
            size: rows and columns in the file.
            crop: rows above and columns left of the picture, cut off after it was scaled.

        Returns:
            The conditions by their names; nothing for a denoiser without such inputs.
        """
        return {}

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """The rows and columns of a source for clips of height x width pixels."""
        return height, width

    def encode_source(self, pipe: Any, pixels: Tensor, caption: str) -> dict[str, Tensor]:
        """The denoiser's conditions for a source and a caption, batch first.

        Args:
            pipe: the pipeline.
            pixels: (1, 3, 1, height, width) in [-1, 1], of the `source_size`.
            caption: the instruction.

        Raises:
            LoraError: if the model does not edit, or the caption is too long.
        """
        raise LoraError(f"this {self.family} model edits no pictures: there are no sources")

    def encode_empty(self, pipe: Any) -> dict[str, Tensor]:
        """The denoiser's conditions for the empty caption, batch first; see `told`."""
        return self.encode_prompt(pipe, [""])

    def told(
        self, conditions: dict[str, Tensor], empty: dict[str, Tensor], dropped: bool
    ) -> dict[str, Tensor]:
        """The conditions of a sample, without batch axis.

        Args:
            conditions: the conditions of the clip.
            empty: the conditions of the empty caption.
            dropped: whether the empty caption takes the place of the clip's.
        """
        # Conditions beside the text, such as the frame rate, stay.
        return conditions | empty if dropped else conditions

    def at_rate(self, fps: float | None) -> Self:
        """The recipe for clips of `fps` frames a second; None for the pipeline's default.

        Only a denoiser with the frame rate among its inputs has another recipe.
        """
        return self

    def at_guidance(self, scale: float | None) -> Self:
        """The recipe that tells the denoiser the guidance scale `scale`; None for the present one.

        A denoiser without this input has one recipe for all scales.
        """
        return self if None in (scale, self.guidance) else replace(self, guidance=scale)

    def check_settings(self, settings: TrainSettings) -> None:
        """Raise LoraError if a setting means nothing for the recipe's model."""
        for name in ("guidance", "teacher_guidance"):
            value = getattr(settings, name)
            if value is not None and self.guidance is None:
                raise LoraError(
                    f"{name} is {value:g}, but this {self.family} model has no guidance scale among"
                    f" its inputs: leave it out"
                )
        self._check_levels(settings.shift, settings.noise_levels)

    def call_arguments(self, pipe: Any, num_frames: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for a video of `num_frames` frames by this recipe."""
        ours = {"num_frames": num_frames, "max_sequence_length": self.text_length}
        known = inspect.signature(type(pipe).__call__).parameters
        return {name: value for name, value in ours.items() if name in known}

    def tokens_of_shift(self, size: Sequence[int]) -> int | None:
        """The number that the pipeline gives its scheduler for a dynamic shift, if it gives one.

        Args:
            size: latent frames, height and width.
        """
        return None

    def steps(self, scheduler: Any, size: Sequence[int], shift: float | None) -> noising.Steps:
        """The noise levels of sampling by a flow.

        Args:
            scheduler: the pipeline's scheduler.
            size: latent frames, height and width.
            shift: the time shift of even steps, above 0; None for the steps of the pipeline.

        Raises:
            LoraError: if the shift is not above 0.
        """
        if shift is None:
            shift = noising.shift_of(scheduler, self.tokens_of_shift(size))
        if shift <= 0:
            raise LoraError(f"shift is {shift}, but must be above 0 (1 shifts nothing)")
        return noising.Shifted(shift)

    def sample_times(
        self,
        scheduler: Any,
        batch: int,
        generator: torch.Generator,
        size: Sequence[int],
        shift: float | None = None,
        noise_levels: str | None = None,
    ) -> Tensor:
        """Draw the times of a batch.

        For a flow, times are noise levels within `noise_range`, see `noising.sample_levels`.
        Otherwise times are timesteps from a uniform distribution.

        Args:
            scheduler: the pipeline's scheduler.
            batch: number of times.
            generator: the source of random numbers.
            size: latent frames, height and width.
            shift: the time shift, above 0; None for the steps of the pipeline. For flows only.
            noise_levels: the distribution along the steps; None for "logit-normal". For flows only.

        Returns:
            (batch,) on the generator's device: float32 for a flow, int64 otherwise.

        Raises:
            LoraError: if the shift is not above 0, or an argument is given that is for flows only.
        """
        self._check_levels(shift, noise_levels)
        if self.prediction == "flow":
            steps = self.steps(scheduler, size, shift)
            distribution = noise_levels or USUAL_LEVELS
            return noising.sample_levels(batch, generator, steps, distribution, self.noise_range)
        device = generator.device
        return torch.randint(self.timesteps, (batch,), generator=generator, device=device)

    def about_times(self, scheduler: Any, size: Sequence[int], settings: TrainSettings) -> str:
        """A line about the times that a training draws for latents of a size."""
        if self.prediction != "flow":
            return f"timesteps: all {self.timesteps} equally often"
        low, high = self.noise_range
        between = "" if (low, high) == (0, 1) else f", from {low:g} to {high:g}"
        steps = self.steps(scheduler, size, settings.shift)
        distribution = settings.noise_levels or USUAL_LEVELS
        line = f"noise levels: {distribution}, {steps}{between}"
        if not low < _STRONG < high:
            return line
        share = noising.share_above(_STRONG, steps, distribution, self.noise_range)
        return f"{line}; {share:.0%} of them above {_STRONG:g}"

    def _check_levels(self, shift: float | None, noise_levels: str | None) -> None:
        """Raise LoraError if one of these is given for a model that is no flow."""
        for name, value in (("shift", shift), ("noise_levels", noise_levels)):
            if value is not None and self.prediction != "flow":
                raise LoraError(
                    f"{name} is {value}, but this model predicts {self.prediction}, whose timesteps"
                    f" are drawn equally often: leave it out"
                )

    def add_noise(self, scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents with noise at `times`, in the shape of `latents`."""
        if self.prediction == "flow":
            return noising.mix(latents, noise, times)
        signal, strength = noising.amplitudes(scheduler, times, latents)
        return signal * latents + strength * noise

    def target(self, scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The prediction of a perfect denoiser, in the shape of `latents`."""
        if self.prediction == "flow":
            return latents - noise if self.inverted else noise - latents
        if self.prediction == "epsilon":
            return noise
        signal, strength = noising.amplitudes(scheduler, times, latents)
        return signal * noise - strength * latents

    def model_times(self, times: Tensor) -> Tensor:
        """The timesteps among the denoiser's inputs at `times`, (batch,)."""
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
        text_length: tokens that prompts are padded to; the default of the pipeline's call when
            None.
        flow: whether models of this family are flows.

    Returns:
        The attributes of `Recipe`, by name.

    Raises:
        LoraError: if the scheduler is missing, or does not fit models of the family.
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
    """The default of an argument of a pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters[name].default


def encode_pixels(pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    """The float32 output of the VAE's encoder, without normalisation; see `Recipe.encode_clip`."""
    # An offloaded VAE moves to the execution device when called.
    pixels = pixels.to(pipe._execution_device, pipe.vae.dtype)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    drawn = posterior.mode() if generator is None else posterior.sample(generator)
    return drawn.float()


def per_channel(values: Any, latents: Tensor) -> Tensor:
    """Values per channel as a tensor that broadcasts over latents (batch, channels, ...)."""
    shape = (1, -1, *(1 for _ in latents.shape[2:]))
    return torch.as_tensor(values, dtype=latents.dtype, device=latents.device).view(shape)


def one_by_one(prompts: list[str], encode: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Encode each prompt alone, so that no result depends on other prompts; batch first."""
    with torch.no_grad():
        encoded = [encode(prompt) for prompt in prompts]
    return {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}


def refuse_conditions(denoiser: Any, wanted: bool) -> None:
    """Raise LoraError, for a denoiser that is conditioned on more than text, unless `wanted`."""
    if not wanted:
        raise LoraError(
            f"this {type(denoiser).__name__} is conditioned on more than text (an image, a mask, a"
            f" control video): there are recipes for text-to-video and text-to-image models only"
        )
