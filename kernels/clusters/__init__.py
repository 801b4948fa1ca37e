"""The passes of k-means over the tokens of each sample and head."""

from .passes import Passes, fixed_point, passes

__all__ = ["Passes", "fixed_point", "passes"]
