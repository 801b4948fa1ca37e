"""Attention of every query to the key blocks that it selects: VMoBA's operator."""

from diffattn.selected.attention import SelectionMask, selected_attention
from diffattn.selected.key_blocks import Chunk, KeyBlocks, Partition

__all__ = ["Chunk", "KeyBlocks", "Partition", "SelectionMask", "selected_attention"]
