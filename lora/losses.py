"""The losses of a sparse denoiser: the model's own objective, and the distances to the dense model.

There are three losses. Each is a float32 mean over all elements, and has a weight:

- objective: the model's own objective, flow matching or the prediction of noise or velocity;
- prediction: the distance to the dense model's prediction for the same input (distillation);
- attention: the distance to the dense model's attention outputs, averaged over sites; each model
  runs on its own hidden states.

CLEAR and LinFusion use the weights 1, 0.5 and 0.5. The dense model is the same denoiser with the
LoRA switched off and dense attention: there is no second copy.

A denoiser with a guidance scale among its inputs is told two scales. The model's own objective is
that of clips, which are not guided: the scale is 1. With any other scale the LoRA would learn to
undo the guidance. The dense model is imitated at the scale of sampling. If there are losses of both
kinds, and two scales, the sparse denoiser is called twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch.nn import functional as F

from diffattn.attach.sites import site_names
from diffattn.lora.attention_distance import attention_distances, attention_outputs
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

    The module calls the denoiser up to three times: as the dense model, in comparison with it, and
    for the model's own objective. Wrappers of a training framework around the module see a single
    call.
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
        # The layers that FSDP spreads one by one. diffusers also names layers of other variants.
        present = {type(module).__name__ for module in model.modules()}
        named = getattr(model, "_no_split_modules", None) or []
        self._no_split_modules = [name for name in named if name in present]
        settings = settings.completed()
        self.weights = {
            "objective": settings.objective or 0.0,
            "prediction": settings.prediction or 0.0,
            "attention": settings.attention_output or 0.0,
        }
        names = site_names(model, family_of(model)) if self.weights["attention"] else []
        self._sites = [model.get_submodule(name) for name in names[:: settings.attention_every]]
        self._scheduler, self._attachment = scheduler, attachment
        self._offloads, self._swaps = settings.offload_activations, bool(settings.swap_blocks)
        self._recipe = recipe.at_guidance(1.0 if settings.guidance is None else settings.guidance)
        self._compared = recipe.at_guidance(settings.teacher_guidance)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses with a weight above 0 by name, and their weighted sum, "loss"."""
        with self._keeping(batch.latents.device):
            return self._losses(batch)

    @contextmanager
    def _keeping(self, device: torch.device) -> Iterator[None]:
        """Choose where what the backward pass needs is kept."""
        with ExitStack() as stack:
            if self._offloads:
                pinned = device.type == "cuda"
                stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=pinned))
            if self._swaps:
                # A block that is left early leaves its last layer's weight on the device.
                stack.enter_context(torch.utils.checkpoint.set_checkpoint_early_stop(False))
            yield

    def _losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        recipe, scheduler = self._recipe, self._scheduler
        noisy = recipe.add_noise(scheduler, batch.latents, batch.noise, batch.times)
        self._attachment.leave_run()
        predicted: torch.Tensor | None = None
        losses: dict[str, torch.Tensor] = {}
        if self.weights["prediction"] or self.weights["attention"]:
            with (
                torch.no_grad(),
                dense_teacher(self.model, self._attachment),
                attention_outputs(self._sites) as attended,
            ):
                taught = self._predict(self._compared, noisy, batch)
            with attention_distances(self._sites, attended) as distances:
                predicted = self._predict(self._compared, noisy, batch)
            if self.weights["prediction"]:
                losses["prediction"] = F.mse_loss(predicted.float(), taught.float())
            if self.weights["attention"]:
                losses["attention"] = torch.stack(distances).mean()
        if self.weights["objective"]:
            if predicted is None or recipe != self._compared:
                predicted = self._predict(recipe, noisy, batch)
            target = recipe.target(scheduler, batch.latents, batch.noise, batch.times)
            losses = {"objective": F.mse_loss(predicted.float(), target.float())} | losses
        weighted = [self.weights[name] * loss for name, loss in losses.items()]
        return losses | {"loss": torch.stack(weighted).sum()}

    def _predict(self, recipe: Recipe, noisy: torch.Tensor, batch: Batch) -> torch.Tensor:
        return recipe.predict(self.model, noisy, batch.times, batch.conditions)


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
