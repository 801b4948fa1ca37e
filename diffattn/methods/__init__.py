"""The attention methods, by the name that configuration files and the command line use."""

from __future__ import annotations

from diffattn.methods.agent import AgentAttn
from diffattn.methods.attention_tile import AttentionTileAttn
from diffattn.methods.auto import AutoAttn
from diffattn.methods.base import Method, Site, StaticMaskMethod
from diffattn.methods.block_topk import BlockTopKAttn
from diffattn.methods.by_head import ByHeadAttn
from diffattn.methods.clear import CLEARAttn
from diffattn.methods.dense import DenseAttn
from diffattn.methods.freeswim import FreeSwimAttn
from diffattn.methods.gna import GNAAttn
from diffattn.methods.linfusion import LinFusionAttn
from diffattn.methods.lvsa import LVSAAttn
from diffattn.methods.radial import RadialAttn
from diffattn.methods.registry import METHODS, all_methods, from_dict, register_method
from diffattn.methods.sla import SLA2Attn, SLAAttn
from diffattn.methods.sol import SolAttn
from diffattn.methods.svg2 import SVG2Attn
from diffattn.methods.vmoba import VMoBAAttn
from diffattn.methods.vsa import VSAAttn

for _method in (
    DenseAttn,
    RadialAttn,
    CLEARAttn,
    GNAAttn,
    FreeSwimAttn,
    VMoBAAttn,
    AgentAttn,
    LinFusionAttn,
    SolAttn,
    BlockTopKAttn,
    SVG2Attn,
    AttentionTileAttn,
    LVSAAttn,
    SLAAttn,
    SLA2Attn,
    VSAAttn,
    ByHeadAttn,
    AutoAttn,
):
    register_method(_method)

__all__ = [
    "METHODS",
    "AgentAttn",
    "AttentionTileAttn",
    "AutoAttn",
    "BlockTopKAttn",
    "ByHeadAttn",
    "CLEARAttn",
    "DenseAttn",
    "FreeSwimAttn",
    "GNAAttn",
    "LVSAAttn",
    "LinFusionAttn",
    "Method",
    "RadialAttn",
    "SLA2Attn",
    "SLAAttn",
    "SVG2Attn",
    "Site",
    "SolAttn",
    "StaticMaskMethod",
    "VMoBAAttn",
    "VSAAttn",
    "all_methods",
    "from_dict",
    "register_method",
]
