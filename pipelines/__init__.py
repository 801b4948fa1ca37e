"""The command line, and the pipelines that are more than a method in a stock pipeline."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .freeswim.pipeline import FreeSwimPipeline
    from .image_ladder import LadderPipeline

__all__ = ["FreeSwimPipeline", "LadderPipeline"]


def __getattr__(name: str) -> Any:
    # It imports torch, which the command line does not do before it must.
    if name == "FreeSwimPipeline":
        from .freeswim.pipeline import FreeSwimPipeline

        return FreeSwimPipeline
    if name == "LadderPipeline":
        from .image_ladder import LadderPipeline

        return LadderPipeline
    raise AttributeError(f"module 'diffattn.pipelines' has no attribute {name!r}")
