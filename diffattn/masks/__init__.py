"""Attention masks: rules for token pairs, and the blocks that they visit."""

from diffattn.masks.base import (
    BLOCK,
    AttentionMask,
    Blocking,
    BlockMapMask,
    FullMask,
    PredicateMask,
    TextMask,
    allowed_pairs,
)
from diffattn.masks.neighbourhood import AxisWindow, NeighbourhoodMask

__all__ = [
    "BLOCK",
    "AttentionMask",
    "AxisWindow",
    "BlockMapMask",
    "Blocking",
    "FullMask",
    "NeighbourhoodMask",
    "PredicateMask",
    "TextMask",
    "allowed_pairs",
]
