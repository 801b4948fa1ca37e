"""The shape of a model on this computer: of a folder's configuration files, or in memory."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffattn.models import denoisers, family_of
from diffattn.planning.published import PUBLISHED, LinearWork, ModelShape

_INDEX = "model_index.json"
_CONFIG = "config.json"
# Components that determine the tokens; all others are left out.
_PARTS = ("transformer", "transformer_2", "unet", "vae")
# Families whose blocks are those of `LinearWork.joint`.
_JOINT = (
    "flux", "hunyuanvideo", "mochi", "cogvideox", "sd3", "qwen-image", "chroma", "longcat-image",
    "bria", "bria-fibo", "hunyuan-image", "cogview-4", "cogview-3-plus", "glm-image",
)  # fmt: skip
_CONTEXT_OF_WAN = 512
# Fields of a shape, and the arguments of a pipeline's call whose defaults they are.
ARGUMENTS = {
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
    "steps": "num_inference_steps",
}


def folder_shape(folder: Path) -> ModelShape:
    """The shape of the model in a diffusers pipeline's folder; its weights are not read.

    Args:
        folder: a folder with `model_index.json`, or the denoiser's folder within it.

    Raises:
        ValueError: if `folder` is neither, a file in it cannot be read, or the pipeline's model is
            of no known family or has attention on grids of several sizes.
    """
    if not (folder / _INDEX).is_file() and (folder / _CONFIG).is_file():
        folder = folder.parent
    if not (folder / _INDEX).is_file():
        raise ValueError(
            f"{folder} is no diffusers pipeline: there is no {_INDEX} in it, which planning needs"
            f" beside the denoiser's own {_CONFIG}"
        )
    return pipeline_shape(pipeline_without_weights(folder), str(folder))


def pipeline_shape(pipe: Any, name: str) -> ModelShape:
    """The shape of a pipeline's model.

    Args:
        pipe: a pipeline of diffusers.
        name: of the model, for messages.

    Raises:
        ValueError: if the model is of no known family or has attention on grids of several sizes.
    """
    model = next(iter(denoisers(pipe).values()))
    family = family_of(model)
    given = _defaults(pipe)
    defaults = {
        field: given[argument]
        for field, argument in ARGUMENTS.items()
        if isinstance(given.get(argument), int)
    }
    shape = replace(_shape(pipe, model, name), sizes=family.sizes(pipe), **defaults)
    # A pipeline's default size need not be a size that this model can make.
    try:
        shape.grid(None, None, None, text=0)
    except ValueError:
        return replace(shape, height=None, width=None, num_frames=None)
    return shape


def _defaults(pipe: Any) -> dict[str, Any]:
    """The defaults of the arguments of a pipeline's call."""
    of_blocks = getattr(pipe, "default_call_parameters", None)  # of modular pipelines
    if of_blocks is None:
        parameters = inspect.signature(type(pipe).__call__).parameters
        return {name: parameter.default for name, parameter in parameters.items()}
    # Their blocks take a size from properties of the pipeline.
    sizes = {name: getattr(pipe, f"default_{name}", None) for name in ("height", "width")}
    sizes["num_frames"] = getattr(pipe, "default_num_frames", None)
    return sizes | {name: value for name, value in of_blocks.items() if value is not None}


def denoiser_shape(model: torch.nn.Module) -> ModelShape:
    """The shape of a denoiser without its pipeline, which has no sizes in pixels.

    Raises:
        ValueError: as `pipeline_shape`.
    """
    return _shape(None, model, type(model).__name__)


def _shape(pipe: Any, model: Any, name: str) -> ModelShape:
    family = family_of(model)
    if family.grid_modules is not None:
        raise ValueError(
            f"{family.title}: attention is on grids of several sizes, which one plan does not"
            f" describe; plan each grid by itself"
        )
    heads, head_dim = _heads(model.config)
    # Prompts are padded to the same length in all published models of a family, and sound is as
    # dense.
    like = next((shape for shape in PUBLISHED.values() if shape.variant == family.name), None)
    beside: dict[str, Any] = {}
    if family.text is not None:
        side = f"text_{family.text}"
        beside = {side: None if like is None else getattr(like, side)}
    if like is not None:
        beside["sound"] = like.sound
    # Blocks for a part of the tokens cost less, and are left out.
    blocks = (block for site, block in family.layers(model).items() if family.part(site) is None)
    return ModelShape(
        name=name,
        variant=family.variant(pipe, model),
        heads=heads,
        head_dim=head_dim,
        block_of_site=tuple(blocks),
        sizes=None,
        linear=_linear(family.name, model.config, heads * head_dim),
        **beside,
    )


def pipeline_without_weights(folder: Path) -> Any:
    """The folder's pipeline with only its denoisers and VAE, on torch's meta device."""
    import diffusers

    index = _read(folder / _INDEX)
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    if pipeline is None:
        raise ValueError(f"{folder}: diffusers has no pipeline {index.get('_class_name')!r}")
    components: dict[str, Any] = {}
    try:
        for name, parameter in list(inspect.signature(pipeline.__init__).parameters.items())[1:]:
            entry = index.get(name)
            if name in _PARTS and isinstance(entry, list) and entry[0] == "diffusers":
                config = _read(folder / name / _CONFIG)
                with torch.device("meta"):
                    components[name] = getattr(diffusers, entry[1]).from_config(config)
            elif name in index or parameter.default is parameter.empty:
                components[name] = None if isinstance(entry, list) else entry
        return pipeline(**components)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: cannot make a {pipeline.__name__} of its configuration: {error}"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _heads(config: Any) -> tuple[int, int]:
    """Number of heads of a denoiser, and their dimension."""
    if "axes_dims" in config and "model_dim" in config:  # Kandinsky
        head_dim = sum(config.axes_dims)
        return config.model_dim // head_dim, head_dim
    heads: int = _first_of(config, "num_attention_heads", "num_heads", "n_heads")
    width = _first_of(config, "attention_head_dim", "head_dim")
    return heads, width or _first_of(config, "hidden_size", "dim") // heads


def _first_of(config: Any, *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _linear(family: str, config: Any, channels: int) -> LinearWork | None:
    if family in _JOINT:
        return LinearWork.joint(channels)
    if family == "flux.2":  # gated feed-forwards
        return LinearWork(round(8 + 6 * config.mlp_ratio) * channels**2)
    if family == "ovis-image":
        return LinearWork(32 * channels**2)
    if family == "krea-2":  # grouped keys and values, a gate, a gated feed-forward
        keys = config.num_key_value_heads * config.attention_head_dim
        return LinearWork(2 * channels * (3 * channels + 2 * keys + 3 * config.intermediate_size))
    if family == "z-image":  # gated feed-forwards
        return LinearWork(8 * channels**2 + 6 * channels * int(channels / 3 * 8))
    if family == "wan":
        return LinearWork.apart(channels, config.ffn_dim, _CONTEXT_OF_WAN)
    return None
