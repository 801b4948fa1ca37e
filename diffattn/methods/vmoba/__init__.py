"""VMoBA: blocks of tokens selected by content."""

from diffattn.methods.vmoba.method import VMoBAAttn

__all__ = ["VMoBAAttn"]
