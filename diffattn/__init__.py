"""Sparse attention for diffusers: the same video in less time.

pipe = WanPipeline.from_pretrained(...)
pipe.set_attn_processor(RadialAttn())
"""

import importlib
from typing import TYPE_CHECKING, Any

from diffattn import methods, models
from diffattn._pipeline_method import add_pipeline_method
from diffattn.block_forms import from_block_mask
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask, Blocking, FullMask, PredicateMask
from diffattn.methods import (
    AgentAttn,
    CLEARAttn,
    DenseAttn,
    FreeSwimAttn,
    GNAAttn,
    LinFusionAttn,
    Method,
    RadialAttn,
    VMoBAAttn,
    register_method,
)
from diffattn.operator import attention, register_backend
from diffattn.planning.costs import Estimate
from diffattn.planning.plans import Plan, plan

if TYPE_CHECKING:
    from diffattn.attach.attachment import Attachment, set_attn_processor
    from diffattn.calibration import calibrate_agent
    from diffattn.methods.clear.checkpoint import load_clear_checkpoint
    from diffattn.methods.linfusion.checkpoint import (
        load_linfusion_checkpoint,
        save_linfusion_checkpoint,
    )

__version__ = "0.1.0"

__all__ = [
    "AgentAttn",
    "Attachment",
    "AttentionMask",
    "BlockLayout",
    "Blocking",
    "CLEARAttn",
    "DenseAttn",
    "Estimate",
    "FreeSwimAttn",
    "FullMask",
    "GNAAttn",
    "LinFusionAttn",
    "Method",
    "Plan",
    "PredicateMask",
    "RadialAttn",
    "TokenGrid",
    "VMoBAAttn",
    "__version__",
    "attention",
    "calibrate_agent",
    "from_block_mask",
    "load_clear_checkpoint",
    "load_linfusion_checkpoint",
    "methods",
    "models",
    "plan",
    "register_backend",
    "register_method",
    "save_linfusion_checkpoint",
    "set_attn_processor",
]

add_pipeline_method()


# These names import diffusers, which takes seconds: they load on first use.
_HOMES = {
    "Attachment": "attach",
    "calibrate_agent": "calibration",
    "load_clear_checkpoint": "methods.clear.checkpoint",
    "load_linfusion_checkpoint": "methods.linfusion.checkpoint",
    "save_linfusion_checkpoint": "methods.linfusion.checkpoint",
    "set_attn_processor": "attach",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffattn' has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffattn.{_HOMES[name]}"), name)
