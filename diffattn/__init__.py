"""Sparse attention for diffusers: the same video in less time.

pipe = WanPipeline.from_pretrained(...)
pipe.set_attn_processor(RadialAttn())
"""

from diffattn.attach import Attachment, set_attn_processor
from diffattn.attention import attention
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.mask import AttentionMask, FullMask, PredicateMask
from diffattn.methods import DenseAttn, Method, RadialAttn

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "AttentionMask",
    "BlockLayout",
    "DenseAttn",
    "FullMask",
    "Method",
    "PredicateMask",
    "RadialAttn",
    "TokenGrid",
    "__version__",
    "attention",
    "set_attn_processor",
]
