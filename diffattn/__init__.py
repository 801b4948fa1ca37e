"""Sparse attention for diffusers: the same video in less time.

pipe = WanPipeline.from_pretrained(...)
pipe.set_attn_processor(RadialAttn())
"""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from diffattn._pipeline_method import add_pipeline_method as _add_pipeline_method

if _TYPE_CHECKING:
    from diffattn import methods, models
    from diffattn.attach.attachment import Attachment, set_attn_processor
    from diffattn.block_forms import from_block_mask
    from diffattn.blocks import BlockLayout
    from diffattn.calibration import calibrate_agent
    from diffattn.grid import Reference, TokenGrid
    from diffattn.masks.base import AttentionMask, Blocking, FullMask, PredicateMask
    from diffattn.methods import (
        AgentAttn,
        AttentionTileAttn,
        AutoAttn,
        BlockTopKAttn,
        ByHeadAttn,
        CLEARAttn,
        DenseAttn,
        FreeSwimAttn,
        GNAAttn,
        LinFusionAttn,
        LVSAAttn,
        Method,
        RadialAttn,
        SLA2Attn,
        SLAAttn,
        SolAttn,
        SVG2Attn,
        VMoBAAttn,
        VSAAttn,
        register_method,
    )
    from diffattn.methods.clear.checkpoint import load_clear_checkpoint
    from diffattn.methods.linfusion.checkpoint import (
        load_linfusion_checkpoint,
        save_linfusion_checkpoint,
    )
    from diffattn.methods.sla.checkpoint import load_sla_checkpoint, save_sla_checkpoint
    from diffattn.methods.vsa.checkpoint import load_vsa_checkpoint
    from diffattn.operator import attention, register_backend
    from diffattn.planning.by_steps import PlanBySteps
    from diffattn.planning.costs import Estimate
    from diffattn.planning.plans import Plan, plan
    from diffattn.schedule import PerStep, early_ramp, hold, jenga, ramp
    from diffattn.tile_calibration import calibrate_attention_tile

__version__ = "0.1.0"

__all__ = [
    "AgentAttn",
    "Attachment",
    "AttentionMask",
    "AttentionTileAttn",
    "AutoAttn",
    "BlockLayout",
    "BlockTopKAttn",
    "Blocking",
    "ByHeadAttn",
    "CLEARAttn",
    "DenseAttn",
    "Estimate",
    "FreeSwimAttn",
    "FullMask",
    "GNAAttn",
    "LVSAAttn",
    "LinFusionAttn",
    "Method",
    "PerStep",
    "Plan",
    "PlanBySteps",
    "PredicateMask",
    "RadialAttn",
    "Reference",
    "SLA2Attn",
    "SLAAttn",
    "SVG2Attn",
    "SolAttn",
    "TokenGrid",
    "VMoBAAttn",
    "VSAAttn",
    "__version__",
    "attention",
    "calibrate_agent",
    "calibrate_attention_tile",
    "early_ramp",
    "from_block_mask",
    "hold",
    "jenga",
    "load_clear_checkpoint",
    "load_linfusion_checkpoint",
    "load_sla_checkpoint",
    "load_vsa_checkpoint",
    "methods",
    "models",
    "plan",
    "ramp",
    "register_backend",
    "register_method",
    "save_linfusion_checkpoint",
    "save_sla_checkpoint",
    "set_attn_processor",
]

_add_pipeline_method()

# Modules that programs reach as attributes of the package.
_MODULES = (
    "attach",
    "block_forms",
    "blocks",
    "draw",
    "grid",
    "masks",
    "methods",
    "models",
    "operator",
    "orders",
    "planning",
    "schedule",
)
# Every name loads on first use: torch takes a second to import and diffusers several, which
# `diffattn --help` and programs that only may need diffattn should not pay for.
_HOMES = {
    name: module
    for module, names in {
        "attach.attachment": ("Attachment", "set_attn_processor"),
        "block_forms": ("from_block_mask",),
        "blocks": ("BlockLayout",),
        "calibration": ("calibrate_agent",),
        "tile_calibration": ("calibrate_attention_tile",),
        "grid": ("Reference", "TokenGrid"),
        "masks.base": ("AttentionMask", "Blocking", "FullMask", "PredicateMask"),
        "methods": (
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
            "SVG2Attn",
            "SLA2Attn",
            "SLAAttn",
            "SolAttn",
            "VMoBAAttn",
            "VSAAttn",
            "register_method",
        ),
        "methods.clear.checkpoint": ("load_clear_checkpoint",),
        "methods.linfusion.checkpoint": (
            "load_linfusion_checkpoint",
            "save_linfusion_checkpoint",
        ),
        "methods.sla.checkpoint": ("load_sla_checkpoint", "save_sla_checkpoint"),
        "methods.vsa.checkpoint": ("load_vsa_checkpoint",),
        "operator": ("attention", "register_backend"),
        "planning.by_steps": ("PlanBySteps",),
        "planning.costs": ("Estimate",),
        "planning.plans": ("Plan", "plan"),
        "schedule": ("PerStep", "early_ramp", "hold", "jenga", "ramp"),
    }.items()
    for name in names
}


def __getattr__(name: str) -> _Any:
    if name in _HOMES:
        value = getattr(_importlib.import_module(f"diffattn.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return _importlib.import_module(f"diffattn.{name}")
    raise AttributeError(f"module 'diffattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})
