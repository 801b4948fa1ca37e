"""The losses of a sparse denoiser: the model's own objective, and the distances to the dense model.

There are three losses. Each is a float32 mean over all elements, and has a weight:

- objective: the model's own objective, flow matching or the prediction of noise or velocity;
- prediction: the distance to the dense model's prediction for the same input (distillation);
- attention: the distance to the dense model's attention outputs, averaged over sites; each model
  runs on its own hidden states.

CLEAR and LinFusion use the weights 1, 0.5 and 0.5. The dense model is the same denoiser with the
LoRA switched off and dense attention: there is no second copy.
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
    """Samples after all random draws.

    Attributes:
        latents: (batch, channels, latent frames, height, width).
        noise: (batch, channels, latent frames, height, width).
        times: (batch,), as `Recipe.sample_times` draws them.
        conditions: the denoiser's conditions by name, batch first.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    conditions: dict[str, torch.Tensor]


class Student(torch.nn.Module):
    """A sparse denoiser with its losses: the module that is trained.

    The module calls the denoiser twice if a loss compares it with the dense model. Wrappers of a
    training framework around the module see a single call.
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
        """The losses with a weight above 0 by name, and their weighted sum, "loss"."""
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
        """The prediction, and the attention outputs if the attention loss has a weight."""
        with ExitStack() as stack:
            outputs: list[torch.Tensor] = []
            if self.weights["attention"]:
                outputs = stack.enter_context(attention_outputs(self._sites))
            predicted = self._recipe.predict(self.model, noisy, batch.times, batch.conditions)
            # The copy stays unchanged when gradient checkpointing calls the sites again.
            return predicted, list(outputs)


@contextmanager
def dense_teacher(model: Any, attachment: Attachment) -> Iterator[None]:
    """Make a denoiser the dense model without its LoRA while the block runs."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.disable_adapters()
    try:
        with attachment.dense():
            yield
    finally:
        model.enable_adapters()
        # peft takes a LoRA that is on for one that is being trained.
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def attention_outputs(sites: Sequence[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of attention modules, in the order of their calls.

    Modules of joint attention return video and text tokens; only the video tokens are kept.

    Yields:
        The list of outputs, which grows while the block runs.
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
    """The mean squared distance of each pair of tensors in float32, averaged over the pairs."""
    distances = [
        F.mse_loss(output.float(), reference.float())
        for output, reference in zip(outputs, references, strict=True)
    ]
    return torch.stack(distances).mean()
