"""Pipelines without weights, on torch's meta device, by configuration alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffattn._checks import did_you_mean
from diffattn.lora.errors import LoraError
from diffattn.planning.folder import pipeline_without_weights
from diffattn.planning.published import published_shape


@dataclass(frozen=True)
class _Known:
    """The configuration of a published model, as far as it differs from diffusers' defaults."""

    pipeline: str
    denoiser: str
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    config: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _wan(heads: int, layers: int, feed_forward: int, **changes: Any) -> _Known:
    config = {"num_attention_heads": heads, "num_layers": layers, "ffn_dim": feed_forward}
    return _Known("WanPipeline", "WanTransformer3DModel", config=config | changes)


def _cogvideox(heads: int, layers: int, **changes: Any) -> _Known:
    config = {"num_attention_heads": heads, "num_layers": layers}
    return _Known(
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        "CogVideoXDDIMScheduler",
        config | changes,
    )


def _flux(guidance: bool) -> _Known:
    return _Known("FluxPipeline", "FluxTransformer2DModel", config={"guidance_embeds": guidance})


_HUNYUANVIDEO = _Known(
    "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", config={"guidance_embeds": True}
)
_ROTARY = {"use_rotary_positional_embeddings": True}
_KNOWN: Mapping[str, _Known] = {
    "Wan-AI/Wan2.1-T2V-1.3B": _wan(12, 30, 8960),
    "Wan-AI/Wan2.1-T2V-14B": _wan(40, 40, 13824),
    "Wan-AI/Wan2.2-T2V-A14B": _wan(40, 40, 13824),
    "Wan-AI/Wan2.2-TI2V-5B": replace(
        _wan(24, 30, 14336, in_channels=48, out_channels=48), arguments={"expand_timesteps": True}
    ),
    "hunyuanvideo-community/HunyuanVideo": _HUNYUANVIDEO,
    "tencent/HunyuanVideo": _HUNYUANVIDEO,
    "genmo/mochi-1-preview": _Known("MochiPipeline", "MochiTransformer3DModel"),
    "zai-org/CogVideoX-2b": _cogvideox(30, 30),
    "zai-org/CogVideoX-5b": _cogvideox(48, 42, **_ROTARY),
    "zai-org/CogVideoX1.5-5B": _cogvideox(
        48, 42, **_ROTARY, patch_size_t=2, patch_bias=False, sample_height=300, sample_width=300
    ),
    "Lightricks/LTX-Video": _Known("LTXPipeline", "LTXVideoTransformer3DModel"),
    "black-forest-labs/FLUX.1-dev": _flux(guidance=True),
    "black-forest-labs/FLUX.1-schnell": _flux(guidance=False),
}


def unloaded_pipeline(model: str) -> Any:
    """A pipeline whose denoiser has no values, and which has no text encoder.

    Args:
        model: folder of a pipeline, or the repository id of a well-known model.

    Raises:
        LoraError: if the model is neither, or a file of the folder cannot be read.
    """
    import diffusers

    folder = Path(model).expanduser()
    if folder.is_dir():
        try:
            pipe = pipeline_without_weights(folder)
            scheduler = _scheduler_class(folder)
            pipe.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
        except (ValueError, OSError, AttributeError) as error:
            raise LoraError(error) from None
        return pipe
    shape = published_shape(model)
    known = None if shape is None else _KNOWN.get(shape.name)
    if known is None:
        raise LoraError(
            f"{model!r} is neither a pipeline's folder here nor a model whose configuration is"
            f" known{did_you_mean(model, _KNOWN, or_list=True)}"
        )
    with torch.device("meta"):
        denoiser = getattr(diffusers, known.denoiser)(**known.config)
    parts = {"transformer": denoiser, "scheduler": getattr(diffusers, known.scheduler)()}
    pipeline: Any = getattr(diffusers, known.pipeline)
    names = [
        name
        for name, parameter in inspect.signature(pipeline.__init__).parameters.items()
        if name != "self" and parameter.default is parameter.empty
    ]
    return pipeline(**(dict.fromkeys(names) | parts | dict(known.arguments)))


def _scheduler_class(folder: Path) -> Any:
    import diffusers

    entry = json.loads((folder / "model_index.json").read_text("utf-8"))["scheduler"]
    return getattr(diffusers, entry[1])
