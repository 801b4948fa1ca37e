"""AutoAttn: the recommended method for a model, a size and a number of steps."""

from diffattn.methods.auto.method import AutoAttn

__all__ = ["AutoAttn"]
