"""Sparse attention for diffusers: the same video in less time.

pipe = WanPipeline.from_pretrained(...)
pipe.set_attn_processor(RadialAttn())
"""

from typing import TYPE_CHECKING, Any

from diffattn import methods, models
from diffattn._pipeline_method import add_pipeline_method
from diffattn.attention import attention
from diffattn.block_forms import from_block_mask
from diffattn.blocks import BlockLayout
from diffattn.costs import Estimate
from diffattn.grid import TokenGrid
from diffattn.mask import AttentionMask, FullMask, PredicateMask
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
)
from diffattn.planning import Plan, plan

if TYPE_CHECKING:
    from diffattn.agent_calibration import calibrate_agent
    from diffattn.attach import Attachment, set_attn_processor
    from diffattn.clear_checkpoint import load_clear_checkpoint
    from diffattn.linfusion_checkpoint import (
        load_linfusion_checkpoint,
        save_linfusion_checkpoint,
    )

__version__ = "0.1.0"

__all__ = [
    "AgentAttn",
    "Attachment",
    "AttentionMask",
    "BlockLayout",
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
    "save_linfusion_checkpoint",
    "set_attn_processor",
]

add_pipeline_method()


def __getattr__(name: str) -> Any:
    # Attaching imports diffusers, which takes seconds: it waits until it is asked for.
    if name in ("Attachment", "set_attn_processor"):
        from diffattn import attach

        return getattr(attach, name)
    if name == "calibrate_agent":
        from diffattn.agent_calibration import calibrate_agent

        return calibrate_agent
    if name == "load_clear_checkpoint":
        from diffattn.clear_checkpoint import load_clear_checkpoint

        return load_clear_checkpoint
    if name in ("load_linfusion_checkpoint", "save_linfusion_checkpoint"):
        from diffattn import linfusion_checkpoint

        return getattr(linfusion_checkpoint, name)
    raise AttributeError(f"module 'diffattn' has no attribute {name!r}")
