"""Training data that the dense model makes itself, from a list of prompts."""

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
from diffattn.lora.encoding import check_size, store_empty, text_identity
from diffattn.lora.errors import LoraError
from diffattn.lora.recipes import Recipe
from diffattn.models import denoisers

# In the keys of all that is made here; to be raised when what is made changes.
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
    """Generate latents with the pipeline as it is, those that are not there yet.

    What the denoiser ends with is what is learnt from: nothing is decoded and encoded again. For
    one process at a time: one that finds everything there writes nothing.

    Args:
        pipe: the pipeline, dense.
        recipe: of the pipeline.
        prompts: what to generate.
        folder: where to; may hold other clips and those of a run that was stopped.
        height, width, num_frames: pixels and frames of a video; images have one frame.
        samples: videos of each prompt.
        steps: denoising steps.
        seed: decides the noise.
        progress: told how many videos are done, of how many.
        call: more arguments of the pipeline's call, such as `guidance_scale`; JSON types.

    Returns:
        The data set, of one shape: all samples of the first prompt come first.

    Raises:
        LoraError: if sparse attention is attached, the pipeline has no text encoder, the model
            cannot make that size or does not take an argument, there are no prompts, or `folder`
            cannot be written to.
    """
    models = denoisers(pipe)
    if any(attached_to(model) is not None for model in models.values()):
        raise LoraError(
            "the teacher attends sparsely: call pipe.set_attn_processor(None) before it makes data"
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
            generator = torch.Generator().manual_seed(seed_of(key))
            made = pipe(prompt=prompt, **arguments, output_type="latent", generator=generator)[0]
            latents = recipe.from_pipeline(made, height, width).float()
            if not latents.isfinite().all():
                raise LoraError(
                    f"the teacher gave NaN in {recipe.dtype} for {prompt!r}: load it in float32 or"
                    f" bfloat16"
                )
            told = recipe.encode_prompt(pipe, [prompt])
            store(folder, key, latents, told, {"caption": prompt, "source": "teacher"})
        keys.append(key)
        progress(done, len(asked))
    empty = store_empty(pipe, recipe, folder, text)
    facts = {"family": recipe.family, "size": [height, width, num_frames]}
    write_index(folder, keys, empty, facts)
    return CachedClips(folder)
