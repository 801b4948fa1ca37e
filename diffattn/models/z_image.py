"""Z-Image and Z-Image Omni: images, out of text and, in Omni's calls, out of other pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffattn.grid import Reference, TokenGrid
from diffattn.models.base import Family, SizeRules, argument

# The model fills up each text and each picture with a learned token, which every token sees.
_MULTIPLE = 32


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of a call: [picture, padding, text], or in Omni's calls [texts, pictures, SigLIP].

    Raises:
        ValueError: if the samples of the batch differ in the places of their pictures.
    """
    samples = argument(args, kwargs, 0, "x")
    patch = argument(args, kwargs, 7, "patch_size") or 2
    patches = (argument(args, kwargs, 8, "f_patch_size") or 1, patch, patch)
    if isinstance(samples[0], list):
        texts = argument(args, kwargs, 2, "cap_feats")
    else:
        # The text of such a call stands after the picture.
        samples, texts = [[picture] for picture in samples], [[]] * len(samples)
    grids = {_sample(*sample, patches) for sample in zip(texts, samples, strict=True)}
    if len(grids) > 1:
        raise ValueError(
            f"this call of {type(model).__name__} has samples in one batch whose pictures have"
            f" different sizes or places in the sequence: {' and '.join(sorted(map(str, grids)))}"
            f" tokens. Call it once per sample (Omni's pipeline: guidance_scale=0, or a negative"
            f" prompt as long as the prompt), or set_attn_processor(None)"
        )
    return grids.pop()


def _sample(
    texts: Sequence[torch.Tensor],
    pictures: Sequence[torch.Tensor | None],
    patches: tuple[int, int, int],
) -> TokenGrid:
    """The grid of one sample; its last picture is the one that is denoised."""
    start = sum(_padded(len(text)) for text in texts)
    references = []
    for picture in pictures[:-1]:
        if picture is None:
            start += _MULTIPLE
        else:
            frames, height, width = _tokens(picture, patches)
            references.append(Reference(start, frames, height, width))
            start += _padded(references[-1].tokens)
    frames, height, width = _tokens(pictures[-1], patches)
    tokens = frames * height * width
    return TokenGrid(
        frames, height, width, start, _padded(tokens) - tokens, references=tuple(references)
    )


def _tokens(picture: Any, patches: tuple[int, int, int]) -> list[int]:
    """Tokens along each axis of latents (channels, frames, height, width)."""
    return [size // patch for size, patch in zip(picture.shape[1:], patches, strict=True)]


def _padded(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * 2)


Z_IMAGE = Family(
    name="z-image",
    title="Z-Image and Z-Image Omni (the noise refiner stays dense)",
    beside="padding of each picture, dense; pictures of Omni, as references",
    model_classes=("ZImageTransformer2DModel",),
    # In Omni's calls the two blocks of the noise refiner see pictures without the texts before.
    sites=re.compile(r"layers\.(?P<layer>\d+)\.attention"),
    grid=_grid,
    sizes=_sizes,
    text="after",
    images=True,
)
