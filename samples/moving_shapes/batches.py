"""What one training step sees: noisy latents of fresh clips, and what to learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .captions import SHAPES, Scene
from .clips import FRAMES, cover, draw_geometry, paint, pick_shape
from .model import draw_noise_levels
from .vae import PATCH, clip_latents

# Least noise level of a clip that shows another shape. The target moves off by (1 - level) / level.
LEAST_SWAP_LEVEL = 0.4


@dataclass(frozen=True)
class Mixing:
    """How clips are made noisy.

    Attributes:
        caption_drop: share of the clips that are shown with the empty caption.
        shifts: shifts of the noise levels, taken in turn. A clip has so few colours that the
            average of its latents shows them even through strong noise. Facts that only the caption
            tells are learnt above a noise level of 0.9, which the usual shift of 3 hardly visits.
        swap: share of the captioned clips whose noisy latents show another shape, in full or in
            part. In true clips the caption's shape is seen wherever the object is seen, so the word
            is of use at few noise levels, and little. Here the word alone tells what is right. The
            model also learns to mend a shape that it has begun wrongly.
    """

    caption_drop: float = 0.1
    shifts: tuple[float, ...] = (3.0, 15.0)
    swap: float = 0.5


@dataclass(frozen=True)
class Batch:
    """Clips of one step; all tensors but `picks` and `dropped` lie on the device of the noise.

    Attributes:
        picks: numbers of the scenes, (batch,).
        dropped: clips with the empty caption, (batch,).
        frames: frame numbers, (batch, frames).
        padded_length: the `max_sequence_length` to imitate, (batch,).
        sigma: noise levels, (batch,).
        noisy: latents that the model sees, (batch, channels, frames, height, width).
        target: the velocity from the right clean latents to `noisy`, of the same shape.
        covers: share of each latent's patch that each of SHAPES would cover,
            (batch, shapes, frames, height, width).
    """

    picks: Tensor
    dropped: Tensor
    frames: Tensor
    padded_length: Tensor
    sigma: Tensor
    noisy: Tensor
    target: Tensor
    covers: Tensor

    @property
    def contested(self) -> Tensor:
        """How much the shapes differ at each latent, 0 to 1, (batch, frames, height, width)."""
        return self.covers.amax(dim=1) - self.covers.amin(dim=1)


def draw_batch(
    scenes: Sequence[Scene],
    batch: int,
    frames: int,
    mixing: Mixing,
    choices: torch.Generator,
    noise: torch.Generator,
) -> Batch:
    """Draw `batch` clips of `frames` frames each.

    Args:
        scenes: to choose from.
        batch, frames: sizes.
        mixing: how the clips are made noisy.
        choices: generator of the choices, on the CPU.
        noise: generator of geometry and noise, on the device of the result.
    """
    device = noise.device
    picks = torch.randint(len(scenes), (batch,), generator=choices)
    shown = choose_frames(batch, frames, choices).to(device)
    dropped = torch.rand(batch, generator=choices) < mixing.caption_drop
    # Log-uniform between the shortest sensible length and the pipeline's default of 512.
    padded_length = 32 * 16 ** torch.rand(batch, generator=choices)
    swapped = (torch.rand(batch, generator=choices) < mixing.swap) & ~dropped
    # The square root favours a wrong shape in full.
    amount = (torch.rand(batch, generator=choices).sqrt() * swapped).to(device)
    turns = torch.randint(1, len(SHAPES), (batch,), generator=choices).to(device)

    chosen = [scenes[pick] for pick in picks.tolist()]
    covers = cover(chosen, draw_geometry(batch, noise), shown)
    right = pick_shape(covers, chosen)
    kinds = torch.tensor([SHAPES.index(scene.shape) for scene in chosen], device=device)
    wrong = covers[torch.arange(batch, device=device), (kinds + turns) % len(SHAPES)]
    clean = clip_latents(paint(chosen, right))
    seen = clip_latents(paint(chosen, torch.lerp(right, wrong, amount.view(-1, 1, 1, 1))))

    sigma = draw_noise_levels(batch, mixing.shifts, noise)
    raised = LEAST_SWAP_LEVEL + (1 - LEAST_SWAP_LEVEL) * sigma
    sigma = torch.where(swapped.to(device), raised, sigma)
    level = sigma.view(-1, 1, 1, 1, 1)
    gaussian = torch.randn(clean.shape, generator=noise, device=device)
    return Batch(
        picks=picks,
        dropped=dropped,
        frames=shown,
        padded_length=padded_length.to(device),
        sigma=sigma,
        noisy=(1 - level) * seen + level * gaussian,
        # (noisy - clean) / level without the division of small numbers.
        target=gaussian - clean + (1 - level) / level * (seen - clean),
        covers=F.avg_pool3d(covers, (1, PATCH, PATCH)),
    )


def choose_frames(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw sorted frame numbers (batch, count) that always hold the first and the last frame."""
    inner = torch.rand(batch, FRAMES - 2, generator=generator).argsort(dim=1)[:, : count - 2] + 1
    ends = torch.tensor([0, FRAMES - 1]).expand(batch, -1)
    return torch.cat([inner, ends], dim=1).sort(dim=1).values
