"""Queries, keys and values to measure with: their content decides what methods select."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffattn import TokenGrid

# Of the noise on queries, beside fields of unit size.
NOISE = 0.5


def smooth_fields(
    grid: TokenGrid,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
) -> list[torch.Tensor]:
    """q, k and v: smooth fields over the video, of unit size, and noise on q.

    The more neighbours select the same blocks, the less work there is: random queries would have no
    blocks in common. Tokens beside the video are random. The same sizes give the same numbers on
    one type of device.

    Returns:
        Three tensors (batch, tokens, heads, head_dim).
    """
    generator = torch.Generator(device).manual_seed(0)
    sizes = (grid.frames, grid.height, grid.width)
    channels, fields = heads * head_dim, []
    for noise in (NOISE, 0, 0):
        coarse = torch.randn(
            batch,
            channels,
            *(max(2, size // 4) for size in sizes),
            generator=generator,
            device=device,
        )
        video = F.interpolate(coarse, size=sizes, mode="trilinear", align_corners=True)
        video = video.flatten(2).transpose(1, 2)
        field = torch.randn(batch, grid.tokens, channels, generator=generator, device=device)
        field[:, grid.video] = video / video.std() + noise * field[:, grid.video]
        fields.append(field.unflatten(2, (heads, head_dim)).to(dtype))
    return fields
