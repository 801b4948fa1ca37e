"""Bidirectional linear attention, in Triton and in torch's matrix products."""

from .ops import CHUNK, linear_attention

__all__ = ["CHUNK", "linear_attention"]
