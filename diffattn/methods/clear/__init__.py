"""CLEAR: a circle around each token, with or without pooled keys."""

from diffattn.methods.clear.method import CLEARAttn

__all__ = ["CLEARAttn"]
