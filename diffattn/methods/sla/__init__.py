"""SLA and SLA2: softmax attention to the best blocks, beside linear attention to others."""

from diffattn.methods.sla.method import SLAAttn
from diffattn.methods.sla.sla2 import SLA2Attn

__all__ = ["SLA2Attn", "SLAAttn"]
