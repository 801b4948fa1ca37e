"""Key blocks that queries select, as tests write them and as operators take them."""

from __future__ import annotations

import torch


def starts_of(lengths: list[int]) -> torch.Tensor:
    """int32 `(blocks + 1,)`: where blocks of these lengths start, then the number of keys."""
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def random_selection(*shape: int, share: float = 0.4) -> torch.Tensor:
    """Bool `(batch, heads, tokens, blocks)`."""
    return torch.rand(shape) < share


def packed(selected: torch.Tensor) -> torch.Tensor:
    """Bits of `(batch, heads, tokens, blocks)`: int32, a word for 32 blocks."""
    words = torch.zeros(*selected.shape[:3], -(-selected.shape[3] // 32), dtype=torch.int64)
    for c in range(selected.shape[3]):
        words[..., c // 32] += selected[..., c].long() << (c % 32)
    return words.to(torch.int32)  # wraps: bit 31 is the sign


def token_mask(selected: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Bool `(batch, heads, tokens, keys)`: block by block, as the definition has it."""
    parts = [selected[..., c : c + 1].expand(-1, -1, -1, n) for c, n in enumerate(lengths)]
    return torch.cat(parts, -1)
