"""Context parallelism in a training: all processes share each sample, each with some of its tokens.

Every process makes the same draws. diffusers cuts the denoiser's input, and gathers its prediction
in every process. A backward pass gives a process the gradients of its own tokens, so that those of
the weights are the sum over processes.
"""

from __future__ import annotations

from typing import Any

import torch

from diffattn._compat import has_parallel_plan
from diffattn.lora.errors import LoraError
from diffattn.methods.base import Method, SiteWeights, attends_by_mask_alone
from diffattn.models import family_of

# Families whose attention over text diffusers 0.42 spreads without the mask over text.
_MASKED_TEXT = ("ltx",)


def check_together(
    model: Any, way: str, method: Method, processes: int, tokens: int | None = None
) -> None:
    """Check that processes can share the samples of a training.

    Args:
        model: the denoiser.
        way: one of `diffattn.lora.settings.CONTEXT_PARALLEL`.
        method: the attention method.
        processes: number of processes.
        tokens: number of tokens of a sample; None if unknown.

    Raises:
        LoraError: for a single process, no accelerator, a denoiser that diffusers cannot spread,
            heads or tokens that cannot be divided, or a method that is not for a ring, looks at all
            heads together, or has weights of its own.
    """
    asked = f"context_parallel is {way}"
    name = type(model).__name__
    if processes < 2:
        raise LoraError(
            f"{asked}, but there is only one process: start several with torchrun"
            f" --nproc-per-node 2 -m diffattn.pipelines lora train ..."
        )
    if torch.accelerator.device_count() == 0:
        raise LoraError(f"{asked}, but needs accelerators, and diffusers finds none here")
    if not has_parallel_plan(model):
        raise LoraError(f"{asked}, but diffusers has no plan for {name}: leave it out")
    if family_of(model).name in _MASKED_TEXT:
        raise LoraError(
            f"{asked}, but diffusers cannot spread {name}'s attention over text with a mask: leave"
            f" it out"
        )
    heads = model.config.num_attention_heads
    if way == "ulysses" and heads % processes:
        raise LoraError(
            f"{asked}, but the {heads} attention heads of {name} cannot be divided among"
            f" {processes} processes: start another number of them, or give ring"
        )
    if tokens is not None and tokens % processes:
        raise LoraError(
            f"{asked}, but {tokens} tokens cannot be divided among {processes} processes: try"
            f" another size or number of processes"
        )
    if any(isinstance(module, SiteWeights) for module in model.modules()):
        raise LoraError(
            f"{asked}, but {method.type} attention has weights of its own, whose training is not"
            f" spread over tokens: leave it out"
        )
    if way == "ulysses" and not method.heads_apart:
        raise LoraError(
            f"{asked}, but {method.type} attention with these parameters looks at all heads"
            f" together: leave it out"
        )
    if way == "ring" and not attends_by_mask_alone(method):
        raise LoraError(
            f"{asked}, but {method.type} attention cannot be computed for a part of the queries:"
            f" give ulysses"
        )


def share_samples(model: Any, way: str, processes: int) -> None:
    """Spread the tokens of a denoiser's calls over all processes."""
    from diffusers import ContextParallelConfig

    model.enable_parallelism(config=ContextParallelConfig(**{f"{way}_degree": processes}))


def shared_loss(losses: dict[str, torch.Tensor], attention: float, processes: int) -> torch.Tensor:
    """The loss whose gradients, averaged over the processes, are those of the whole loss.

    Args:
        losses: the losses of this process by name. The distance of attention outputs is the mean
            over its own tokens; all others are over the whole prediction.
        attention: the weight of that distance.
        processes: number of processes.
    """
    loss = processes * losses["loss"]
    if "attention" in losses:
        # The mean of the processes' means is the mean over all tokens already.
        loss = loss - (processes - 1) * attention * losses["attention"]
    return loss
