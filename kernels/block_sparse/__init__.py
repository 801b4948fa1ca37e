"""Block-sparse attention in Triton, forward and backward, for any `BlockLayout`."""

from .ops import block_sparse_attention, block_sparse_attention_gradients

__all__ = ["block_sparse_attention", "block_sparse_attention_gradients"]
