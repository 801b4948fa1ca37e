"""Pictures as sequences of tokens, as Flux and Qwen-Image take them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

PATCH = 2  # latent rows and columns of a token


def pack(latents: Tensor) -> Tensor:
    """(batch, tokens, channels of a token) from (batch, channels, 1, height, width)."""
    return F.pixel_unshuffle(latents.squeeze(2), PATCH).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(batch, channels, 1, height, width) from (batch, tokens, channels of a token)."""
    picture = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return F.pixel_shuffle(picture, PATCH).unsqueeze(2)
