"""FreeSwim's upscaling: two paths through a denoiser, and the pipeline that runs both."""

from .pipeline import FreeSwimPipeline

__all__ = ["FreeSwimPipeline"]
