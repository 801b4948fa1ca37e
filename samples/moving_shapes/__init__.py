"""A trained text-to-video pipeline of a few megabytes that draws captioned moving shapes.

`WanPipeline.from_pretrained(MODEL_DIR)` loads the pipeline offline. The other modules made the
pipeline: captions, clips, VAE, text encoder, training, and a checker that reads clips back.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL_DIR"]

# Folder of the exported pipeline, in the layout of `DiffusionPipeline.save_pretrained`.
MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
