"""Videos of a LoRA in training: dense, sparse without the LoRA, sparse with the LoRA."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffattn.lora.encoding import in_tiles

from ..run.compare import in_columns, psnr
from ..run.generate import render
from ..run.loading import LoadedModel
from ..run.outputs import slug
from ..run.processes import rank
from ..run.request import Request
from ..run.sizing import complete
from ..run.video import write_video
from .placement import on_demand

if TYPE_CHECKING:
    from diffattn.lora.trainer import Trainer

_FOLDER = "validation"
_LOG = "validation.jsonl"


class Validation:
    """Renders the same prompts every so many steps, beside the dense and the untrained video.

    The LoRA is off in the steps that stay dense, as in `diffattn generate`.
    The videos lie in a folder of the run. A log in that folder has the PSNR to the dense videos.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        trainer: Trainer,
        requests: Sequence[Request],
        every: int,
        say: Callable[[str], None],
        *,
        lora_everywhere: bool = False,
        tiling: bool = True,
    ) -> None:
        """Render the prompts dense and sparse, unless the run is resumed and has done so.

        Args:
            loaded: the pipeline.
            trainer: the training.
            requests: the videos to render.
            every: number of optimiser steps between two looks.
            say: takes lines for the user.
            lora_everywhere: keep the LoRA on in dense steps.
            tiling: decode large videos in tiles, as the denoiser stays on the device.
        """
        self._lora_everywhere, self._tiling = lora_everywhere, tiling
        self._loaded, self._trainer, self._every, self._say = loaded, trainer, every, say
        self._requests = [complete(request, loaded).request for request in requests]
        self._folder = trainer.output / _FOLDER
        if rank():
            return
        self._folder.mkdir(exist_ok=True)
        for number, request in enumerate(self._requests):
            if not self._untrained(number).is_file():
                self._render_untrained(number, request)

    def look(self, step: int) -> None:
        """Render the prompts with the LoRA in its present state, if `step` is due."""
        if step % self._every and step != self._trainer.settings.steps:
            return
        folder = self._folder / f"step-{step:06d}"
        folder.mkdir(exist_ok=True)
        ratios = []
        for number, request in enumerate(self._requests):
            with np.load(self._untrained(number)) as file:
                dense, sparse = file["dense"], file["sparse"]
            trained = self._render_trained(request, f"step {step}")
            clips = [("dense", dense), ("sparse", sparse), (f"LoRA, step {step}", trained)]
            assert request.fps is not None
            name = f"{number:02d}-{slug(request.prompt)}.mp4"
            write_video(folder / name, in_columns(clips), request.fps)
            ratios.append((psnr(dense, sparse), psnr(dense, trained)))
        before, now = (float(np.mean(column)) for column in zip(*ratios, strict=True))
        entry = {"step": step, "psnr_untrained_db": _finite(before), "psnr_db": _finite(now)}
        with (self._folder / _LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        self._say(
            f"step {step}: PSNR to dense {now:.2f} dB, untrained {before:.2f} dB; videos in"
            f" {folder}"
        )

    def _render_trained(self, request: Request, label: str) -> np.ndarray:
        from diffattn.lora.adapter import ADAPTER
        from diffattn.lora.presence import under_method

        with ExitStack() as stack:
            stack.enter_context(self._little_memory())
            stack.enter_context(self._trainer.at_result())
            if not self._lora_everywhere:
                method = self._trainer.settings.attention["type"]
                stack.enter_context(under_method(self._trainer.model, ADAPTER, method))
            return render(request, self._loaded, label).frames

    def _render_untrained(self, number: int, request: Request) -> None:
        from diffattn.lora.losses import dense_teacher

        model, attachment = self._trainer.model, self._trainer.attachment
        with self._little_memory():
            with dense_teacher(model, attachment):
                dense = render(request, self._loaded, "dense").frames
            model.disable_adapters()
            try:
                sparse = render(request, self._loaded, "sparse").frames
            finally:
                model.enable_adapters()
        partial = self._untrained(number).with_suffix(".tmp.npz")
        np.savez_compressed(partial, dense=dense, sparse=sparse)
        partial.rename(self._untrained(number))

    @contextmanager
    def _little_memory(self) -> Iterator[None]:
        trainer, pipe = self._trainer, self._loaded.pipe
        device, denoiser = trainer.accelerator.device, trainer.recipe.denoiser
        with on_demand(pipe, device, resident=denoiser), in_tiles(pipe.vae, self._tiling):
            yield

    def _untrained(self, number: int) -> Path:
        return self._folder / f"{number:02d}-untrained.npz"


def _finite(ratio: float) -> float | None:
    # JSON has no infinity: null means that the frames are equal.
    return round(ratio, 3) if math.isfinite(ratio) else None
