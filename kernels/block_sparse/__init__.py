"""Block-sparse attention in Triton, forward and backward, for any `BlockLayout`."""

from .ops import block_sparse_attention

__all__ = ["block_sparse_attention"]
