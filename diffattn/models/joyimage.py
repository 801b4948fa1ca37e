"""JoyImage Edit and Edit Plus: images out of images and text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffattn.grid import Reference, TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input

_SITES = re.compile(r"double_blocks\.(?P<layer>\d+)\.attn")


def _edit_grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of latents (batch, pictures, channels, frames, height, width), all of one size.

    The model puts the last picture first: the one that is denoised. Latents of a single picture may
    lack the second dimension.
    """
    latents = first_input(args, kwargs)
    pictures = latents.shape[1] if latents.ndim == 6 else 1
    sizes = zip(latents.shape[-3:], model.config.patch_size, strict=True)
    return _in_a_row([tuple(size // patch for size, patch in sizes)] * pictures)


def _plus_grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of patches in a row, whose sizes `shape_list` has; the first picture is denoised.

    Raises:
        ValueError: if the samples of the batch have pictures of different sizes.
    """
    samples = argument(args, kwargs, 4, "shape_list")
    shapes = {tuple(map(tuple, sample)) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(
            f"this call of {type(model).__name__} has a shape_list whose samples differ: {samples}."
            f" Their tokens have no grid in common: call it once per sample, or"
            f" set_attn_processor(None)"
        )
    grid = _in_a_row(shapes.pop())
    padding = first_input(args, kwargs).shape[1] - grid.tokens
    return grid.beside(after=padding)


def _in_a_row(sizes: Sequence[Sequence[int]]) -> TokenGrid:
    """The grid of pictures of some sizes one after another, of which the first is denoised."""
    (frames, height, width), *others = sizes
    start = end = frames * height * width
    references: list[Reference] = []
    for length, rows, columns in others:
        references.append(Reference(end, length, rows, columns))
        end = references[-1].stop
    return TokenGrid(frames, height, width, text_after=end - start, references=tuple(references))


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[-1])


JOYIMAGE_EDIT = Family(
    name="joyimage-edit",
    title="JoyImage Edit",
    beside="reference pictures, as references",
    model_classes=("JoyImageEditTransformer3DModel",),
    sites=_SITES,
    grid=_edit_grid,
    sizes=_sizes,
    text="after",
    images=True,
    tested="model",
)

JOYIMAGE_EDIT_PLUS = Family(
    name="joyimage-edit-plus",
    title="JoyImage Edit Plus",
    beside="reference pictures, as references; padding, dense",
    model_classes=("JoyImageEditPlusTransformer3DModel",),
    sites=_SITES,
    grid=_plus_grid,
    sizes=_sizes,
    text="after",
    images=True,
    tested="model",
)
