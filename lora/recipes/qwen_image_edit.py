"""Qwen-Image-Edit, also 2509 and 2511: a picture from a picture and an instruction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from diffattn.lora.errors import LoraError
from diffattn.lora.recipes.base import encode_pixels
from diffattn.lora.recipes.packed import PATCH, pack, unpack
from diffattn.lora.recipes.qwen_image import (
    MASK,
    TEXT,
    QwenImageRecipe,
    normalised,
    padded_text,
    qwen_image_settings,
    valid_text,
)

_SOURCE = "source"
_EMPTY = "empty_"

# The pipelines scale what is edited to this area, whatever the size of the result is.
_AREA = 1024 * 1024
# What the text encoder sees; the first pipeline shows it the whole area.
_SHOWN_AREA = {"QwenImageEditPipeline": _AREA, "QwenImageEditPlusPipeline": 384 * 384}
_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class QwenImageEditRecipe(QwenImageRecipe):
    """The recipe of Qwen-Image-Edit, with one picture to edit.

    The caption is an instruction, and the text encoder sees it together with the source.
    """

    edits: ClassVar[bool] = True

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """See `Recipe.encode_prompt`.

        Raises:
            LoraError: always, as no instruction is encoded without its picture.
        """
        raise LoraError(
            f"{type(pipe).__name__} encodes an instruction together with the picture to edit: there"
            f" is no text alone"
        )

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """See `Recipe.source_size`; the pipeline keeps a picture's shape, not its size."""
        return _of_area(_AREA, height, width)

    def encode_source(self, pipe: Any, pixels: Tensor, caption: str) -> dict[str, Tensor]:
        """See `Recipe.encode_source`.

        Beside the latents of the source, there are the texts of the caption and of no caption.
        """
        frame = pixels[0, :, 0].permute(1, 2, 0)
        picture = Image.fromarray(((frame + 1) * 127.5).round().to(torch.uint8).cpu().numpy())
        area = _SHOWN_AREA[type(pipe).__name__]
        shown = pipe.image_processor.resize(picture, *_of_area(area, *pixels.shape[3:]))
        with torch.no_grad():
            texts = [pipe.encode_prompt(prompt=p, image=[shown])[0] for p in (caption, "")]
        # The empty caption's text is the picture and the template.
        length = texts[1].shape[1] + self.text_length
        if texts[0].shape[1] > length:
            raise LoraError(
                f"the caption {caption!r} has {texts[0].shape[1] - texts[1].shape[1]} tokens, but"
                f" at most {self.text_length} are trained: shorten it"
            )
        text, empty = (padded_text(embeds, length) for embeds in texts)
        latents = normalised(pipe, encode_pixels(pipe, pixels, None))
        return {**text, **{_EMPTY + name: value for name, value in empty.items()}, _SOURCE: latents}

    def encode_empty(self, pipe: Any) -> dict[str, Tensor]:
        """See `Recipe.encode_empty`; each clip has its own."""
        return {}

    def told(
        self, conditions: dict[str, Tensor], empty: dict[str, Tensor], dropped: bool
    ) -> dict[str, Tensor]:
        """See `Recipe.told`; the empty caption is the clip's own, which shows the source."""
        prefix = _EMPTY if dropped else ""
        return {name: conditions[prefix + name] for name in (TEXT, MASK)} | {
            _SOURCE: conditions[_SOURCE]
        }

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`; the source's tokens stand behind the target's."""
        text, mask = valid_text(conditions[TEXT], conditions[MASK])
        target, source = pack(noisy), pack(conditions[_SOURCE])
        shapes = [
            (1, height // PATCH, width // PATCH)
            for height, width in (noisy.shape[3:], conditions[_SOURCE].shape[3:])
        ]
        out: Tensor = model(
            hidden_states=torch.cat([target, source.to(target.dtype)], dim=1).to(self.dtype),
            timestep=self.model_times(times).to(self.dtype) / 1000,
            encoder_hidden_states=text.to(self.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[shapes] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(out[:, : target.shape[1]], *noisy.shape[3:])


def _of_area(area: int, height: int, width: int) -> tuple[int, int]:
    """The rows and columns of about this area, in the shape of height x width."""
    columns = math.sqrt(area * (width / height))
    rows = columns / (width / height)
    return round(rows / _MULTIPLE) * _MULTIPLE, round(columns / _MULTIPLE) * _MULTIPLE


def qwen_image_recipe(pipe: Any, denoiser: str, text_length: int | None) -> QwenImageRecipe:
    """The recipe of a text-to-image pipeline, or of one that edits."""
    name = type(pipe).__name__
    if name in _SHOWN_AREA:
        return QwenImageEditRecipe(**qwen_image_settings(pipe, denoiser, text_length))
    if hasattr(pipe, "processor"):
        raise LoraError(
            f"there is no training recipe for {name}: train its model in {' or '.join(_SHOWN_AREA)}"
        )
    return QwenImageRecipe(**qwen_image_settings(pipe, denoiser, text_length))
