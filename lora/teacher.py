"""Training data that the dense model itself makes from a list of prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffattn.attach.denoiser import attached_to
from diffattn.lora.cache import (
    CachedClips,
    entry_key,
    fingerprint,
    is_stored,
    open_folder,
    seed_of,
    store,
    write_index,
)
from diffattn.lora.encoding import check_size, encode_caption, store_empty, text_identity
from diffattn.lora.errors import LoraError
from diffattn.lora.recipes import Recipe
from diffattn.models import denoisers

# Part of every key of this module; to be raised when the generated data change.
_FORMAT = 1


def teach(
    pipe: Any,
    recipe: Recipe,
    prompts: Sequence[str],
    folder: Path,
    height: int,
    width: int,
    num_frames: int = 1,
    samples: int = 1,
    steps: int = 50,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
    **call: Any,
) -> CachedClips:
    """Generate the latents that do not exist yet with a dense pipeline.

    The training data are the final latents of the denoiser: nothing is decoded and encoded again.
    Only one process at a time may generate. A process that finds all latents writes nothing.

    Args:
        pipe: the pipeline, without sparse attention.
        recipe: the recipe of the pipeline.
        prompts: the prompts.
        folder: the folder of the data set; may hold other clips, and clips of a stopped run.
        height, width: pixels.
        num_frames: frames of a video; 1 for images.
        samples: number of videos for each prompt.
        steps: number of denoising steps.
        seed: seed of the noise.
        progress: called with the number of finished videos and the number of all videos.
        call: more arguments of the pipeline's call, such as `guidance_scale`; JSON types.

    Returns:
        The data set; all videos have the same shape. The samples of a prompt stand together, in the
        order of the prompts.

    Raises:
        LoraError: if sparse attention is attached, the pipeline has no text encoder, the model
            cannot make the size or does not take an argument, there are no prompts, the latents are
            not finite, or `folder` cannot be written to.
    """
    models = denoisers(pipe)
    if any(attached_to(model) is not None for model in models.values()):
        raise LoraError(
            "the teacher attends sparsely: call pipe.set_attn_processor(None) before it makes data"
        )
    if recipe.edits:
        raise LoraError(
            f"{type(pipe).__name__} edits pictures, which prompts alone do not give: train on pairs"
            f" of pictures"
        )
    if not prompts:
        raise LoraError("there are no prompts for the teacher")
    if samples < 1:
        raise LoraError(f"samples is {samples}, but must be at least 1")
    check_size(pipe, height, width, num_frames)
    known = inspect.signature(type(pipe).__call__).parameters
    for name in call:
        if name not in known:
            raise LoraError(f"{type(pipe).__name__} does not take {name!r}")
    arguments = recipe.call_arguments(pipe, num_frames) | call
    arguments |= {"height": height, "width": width, "num_inference_steps": steps}
    text = text_identity(pipe, recipe)
    open_folder(folder)
    settings = {
        "format": _FORMAT,
        "call": arguments,
        "seed": seed,
        "text": text,
        "model": fingerprint(*models.values(), pipe.scheduler),
    }
    asked = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    keys: list[str] = []
    for done, (prompt, sample) in enumerate(asked, start=1):
        key = entry_key(settings | {"prompt": prompt, "sample": sample})
        if not is_stored(folder, key):
            # The pipeline encodes the prompt, too, before the denoiser takes the device.
            told = encode_caption(pipe, recipe, prompt)
            generator = torch.Generator().manual_seed(seed_of(key))
            made = pipe(prompt=prompt, **arguments, output_type="latent", generator=generator)[0]
            latents = recipe.from_pipeline(made, height, width).float()
            if not latents.isfinite().all():
                raise LoraError(
                    f"the teacher gave NaN in {recipe.dtype} for {prompt!r}: load it in float32 or"
                    f" bfloat16"
                )
            store(folder, key, latents, told, {"caption": prompt, "source": "teacher"})
        keys.append(key)
        progress(done, len(asked))
    empty = store_empty(pipe, recipe, folder, text)
    facts = {"family": recipe.family, "size": [height, width, num_frames]}
    write_index(folder, keys, empty, facts)
    return CachedClips(folder)
