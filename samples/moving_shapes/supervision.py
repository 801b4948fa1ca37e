"""Deep supervision: the last block but one must know the caption's words and the outlines.

A shape comes from a product of two things, the word and the place of a token relative to the centre
of its object. Neither is of use without the other, so neither is learnt: a model trained on the
flow-matching loss alone had erased the shape words in its text encoder, and every object was a
blob. Two linear readings of the hidden states, which only training has, ask for both things.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import Batch
from .captions import COLOURS, DIRECTIONS, SHAPES, Scene

# What the words of a caption are chosen from: colour, shape, direction, background.
_CHOICES = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS), tuple(COLOURS))


class DeepSupervision(nn.Module):
    """Reads words and outlines from the hidden states of a transformer's last block but one.

    Attributes:
        hidden: the hidden states of the last call of the transformer, (batch, tokens, width).
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        config = transformer.config
        self._patch = config.patch_size[1]
        width = config.num_attention_heads * config.attention_head_dim
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.words = nn.Linear(width, sum(map(len, _CHOICES)))
        self.outlines = nn.Linear(width, len(SHAPES) * self._patch**2)
        self.hidden: Tensor | None = None
        transformer.blocks[max(0, len(transformer.blocks) - 2)].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, hidden: Tensor) -> None:
        self.hidden = hidden

    def losses(
        self, batch: Batch, scenes: Sequence[Scene], contested_weight: float
    ) -> tuple[Tensor, Tensor]:
        """Losses of the last call: cross-entropy of the words, squared error of the outlines.

        Args:
            batch: what the transformer was called on.
            scenes: of the clips.
            contested_weight: additional weight of the latents at which the shapes differ.

        Raises:
            RuntimeError: before the first call of the transformer.
        """
        if self.hidden is None:
            raise RuntimeError("the transformer has not been called yet: there is nothing to read")
        states = self.norm(self.hidden.float())
        outlines = self.outlines(states).unflatten(-1, (len(SHAPES), -1))
        squared = (outlines - self._tokens(batch.covers)).square()
        weight = 1 + contested_weight * self._tokens(batch.contested[:, None])
        return self._words(states, batch, scenes), (squared * weight).mean()

    def _words(self, states: Tensor, batch: Batch, scenes: Sequence[Scene]) -> Tensor:
        logits = self.words(states).split([len(choice) for choice in _CHOICES], dim=-1)
        told = (~batch.dropped).to(states.device, states.dtype)
        parts = []
        for found, right in zip(logits, _word_numbers(scenes, states.device), strict=True):
            wanted = right[:, None].expand(found.shape[:2])
            entropy = F.cross_entropy(found.transpose(1, 2), wanted, reduction="none")
            parts.append((entropy.mean(dim=1) * told).sum() / told.sum().clamp(min=1))
        return torch.stack(parts).mean()

    def _tokens(self, maps: Tensor) -> Tensor:
        """Maps (batch, kinds, frames, height, width) as (batch, tokens, kinds, latents)."""
        size = self._patch
        parts = maps.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
        # (batch, kinds, frames, rows, size, columns, size)
        return parts.permute(0, 2, 3, 5, 1, 4, 6).flatten(5).flatten(1, 3)


def _word_numbers(scenes: Sequence[Scene], device: torch.device) -> Tensor:
    """Numbers of the words among their choices, (words, batch)."""
    rows = [(s.colour, s.shape, s.direction, s.background) for s in scenes]
    numbers = [
        [choice.index(word) for word, choice in zip(row, _CHOICES, strict=True)] for row in rows
    ]
    return torch.tensor(numbers, device=device).T
