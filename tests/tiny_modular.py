"""Tiny modular pipelines of diffusers over the models of tiny_families, built offline.

Each holds the blocks between the encoded prompt and the latents, without encoders and decoders.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import diffusers
import pytest
import tiny_families as tiny
import tiny_wan
import torch

TEXT, WIDTH = 7, 16


@dataclass(frozen=True)
class ModularCase:
    """A modular pipeline and a call of it.

    Attributes:
        blocks: the module of diffusers' modular pipelines, and its class of blocks.
        components: makes the components that are loaded.
        inputs: what is particular to its call.
        size: height, width and number of frames, for a grid of 3 x 4 x 6 or 1 x 6 x 9 tokens.
        forwards: calls of a denoiser in a step.
    """

    blocks: tuple[str, str]
    components: Callable[[], dict[str, Any]]
    inputs: Callable[[], dict[str, Any]]
    size: tuple[int, int, int]
    forwards: int = 2

    def empty(self) -> Any:
        """The pipeline before its components are loaded."""
        module, name = self.blocks
        try:
            blocks = getattr(import_module(f"diffusers.modular_pipelines.{module}"), name)
        except (ImportError, AttributeError):
            pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
        return blocks().init_pipeline()

    def build(self) -> Any:
        pipe = self.empty()
        pipe.update_components(**self.components())
        return pipe

    def run(self, pipe: Any, steps: int = 2, size: tuple[int, int, int] | None = None) -> Any:
        """Latents of a short seeded call."""
        height, width, num_frames = size or self.size
        inputs = self.inputs() | {"height": height, "width": width}
        if num_frames > 1:
            inputs["num_frames"] = num_frames
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        return pipe(**inputs, num_inference_steps=steps, generator=generator, output="latents")


def _prompts(prefixes: tuple[str, ...] = ("", "negative_")) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": tiny.noise(1, TEXT, WIDTH, seed=len(prefix))
        for prefix in prefixes
    }


def _guider() -> Any:
    return diffusers.ClassifierFreeGuidance(guidance_scale=3.0)


def _wan() -> dict[str, Any]:
    return {
        "transformer": tiny_wan.transformer(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "guider": _guider(),
    }


def _qwen_inputs() -> dict[str, Any]:
    masks = {f"{p}prompt_embeds_mask": tiny.valid_text(TEXT, TEXT) for p in ("", "negative_")}
    return _prompts() | masks


MODULAR: dict[str, ModularCase] = {
    "wan": ModularCase(
        ("wan.modular_blocks_wan", "WanCoreDenoiseStep"), _wan, _prompts, size=(64, 96, 9)
    ),
    "wan 2.2": ModularCase(
        ("wan.modular_blocks_wan22", "Wan22CoreDenoiseStep"),
        lambda: _wan() | {"transformer_2": tiny_wan.transformer(seed=1), "guider_2": _guider()},
        _prompts,
        size=(64, 96, 9),
    ),
    "flux": ModularCase(
        ("flux.modular_blocks_flux", "FluxCoreDenoiseStep"),
        lambda: {
            "transformer": tiny.flux(),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        },
        lambda: _prompts(("",)) | {"pooled_prompt_embeds": tiny.noise(1, 8)},
        size=(96, 144, 1),
        forwards=1,
    ),
    "qwen-image": ModularCase(
        ("qwenimage.modular_blocks_qwenimage", "QwenImageCoreDenoiseStep"),
        lambda: {
            "transformer": tiny.qwen_image(),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
            "guider": _guider(),
        },
        _qwen_inputs,
        size=(96, 144, 1),
    ),
}
