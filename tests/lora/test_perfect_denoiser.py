"""A perfect denoiser of a clip, made of a recipe alone, in the stock pipeline gives the clip back.

The denoiser is replaced by a program that knows the clip. Of what the pipeline tells it, it infers
the noise and the time by the recipe's own `add_noise` and `model_times`, and answers with the
recipe's `target`. Signs, scales, normalisation, times and layouts that differ between a recipe and
the pipeline, or the scheduler that the model is published with, end in another clip.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from tiny_complete import COMPLETE, EDITING, CompleteCase
from torch import Tensor

from diffattn.lora.recipes import RECIPES, recipe_for
from diffattn.lora.recipes.base import Recipe
from diffattn.models import denoisers

STEPS = 8
Packing = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _sd(scheduler: Any) -> Callable[[], Any]:
    def build() -> Any:
        pipe = COMPLETE["sd1.5"].build()
        pipe.scheduler = scheduler
        return pipe

    return build


def _unipc() -> Any:
    pipe = COMPLETE["wan"].build()
    pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return pipe


def _schnell() -> Any:
    pipe = COMPLETE["flux"].build()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return pipe


# Stable Diffusion's own sampler stops before level 0, so that no denoiser gives the clip back.
CASES = (
    {name: case for name, case in COMPLETE.items() if name != "sd1.5"}
    | EDITING
    | {
        "wan-unipc": replace(COMPLETE["wan"], build=_unipc),
        "flux-schnell": replace(COMPLETE["flux"], build=_schnell),
        "sd1.5-ddim": replace(COMPLETE["sd1.5"], build=_sd(diffusers.DDIMScheduler())),
        "sd1.5-euler": replace(
            COMPLETE["sd1.5"],
            build=_sd(diffusers.EulerDiscreteScheduler(timestep_spacing="leading")),
        ),
        "sd2-v": replace(
            COMPLETE["sd1.5"], build=_sd(diffusers.DDIMScheduler(prediction_type="v_prediction"))
        ),
    }
)
# UniPC's pipeline tells the whole part of a timestep, and training the exact one.
TOLERANCE = {"wan-unipc": 0.03}


def packing(pipe: Any, case: CompleteCase) -> Packing:
    """From the pipeline's latents to (batch, channels, frames, height, width), and back."""
    height, width, num_frames = case.size
    match type(pipe).__name__:
        case "CogVideoXPipeline":
            return (lambda x: x.transpose(1, 2),) * 2
        case "LTXPipeline":
            ratio = pipe.vae_spatial_compression_ratio
            frames = (num_frames - 1) // pipe.vae_temporal_compression_ratio + 1
            sides = height // ratio, width // ratio
            return lambda x: pipe._unpack_latents(x, frames, *sides), pipe._pack_latents
        case (
            "FluxPipeline"
            | "QwenImagePipeline"
            | "QwenImageEditPipeline"
            | "QwenImageEditPlusPipeline"
            | "FluxKontextPipeline"
        ):
            scale = pipe.vae_scale_factor
            tokens = (height // scale // 2) * (width // scale // 2)
            return (
                lambda x: _with_frame(pipe._unpack_latents(x[:, :tokens], height, width, scale)),
                lambda x: pipe._pack_latents(x[:, :, 0], len(x), x.shape[1], *x.shape[3:]),
            )
        case "StableDiffusionPipeline" | "StableDiffusionXLPipeline" | "StableDiffusion3Pipeline":
            return lambda x: x[:, :, None], lambda x: x[:, :, 0]
        case "Flux2Pipeline" | "Flux2KleinPipeline":
            side = 2 * pipe.vae_scale_factor
            return (
                lambda x: x.transpose(1, 2).unflatten(2, (1, height // side, width // side)),
                lambda x: pipe._pack_latents(x[:, :, 0]),
            )
    return lambda x: x, lambda x: x


def _with_frame(latents: Tensor) -> Tensor:
    return latents if latents.ndim == 5 else latents[:, :, None]


def first_times(given: dict[str, Any]) -> Tensor:
    """What a call tells of each sample's time, (batch,)."""
    told = torch.as_tensor(given["timestep"]).double()
    told = told[:, 0] if told.ndim == 2 else told
    latents = given["sample" if "sample" in given else "hidden_states"]
    return told.expand(len(latents))


class Perfect:
    """The perfect denoiser of a clip.

    Attributes:
        times: the times of its calls, by the recipe.
        noises: the noise that it infers in each call.
    """

    def __init__(
        self, pipe: Any, recipe: Recipe, clip: Tensor, packing: Packing, sign: int
    ) -> None:
        self.pipe, self.recipe, self.clip, self.sign = pipe, recipe, clip, sign
        self.unpack, self.pack = packing
        self.times: list[float] = []
        self.noises: list[Tensor] = []
        self.model = getattr(pipe, recipe.denoiser)
        self.signature = inspect.signature(self.model.forward)

    def _answer(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        given = self.signature.bind(*args, **kwargs).arguments
        latents = given["sample" if "sample" in given else "hidden_states"]
        noisy = self.unpack(latents).double()
        times = self._times(first_times(given))
        clip = self.clip.double().expand(noisy.shape)
        scheduler, add = self.pipe.scheduler, self.recipe.add_noise
        zero, one = torch.zeros_like(noisy), torch.ones_like(noisy)
        # The mixture is a sum of a multiple of the clip and a multiple of the noise.
        strength = add(scheduler, zero, one, times)
        noise = (noisy - add(scheduler, clip, zero, times)) / strength
        self.times.append(float(times[0]))
        self.noises.append(noise[:1])
        target = self.recipe.target(scheduler, clip, noise, times)
        return (self.pack(self.sign * target).to(latents.dtype),)

    def _times(self, told: Tensor) -> Tensor:
        """The times that the recipe's call of the denoiser would tell so."""
        if self.recipe.prediction != "flow":
            return told.long()
        start, end = (self._told(time) for time in (0.0, 1.0))
        return (told - start) / (end - start)

    def _told(self, time: float) -> float:
        calls: list[float] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            calls.append(float(first_times(self.signature.bind(*args, **kwargs).arguments)[0]))
            raise StopIteration

        if self.recipe.edits:
            conditions = self.recipe.encode_source(self.pipe, torch.zeros(1, 3, 1, 32, 64), "")
        else:
            conditions = self.recipe.encode_prompt(self.pipe, [""])
        answer, self.model.forward = self.model.forward, note
        try:
            with pytest.raises(StopIteration):
                self.recipe.predict(self.model, self.clip, torch.tensor([time]), conditions)
        finally:
            self.model.forward = answer
        return calls[0]


def given_back(name: str, sign: int = 1) -> tuple[Tensor, Tensor, dict[str, Perfect]]:
    """The pipeline's latents, the clip's latents, and the denoisers, by component."""
    case = CASES[name]
    pipe = case.build()
    height, width, num_frames = case.size
    generator = torch.Generator().manual_seed(5)
    pixels = 2 * torch.rand(1, 3, num_frames, height, width, generator=generator) - 1
    recipes = [recipe_for(pipe, part, case.text_length) for part in denoisers(pipe)]
    clip = recipes[0].encode_clip(pipe, pixels, None)
    perfect = {r.denoiser: Perfect(pipe, r, clip, packing(pipe, case), sign) for r in recipes}
    with torch.no_grad():
        for one in perfect.values():
            one.model.forward = one._answer
        made = case.run(pipe, "a cat", steps=STEPS, output_type="latent")
    return recipes[0].from_pipeline(torch.as_tensor(made), height, width), clip, perfect


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_every_recipe_is_here() -> None:
    assert {recipe_for(CASES[name].build()).family for name in CASES} == set(RECIPES)


@pytest.mark.parametrize("name", CASES)
def test_the_clip_comes_back(name: str) -> None:
    found, clip, perfect = given_back(name)
    assert found.shape == clip.shape
    assert distance(found, clip) < TOLERANCE.get(name, 2e-5)
    for one in perfect.values():
        assert one.times, "the denoiser was not called"
        low, high = one.recipe.noise_range
        if one.recipe.prediction == "flow":
            assert all(low - 1e-6 <= time <= high + 1e-6 for time in one.times)
            first = one.noises[0]
            for noise in one.noises:
                assert distance(noise, first) < TOLERANCE.get(name, 2e-5)


@pytest.mark.parametrize(
    "name", ["wan", "mochi", "cogvideox-2b", "flux.2", "qwen-image", "sd3", "sdxl"]
)
def test_the_other_sign_gives_something_else(name: str) -> None:
    found, clip, _ = given_back(name, sign=-1)
    assert distance(found, clip) > 1
