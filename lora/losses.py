"""What a sparse denoiser is trained to do: its own objective, and what the dense model does.

Three losses, each a mean over everything and in float32, each with a weight:

- objective: the model's own, flow matching or the prediction of noise or velocity;
- prediction: the distance to what the dense model predicts for the same input (distillation);
- attention: the distance to the dense model's attention outputs, each model on its own hidden
  states, averaged over sites.

With the weights 1, 0.5 and 0.5 they are CLEAR's and LinFusion's. The dense model is the same one
with its LoRA switched off and dense attention: no second copy is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from diffattn.attach.sites import site_names
from diffattn.lora.recipes.base import Recipe
from diffattn.lora.settings import TrainSettings
from diffattn.models import family_of

if TYPE_CHECKING:
    from diffattn.attach.attachment import Attachment


@dataclass(frozen=True)
class Batch:
    """Samples with everything random about them drawn.

    Attributes:
        latents: (batch, channels, latent frames, height, width).
        noise: the same shape.
        times: (batch,), as the recipe draws them.
        conditions: what the denoiser is told, batch first.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    conditions: dict[str, torch.Tensor]


class Student(torch.nn.Module):
    """A sparse denoiser with its losses: the module that is trained.

    It holds the denoiser and calls it twice where there is something to learn from the dense one,
    so that everything a training framework wraps around it sees one call.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        scheduler: Any,
        attachment: Attachment,
        settings: TrainSettings,
    ) -> None:
        super().__init__()
        self.model = model
        settings = settings.completed()
        self.weights = {
            "objective": settings.objective or 0.0,
            "prediction": settings.prediction or 0.0,
            "attention": settings.attention_output or 0.0,
        }
        names = site_names(model, family_of(model))[:: settings.attention_every]
        self._sites = [model.get_submodule(name) for name in names]
        self._recipe, self._scheduler, self._attachment = recipe, scheduler, attachment

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses that have a weight, and "loss", their weighted sum."""
        recipe, scheduler = self._recipe, self._scheduler
        noisy = recipe.add_noise(scheduler, batch.latents, batch.noise, batch.times)
        self._attachment.leave_run()
        taught: torch.Tensor | None = None
        attended: list[torch.Tensor] = []
        if self.weights["prediction"] or self.weights["attention"]:
            with torch.no_grad(), dense_teacher(self.model, self._attachment):
                taught, attended = self._predict(noisy, batch)
        predicted, outputs = self._predict(noisy, batch)
        losses: dict[str, torch.Tensor] = {}
        if self.weights["objective"]:
            target = recipe.target(scheduler, batch.latents, batch.noise, batch.times)
            losses["objective"] = F.mse_loss(predicted.float(), target.float())
        if self.weights["prediction"]:
            assert taught is not None
            losses["prediction"] = F.mse_loss(predicted.float(), taught.float())
        if self.weights["attention"]:
            losses["attention"] = mean_distance(outputs, attended)
        weighted = [self.weights[name] * loss for name, loss in losses.items()]
        return losses | {"loss": torch.stack(weighted).sum()}

    def _predict(
        self, noisy: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The prediction, and the attention outputs if they are compared."""
        with ExitStack() as stack:
            outputs: list[torch.Tensor] = []
            if self.weights["attention"]:
                outputs = stack.enter_context(attention_outputs(self._sites))
            predicted = self._recipe.predict(self.model, noisy, batch.times, batch.conditions)
            # A copy: computing activations again for the backward pass calls the sites again.
            return predicted, list(outputs)


@contextmanager
def dense_teacher(model: Any, attachment: Attachment) -> Iterator[None]:
    """Make a denoiser the dense model that its LoRA started from, for the while."""
    model.disable_adapters()
    try:
        with attachment.dense():
            yield
    finally:
        model.enable_adapters()


@contextmanager
def attention_outputs(sites: Sequence[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collect what attention modules return, in the order of their calls.

    Those of joint attention return video and text tokens: the video's are kept.
    """
    outputs: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [site.register_forward_hook(keep) for site in sites]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def mean_distance(
    outputs: Sequence[torch.Tensor], references: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The mean over pairs of their mean squared distance in float32."""
    distances = [
        F.mse_loss(output.float(), reference.float())
        for output, reference in zip(outputs, references, strict=True)
    ]
    return torch.stack(distances).mean()
