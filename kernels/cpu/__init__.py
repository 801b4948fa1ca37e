"""Attention on the CPU: block-sparse, and to key blocks that every query selects."""

from .block_sparse import block_sparse_attention, block_sparse_attention_gradients
from .gather import selected_attention

__all__ = ["block_sparse_attention", "block_sparse_attention_gradients", "selected_attention"]
