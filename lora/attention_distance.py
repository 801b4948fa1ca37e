"""The distance between the attention outputs of the sparse model and of the dense model.

A site costs one tensor of the size of its output, in the model's dtype, from the dense model's pass
to the end of the backward pass. For Wan 14B at 1280x720 and 81 frames (75,600 tokens of 5,120
channels in bfloat16) that is 0.72 GiB. First the tensor is the dense model's output; the sparse
model's pass puts the difference into its place, and the backward pass the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Numbers of a part of a tensor that is in float32 at a time.
_PART = 1 << 22


@contextmanager
def attention_outputs(sites: Sequence[torch.nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of attention modules, in the order of their calls.

    Modules of joint attention return video and text tokens; only the video tokens are kept.

    Yields:
        The list of outputs, which grows while the block runs.
    """
    outputs: list[Tensor] = []
    with _called_with_outputs(sites, outputs.append):
        yield outputs


@contextmanager
def attention_distances(
    sites: Sequence[torch.nn.Module], references: list[Tensor]
) -> Iterator[list[Tensor]]:
    """Collect the mean squared distances of attention outputs to references.

    Args:
        sites: the attention modules.
        references: the outputs of other calls of these modules, in the same order. The list is
            emptied, and its tensors are written to.

    Yields:
        The list of distances, float32 scalars, which grows while the block runs. Each can be
        differentiated once.
    """
    distances: list[Tensor] = []
    references.reverse()

    def compare(output: Tensor) -> None:
        distances.append(_Distance.apply(output, references.pop()))

    with _called_with_outputs(sites, compare):
        yield distances


@contextmanager
def _called_with_outputs(sites: Sequence[torch.nn.Module], take: Any) -> Iterator[None]:
    def pass_on(module: torch.nn.Module, args: Any, output: Any) -> None:
        take(output[0] if isinstance(output, tuple) else output)

    hooks = [site.register_forward_hook(pass_on) for site in sites]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Distance(torch.autograd.Function):
    """The mean squared distance of two tensors; the second one is written to."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, reference: Tensor) -> Tensor:
        difference = reference.contiguous()
        total = torch.zeros((), dtype=torch.float32, device=output.device)
        parts = difference.view(-1).split(_PART)
        for mine, other in zip(output.reshape(-1).split(_PART), parts, strict=True):
            exact = mine.float() - other.float()
            total += exact.square().sum()
            other.copy_(exact)
        # Tensors that are saved for the backward pass would be thrown away and computed again by
        # gradient checkpointing, which no longer has the reference.
        ctx.difference, ctx.dtype = difference, output.dtype
        return total / output.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        difference, ctx.difference = ctx.difference, None
        if difference is None:
            raise RuntimeError("the distance of attention outputs can be differentiated only once")
        factor = 2 * gradients[0].float() / difference.numel()
        for part in difference.view(-1).split(_PART):
            part.copy_(part.float() * factor)
        return difference.to(ctx.dtype), None
