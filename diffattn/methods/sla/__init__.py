"""SLA: softmax attention to the best blocks, linear attention to others, added up."""

from diffattn.methods.sla.method import SLAAttn

__all__ = ["SLAAttn"]
