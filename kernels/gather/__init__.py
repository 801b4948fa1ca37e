"""Attention of single queries to the key blocks that each has selected, in Triton."""

from .ops import selected_attention

__all__ = ["selected_attention"]
