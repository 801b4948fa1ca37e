"""The command line, and pipelines that do more than run a method in a stock pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .freeswim.pipeline import FreeSwimPipeline
    from .image_ladder import LadderPipeline

__all__ = ["FreeSwimPipeline", "LadderPipeline"]


def __getattr__(name: str) -> Any:
    # This module imports torch, which the command line imports only for commands that need it.
    if name == "FreeSwimPipeline":
        from .freeswim.pipeline import FreeSwimPipeline

        return FreeSwimPipeline
    if name == "LadderPipeline":
        from .image_ladder import LadderPipeline

        return LadderPipeline
    raise AttributeError(f"module 'diffattn.pipelines' has no attribute {name!r}")
