"""LinFusion: linear attention over adapted queries and keys."""

from diffattn.methods.linfusion.method import LinFusionAttn

__all__ = ["LinFusionAttn"]
