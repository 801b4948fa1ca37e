"""A trained text-to-video pipeline of a few megabytes that draws captioned moving shapes.

``WanPipeline.from_pretrained(MODEL_DIR)`` loads it offline.  The rest of the package is the code
that made it: captions, clips, VAE, text encoder, training, and a checker that reads clips back.
"""

from pathlib import Path

__all__ = ["MODEL_DIR"]

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""Folder of the exported pipeline, in the layout of ``DiffusionPipeline.save_pretrained``."""
