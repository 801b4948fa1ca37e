"""Linear attention by its definition: a weight for each pair of tokens, in float64."""

from __future__ import annotations

import torch


def linear_truth(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    eps: float = 1e-4,
    key_mask: torch.Tensor | None = None,
    rotation: torch.Tensor | None = None,
) -> torch.Tensor:
    """The arguments are those of `linear_attention`, float64 where differences count."""
    q, k, v = q.double(), k.double(), v.double()
    turn = None if rotation is None else matrices(rotation)
    if turn is not None:
        q, k = (torch.einsum("tde,bthd->bthe", turn, x) for x in (q, k))  # its inverse
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    total = torch.einsum("bqhd,bkhd->bhqk", q, k)
    if turn is not None:
        q, k = (torch.einsum("tde,bthe->bthd", turn, x) for x in (q, k))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k)
    count = torch.full((len(k),), k.shape[1])
    if key_mask is not None:
        hidden = ~key_mask[:, None, None]
        weights, total = weights.masked_fill(hidden, 0), total.masked_fill(hidden, 0)
        count = key_mask.sum(1).clamp(min=1)
    weights, total = (x / count[:, None, None, None] for x in (weights, total))
    weights = weights / (total.sum(-1, keepdim=True) + eps)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def rotations(tokens: int, dim: int) -> torch.Tensor:
    """Random ones: cosines and sines, float32 (2, tokens, dim / 2)."""
    angle = 6 * torch.rand(tokens, dim // 2)
    return torch.stack([angle.cos(), angle.sin()])


def matrices(rotation: torch.Tensor) -> torch.Tensor:
    """The same as rotation matrices, (tokens, dim, dim)."""
    cos, sin = rotation.double()
    blocks = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return torch.stack([torch.block_diag(*token) for token in blocks])
