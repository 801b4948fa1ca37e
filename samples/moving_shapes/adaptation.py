"""The bundled model under a sparse mask: data to adapt the model, and its distance from dense.

Clips are rendered on request, and encoded to latents without the VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffattn.lora.losses import Batch
from diffattn.lora.recipes import Recipe
from diffattn.pipelines.run.compare import psnr

from .captions import Scene, split_scenes
from .checker import read_clip
from .clips import render_clips
from .evaluate import Sampling, generate
from .vae import clip_latents

# Attributes that the dense model draws right; the shapes that it draws are blobs.
ATTRIBUTES = ("colour", "background", "direction")

_TRAINING_SEED = 100_000
_HELD_OUT_SEED = 200_000


class RenderedClips:
    """Clips of the training captions, each rendered with a size and place of its own.

    Attributes:
        keys: number and caption of each clip, in the order of the clips.
        empty: conditions of the empty caption, without batch axis.
    """

    def __init__(self, pipe: Any, recipe: Recipe, count: int) -> None:
        """Choose `count` clips and encode their captions."""
        training, _ = split_scenes()
        order = np.random.default_rng(_TRAINING_SEED).permutation(len(training))
        self._scenes = [training[order[index % len(training)]] for index in range(count)]
        self.keys = [f"{index} {scene.caption}" for index, scene in enumerate(self._scenes)]
        captions = list(dict.fromkeys(scene.caption for scene in self._scenes))
        self._told = {caption: _told(pipe, recipe, caption) for caption in captions}
        self.empty = _told(pipe, recipe, "")

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self._scenes[index]
        latents = clip_latents(render_clips([scene], _TRAINING_SEED + index))[0]
        return {
            "latents": latents,
            "conditions": self._told[scene.caption],
            "key": self.keys[index],
        }


@dataclass(frozen=True)
class Figures:
    """How well the model does in its present state.

    Attributes:
        loss: flow-matching loss on held-out clips, with the same noise every time.
        distance: mean squared difference to the dense model's predictions for the same noisy clips.
        psnr_db: mean PSNR in dB of generated clips to the dense model's; None for the dense model.
        accuracy: share of the generated clips with each attribute right, as the checker reads them.
    """

    loss: float
    distance: float
    psnr_db: float | None
    accuracy: dict[str, float]


class HeldOut:
    """Held-out clips with fixed noise, and held-out captions to generate.

    Attributes:
        scenes: the scenes whose captions are generated.
    """

    def __init__(self, pipe: Any, recipe: Recipe, clips: int, prompts: int, sampling: Sampling):
        """Prepare `clips` clips at as many noise levels, and choose `prompts` captions.

        The pipeline must be the dense model: its predictions are kept for `losses`.
        """
        _, held_out = split_scenes()
        shown = [held_out[index * len(held_out) // clips] for index in range(clips)]
        self.scenes: list[Scene] = held_out[:: max(1, len(held_out) // max(1, prompts))][:prompts]
        self._recipe, self._sampling = recipe, sampling
        generator = torch.Generator().manual_seed(_HELD_OUT_SEED)
        shift = pipe.scheduler.config.shift
        self._batches = []
        for index, scene in enumerate(shown):
            latents = clip_latents(render_clips([scene], _HELD_OUT_SEED + index))
            even = (index + 0.5) / clips
            level = torch.tensor([shift * even / (1 + (shift - 1) * even)])
            told = {name: x[None] for name, x in _told(pipe, recipe, scene.caption).items()}
            noise = torch.randn(latents.shape, generator=generator)
            self._batches.append(Batch(latents, noise, level, told))
        self._taught = [self._predict(pipe, batch) for batch in self._batches]

    def losses(self, pipe: Any, attachment: Any = None) -> tuple[float, float]:
        """Mean loss of the denoiser in its present state, and mean distance to the dense model.

        `attachment` is that of the attached method, if any; it leaves its denoising run, since the
        calls here belong to no run.
        """
        pairs = []
        for batch, taught in zip(self._batches, self._taught, strict=True):
            if attachment is not None:
                attachment.leave_run()
            predicted = self._predict(pipe, batch)
            target = self._recipe.target(pipe.scheduler, batch.latents, batch.noise, batch.times)
            pairs.append([float(((predicted - x) ** 2).mean()) for x in (target, taught)])
        loss, distance = np.mean(pairs, axis=0).tolist()
        return loss, distance

    @torch.no_grad()
    def _predict(self, pipe: Any, batch: Batch) -> Tensor:
        noisy = self._recipe.add_noise(pipe.scheduler, batch.latents, batch.noise, batch.times)
        return self._recipe.predict(pipe.transformer, noisy, batch.times, batch.conditions)

    def clips(self, pipe: Any) -> list[NDArray[np.uint8]]:
        """Generate each caption with a seed of its own: (frames, height, width, 3), uint8."""
        made = []
        for index, scene in enumerate(self.scenes):
            sampling = Sampling(self._sampling.steps, self._sampling.guidance, index)
            frames = generate(pipe, scene.caption, sampling)
            made.append((frames * 255).round().astype(np.uint8))
        return made

    def figures(
        self,
        pipe: Any,
        attachment: Any = None,
        dense: Sequence[NDArray[np.uint8]] | None = None,
    ) -> tuple[Figures, list[NDArray[np.uint8]]]:
        """The figures of the model in its present state, and the clips that the model made.

        Args:
            pipe: the pipeline.
            attachment: of the attached method, if any.
            dense: the dense model's clips to compare with, if any.
        """
        loss, distance = self.losses(pipe, attachment)
        made = self.clips(pipe)
        ratio = None
        if dense is not None and made:
            ratio = float(np.mean([psnr(a, b) for a, b in zip(dense, made, strict=True)]))
        agreements = [
            read_clip(clip).agreement(scene) for clip, scene in zip(made, self.scenes, strict=True)
        ]
        accuracy = {
            name: float(np.mean([agreement[name] for agreement in agreements]))
            for name in (ATTRIBUTES if agreements else ())
        }
        return Figures(loss, distance, ratio, accuracy), made


def _told(pipe: Any, recipe: Recipe, caption: str) -> dict[str, Tensor]:
    with torch.no_grad():
        encoded = recipe.encode_prompt(pipe, [caption])
    return {name: tensor[0] for name, tensor in encoded.items()}
