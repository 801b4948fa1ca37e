"""Noise in training: the kinds of prediction, noise levels, and mixtures of latents and noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from diffattn.lora.errors import LoraError

Prediction = Literal["flow", "epsilon", "v_prediction"]


def prediction_of(scheduler: Any) -> Prediction:
    """The kind of model output that a pipeline's scheduler expects.

    Raises:
        LoraError: if there is no scheduler, or the scheduler expects an unknown kind of output.
    """
    config = getattr(scheduler, "config", None)
    if config is None:
        raise LoraError(
            "the model has no scheduler, whose configuration says what the model predicts: load the"
            " whole pipeline, its scheduler folder included"
        )
    name = type(scheduler).__name__
    if "FlowMatch" in name:
        return "flow"
    kind = config.get("prediction_type", "epsilon")
    if kind == "flow_prediction":
        return "flow"
    if kind not in get_args(Prediction):
        raise LoraError(
            f"the prediction_type of {name} is {kind!r}, but training knows flow_prediction,"
            f" epsilon and v_prediction"
        )
    if not hasattr(scheduler, "alphas_cumprod"):
        raise LoraError(
            f"{name} has no alphas_cumprod, which say how much noise a timestep of {kind} has"
        )
    return kind


class Steps(Protocol):
    """The noise levels of sampling by a flow, by the place in a run: 1 is its start, 0 its end.

    Places and levels are float64 tensors of numbers from 0 to 1.
    """

    def level(self, place: Tensor) -> Tensor: ...

    def place(self, level: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Shifted:
    """Even steps with a time shift; a shift above 1 makes more of them at strong noise."""

    shift: float

    def level(self, place: Tensor) -> Tensor:
        return self.shift * place / (1 + (self.shift - 1) * place)

    def place(self, level: Tensor) -> Tensor:
        return level / (self.shift - (self.shift - 1) * level)

    def __str__(self) -> str:
        return f"shift {self.shift:.3g}"


@dataclass(frozen=True)
class LinearQuadratic:
    """Mochi's steps: half of them take off `threshold` of the noise evenly, then they grow.

    Attributes:
        threshold: the noise that the first half takes off.
    """

    threshold: float = 0.025

    def level(self, place: Tensor) -> Tensor:
        late = (1 - 2 * place).clamp(min=0)
        return 1 - 2 * self.threshold * (1 - place) - (1 - 2 * self.threshold) * late**2

    def place(self, level: Tensor) -> Tensor:
        gone, first, second = 1 - level, self.threshold, 1 - 2 * self.threshold
        root = (first**2 + 4 * second * (gone - first).clamp(min=0)).sqrt()
        late = (root - first) / (2 * second)
        return torch.where(gone <= first, 1 - gone / (2 * first), (1 - late) / 2)

    def __str__(self) -> str:
        return "along the linear-quadratic steps of sampling"


def shift_of(scheduler: Any, tokens: int | None) -> float:
    """The time shift of a flow scheduler.

    Args:
        scheduler: the scheduler.
        tokens: the tokens that a dynamic shift depends on; None for a pipeline that gives its
            scheduler no such number.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False) or tokens is None:
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    shift = low + (high - low) * (tokens - few) / (many - few)
    return shift if config.get("time_shift_type") == "linear" else math.exp(shift)


def sample_levels(
    batch: int,
    generator: torch.Generator,
    steps: Steps,
    distribution: str,
    bounds: tuple[float, float],
) -> Tensor:
    """Draw noise levels between two bounds.

    The place in a run of sampling is drawn, and the level is the level there. So "uniform" draws
    each level as often as sampling visits it, and "logit-normal" favours the middle of the run. The
    distribution is conditioned on levels between the bounds.

    Args:
        batch: number of levels.
        generator: the source of random numbers, one number for each level.
        steps: the levels of sampling.
        distribution: that of the places, one of `diffattn.lora.settings.NOISE_LEVELS`.
        bounds: lowest and highest level, 0 <= low < high <= 1.

    Returns:
        float32 (batch,), on the generator's device.
    """
    edges = torch.tensor(bounds, dtype=torch.float64, device=generator.device)
    low, high = _share_below(steps.place(edges), distribution).unbind()
    # The dtype is float64, as steps of float32 are coarse near 1.
    even = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
    # The normal numbers for 0 and 1 would be infinite.
    share = (low + (high - low) * even).clamp(1e-12, 1 - 1e-12)
    place = share if distribution == "uniform" else torch.special.ndtri(share).sigmoid()
    return steps.level(place).float()


def share_above(
    level: float, steps: Steps, distribution: str, bounds: tuple[float, float]
) -> float:
    """The share of the levels of `sample_levels` that are above a level between the bounds."""
    edges = torch.tensor((*bounds, level), dtype=torch.float64)
    low, high, below = _share_below(steps.place(edges), distribution).tolist()
    return (high - below) / (high - low)


def _share_below(places: Tensor, distribution: str) -> Tensor:
    """The share of the drawn places that are below places."""
    # The place of 1 may be a little above 1.
    places = places.clamp(0, 1)
    return places if distribution == "uniform" else torch.special.ndtr(places.logit())


def mix(latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """Latents at noise levels (batch,): level 0 is clean, level 1 is noise alone."""
    level = _spread(levels, latents)
    return (1 - level) * latents + level * noise


def amplitudes(scheduler: Any, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The amplitudes of signal and noise at timesteps (batch,), broadcasting to `like`.

    The squares of the two amplitudes add up to 1, for any scaling that the scheduler uses in
    sampling.
    """
    kept = scheduler.alphas_cumprod.to(times.device)[times]
    return _spread(kept.sqrt(), like), _spread((1 - kept).sqrt(), like)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    shape = (-1, *(1 for _ in like.shape[1:]))
    return values.view(shape).to(like.device, like.dtype)
