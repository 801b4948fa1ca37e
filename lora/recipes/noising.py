"""Noise in training: the kinds of prediction, noise levels, and mixtures of latents and noise."""

from __future__ import annotations

from typing import Any, Literal, get_args

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


def default_shift(scheduler: Any) -> float:
    """The time shift of a flow scheduler.

    The shift is 1 for a scheduler whose shift depends on the number of tokens, as in the published
    trainers of Flux.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting", False):
        return 1.0
    return float(config.get("shift", config.get("flow_shift", 1.0)))


def sample_levels(
    batch: int, generator: torch.Generator, shift: float, bounds: tuple[float, float]
) -> Tensor:
    """Draw noise levels from the shifted logit-normal distribution between two bounds.

    A level is `shift * u / (1 + (shift - 1) * u)` where u is the sigmoid of a normal number. The
    distribution is conditioned on levels between the bounds.

    Args:
        batch: number of levels.
        generator: the source of random numbers, one number for each level.
        shift: the time shift; above 1 favours strong noise.
        bounds: lowest and highest level, 0 <= low < high <= 1.

    Returns:
        float32 (batch,), on the generator's device.
    """
    # The shift adds its logarithm to the logit of u: bounds on the level are bounds on the normal
    # number. The dtype is float64, as steps of float32 are coarse near 1.
    edges = torch.tensor(bounds, dtype=torch.float64, device=generator.device)
    low, high = torch.special.ndtr(edges.logit() - torch.tensor(shift).double().log()).unbind()
    even = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
    # The normal numbers for 0 and 1 would be infinite.
    place = (low + (high - low) * even).clamp(1e-12, 1 - 1e-12)
    normal = torch.special.ndtri(place)
    return torch.sigmoid(normal + torch.tensor(shift).double().log()).float()


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
