"""Attention to a small second set of keys, each with a bias, hidden from some query blocks."""

from .ops import summary_attention

__all__ = ["summary_attention"]
