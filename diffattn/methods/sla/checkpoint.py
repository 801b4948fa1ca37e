"""Checkpoints of SLA, the layer `proj_l` of each attention site, and of SLA2.

TurboDiffusion writes all weights of a model to one `.pth` file, by the names of Wan's own code. The
layer is `blocks.0.self_attn.attn_op.local_attn.proj_l` there, in conversions for diffusers
`blocks.0.attn1.attn_op.local_attn.proj_l`, and in FastVideo's `blocks.0.attn1.attn_impl.proj_l`.

Nothing is published for SLA2. Its weights are called `blocks.0.attn1.sla2.router_q` and so on,
as in the file beside a LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffattn.methods.checkpoint import check_at_hand, check_names, check_shapes, models_in
from diffattn.methods.sla.method import SLAAttn
from diffattn.methods.sla.sla2 import SLA2Attn
from diffattn.methods.sla.weights import SLA2Weights, SLAWeights
from diffattn.models import family_of

_LAYER = re.compile(
    r"(?:net\.)?(?P<site>.+)\.(?:"
    r"(?:attn_op\.local_attn|attn_impl)\.(?P<layer>proj_l\.(?:weight|bias))"
    r"|sla2\.(?P<part>router_q|router_k|alpha_logits))"
)
_SAVED = {SLAAttn.type: "attn_op.local_attn", SLA2Attn.type: SLA2Attn.type}
# The name of Wan's self-attention in Wan's own code, and in diffusers.
_WANS_NAME = re.compile(r"\.self_attn$")
_DIFFUSERS_NAME = ".attn1"


def load_sla_checkpoint(target: Any, path: str | PathLike[str]) -> None:
    """Load the trained weights of SLA or SLA2 into a model with `SLAAttn` or `SLA2Attn` attached.

    Of SLA only the layers `proj_l` are loaded. Other weights in the file are not: load the model
    itself with the weights that were trained together with these layers. The published layers are
    for distilled models of few steps, and give no good videos with the original weights. A
    checkpoint does not tell the `keep` that it was trained with; published ones were trained with
    `SLAAttn(keep=0.1, linear="all")`. All names and shapes are checked before a weight changes.

    Args:
        target: a model of diffusers, or a pipeline with one denoiser. A pipeline of two experts has
            a checkpoint for each, to be loaded into `pipe.transformer` and `pipe.transformer_2`.
        path: a `.pth` file of TurboDiffusion, a `.safetensors` file, or a folder of these such as
            the `transformer` of a converted model. For SLA2, a file of `save_sla_checkpoint`, or
            the folder of a LoRA that was trained under the method.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if the checkpoint cannot be read, has no such layers, or does not fit the model
            and the attached method.
    """
    path = Path(path)
    model = _only_model(target, "load a checkpoint")
    sites = _sites(model, f"{path.name} is a checkpoint of SLA")
    tensors = _read(path)
    goals = {
        f"{name}.{part}": parameter
        for name, weights in sites.items()
        for part, parameter in weights.named_parameters()
    }
    what = f"{path.name} does not fit {type(model).__name__}"
    check_names(
        what,
        tensors.keys(),
        goals.keys(),
        strange="layers at sites that the method is not attached to",
        missing="no layer for sites that the method is attached to",
        advice="; it must be for this model, and the method attached to all of it",
    )
    check_shapes(what, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, goals)
    with torch.no_grad():
        for key, parameter in goals.items():
            parameter.copy_(tensors[key])


def save_sla_checkpoint(target: Any, path: str | PathLike[str]) -> None:
    """Write the trained weights of SLA or SLA2 to a file that `load_sla_checkpoint` can read.

    Args:
        target: a model with `SLAAttn` or `SLA2Attn` attached, or a pipeline with one denoiser.
        path: the `.safetensors` file to write.

    Raises:
        ValueError: if the method is not attached, offloading has moved the weights away, or the
            file's name does not end in `.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"the file is {path.name}, but its name must end in .safetensors")
    model = _only_model(target, "save a checkpoint")
    tensors = {}
    for name, weights in _sites(model, "cannot save weights of SLA").items():
        kind = SLAAttn.type if isinstance(weights, SLAWeights) else SLA2Attn.type
        for part, parameter in weights.named_parameters():
            key = f"{name}.{_SAVED[kind]}.{part}"
            check_at_hand(key, parameter, "save the checkpoint")
            tensors[key] = parameter.detach().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def _only_model(target: Any, what: str) -> torch.nn.Module:
    models = list(models_in(target))
    if len(models) != 1:
        raise ValueError(
            f"{type(target).__name__} has {len(models)} denoisers, and each has layers of its own:"
            f" {what} for each of them, such as of pipe.transformer"
        )
    return models[0]


def _sites(model: torch.nn.Module, what: str) -> dict[str, SLAWeights | SLA2Weights]:
    """The weights of the sites with the method attached; `what` begins the error message."""
    sites = {}
    for name in family_of(model).layers(model):
        parts = model.get_submodule(name)._modules
        weights = parts.get(SLAAttn.type, parts.get(SLA2Attn.type))
        if isinstance(weights, SLAWeights | SLA2Weights):
            sites[name] = weights
    if not sites:
        raise ValueError(
            f"{what}: {type(model).__name__} is not attached to SLAAttn or SLA2Attn; call"
            f" set_attn_processor(SLAAttn()) first"
        )
    return sites


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, called `<site>.proj_l.weight`, `<site>.router_q` and so on."""
    if not path.exists():
        raise FileNotFoundError(
            f"there is no checkpoint {path}; download one from"
            f" https://huggingface.co/TurboDiffusion first"
        )
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            found |= _of_safetensors(file) if file.suffix == ".safetensors" else _of_torch(file)
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{file} is no checkpoint that can be read, a .safetensors file or the tensors of a"
                f" .pth file: {error}"
            ) from None
    if not found:
        raise ValueError(
            f"{path} has no layers of SLA, such as blocks.0.attn1.attn_op.local_attn.proj_l.weight,"
            f" and no weights of SLA2; a model that was not trained for them has none"
        )
    return found


def _of_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        named = ((_own_name(key), key) for key in file.keys())  # noqa: SIM118
        return {name: file.get_tensor(key) for name, key in named if name is not None}


def _of_torch(path: Path) -> dict[str, torch.Tensor]:
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, but must hold named tensors")
    named = ((_own_name(key), tensor) for key, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def _own_name(key: str) -> str | None:
    match = _LAYER.fullmatch(key)
    if match is None:
        return None
    site = _WANS_NAME.sub(_DIFFUSERS_NAME, match["site"])
    return f"{site}.{match['layer'] or match['part']}"
