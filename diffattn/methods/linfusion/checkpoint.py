"""The published weights of LinFusion: attention projections of a U-Net, and adapting networks.

A checkpoint is a folder with two files, as diffusers saves a model. `config.json` lists the
attention modules. `diffusion_pytorch_model.safetensors` has the weights of the module at place i of
the list under `{i}.to_q.weight` and so on. The projections are distilled from the model's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffattn.methods.checkpoint import (
    check_at_hand,
    check_names,
    check_shapes,
    models_in,
    parameters_by_own_name,
    shapes_in,
)
from diffattn.methods.linfusion.method import LinFusionAttn, LinFusionWeights
from diffattn.models import family_of

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"

_PROJECTION = re.compile(r"to_(q|k|v|out\.0)\.(weight|bias)")
_IDENTITY = -1


@dataclass(frozen=True)
class ModuleEntry:
    """An attention module in the configuration; the attributes have the published names.

    Attributes:
        module_name: the module's name in the U-Net.
        dim_n: number of channels.
        heads: number of heads.
        projection_mid_dim: as `LinFusionAttn.mid_dim`.
    """

    module_name: str
    dim_n: int
    heads: int
    projection_mid_dim: int | None

    @property
    def mid_dim(self) -> int:
        return self.dim_n if self.projection_mid_dim is None else self.projection_mid_dim


def load_linfusion_checkpoint(target: Any, folder: str | PathLike[str]) -> None:
    """Load a checkpoint of LinFusion into a U-Net with `LinFusionAttn` attached.

    The checkpoint's projections replace the model's own, which come back when the method is taken
    off. All names and shapes are checked before the first weight changes.

    Args:
        target: a diffusers pipeline, or its U-Net.
        folder: a download of https://huggingface.co/Yuanshi/LinFusion-1-5, LinFusion-2-1 or
            LinFusion-XL, or a folder that `save_linfusion_checkpoint` wrote.

    Raises:
        FileNotFoundError: if the folder lacks one of the two files.
        ValueError: if the checkpoint does not fit the model and the attached method.
    """
    folder = Path(folder)
    entries = _read_config(folder)
    for model in models_in(target):
        sites = _sites(model, f"{folder.name} is a checkpoint of LinFusion")
        _check_modules(model, sites, entries, folder.name)
        goals: dict[str, torch.nn.Parameter] = {}
        for place, entry in enumerate(entries):
            for name, parameter in _parameters(sites[entry.module_name]).items():
                goals[f"{place}.{name}"] = parameter
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            what, shapes = _misfit(model, folder.name), shapes_in(file)
            check_names(
                what,
                shapes.keys(),
                goals.keys(),
                strange="keys that the model has no parameter for",
                missing="no key for parameters of the model",
            )
            check_shapes(what, shapes, goals)
            for module in sites.values():
                module.linfusion.keep_teacher(_projections(module))
            with torch.no_grad():
                for key, parameter in goals.items():
                    parameter.copy_(file.get_tensor(key))


def save_linfusion_checkpoint(target: Any, folder: str | PathLike[str]) -> None:
    """Write a checkpoint that `load_linfusion_checkpoint` and the public code can read.

    Args:
        target: a diffusers pipeline whose U-Net has `LinFusionAttn` attached, or the U-Net.
        folder: where the two files go; made if missing.

    Raises:
        ValueError: if the model is no such U-Net, or offloading has moved its weights away.
    """
    folder = Path(folder)
    (model,) = models_in(target)
    entries, tensors = [], {}
    sites = _sites(model, "cannot save weights of LinFusion")
    for place, (name, module) in enumerate(sites.items()):
        width, network = module.to_q.in_features, module.linfusion.to_q_
        entries.append(ModuleEntry(name, width, module.heads, _mid_dim(network)))
        for key, parameter in _parameters(module).items():
            check_at_hand(f"{name}.{key}", parameter, "save the checkpoint")
            tensors[f"{place}.{key}"] = parameter.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "LinFusion", "modules_list": [asdict(entry) for entry in entries]}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(tensors, folder / WEIGHTS)


def _read_config(folder: Path) -> list[ModuleEntry]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"there is no {name} in {folder}; download a checkpoint from"
                f" https://huggingface.co/Yuanshi first"
            )
    try:
        modules = json.loads((folder / CONFIG).read_text("utf-8"))["modules_list"]
        return [ModuleEntry(**entry) for entry in modules]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG} is not the configuration of a LinFusion checkpoint, which lists"
            f" attention modules under modules_list: {error!r}"
        ) from None


def _sites(model: torch.nn.Module, what: str) -> dict[str, Any]:
    """The attention modules with the method attached, by name; `what` begins the error messages."""
    if family_of(model).name != "unet":
        raise ValueError(
            f"{what}: that is for the U-Nets of Stable Diffusion, and {type(model).__name__} is"
            f" none; its own state_dict has the weights of an attached method"
        )
    modules = {name: model.get_submodule(name) for name in family_of(model).layers(model)}
    sites = {
        name: module
        for name, module in modules.items()
        if isinstance(module._modules.get(LinFusionAttn.type), LinFusionWeights)
    }
    if not sites:
        raise ValueError(
            f"{what}: {type(model).__name__} is not attached to LinFusionAttn; call"
            f" set_attn_processor(LinFusionAttn(mid_dim=...)) first"
        )
    return sites


def _check_modules(
    model: torch.nn.Module, sites: Mapping[str, Any], entries: list[ModuleEntry], name: str
) -> None:
    """Raise ValueError unless the configuration lists the attached modules with their sizes."""
    listed = {entry.module_name for entry in entries}
    what = _misfit(model, name)
    check_names(
        what,
        listed,
        sites.keys(),
        strange="modules that the method is not attached to",
        missing="no entry for modules that the method is attached to",
        advice="; it must be for this U-Net, and the method attached to all of it",
    )
    for entry in entries:
        module = sites[entry.module_name]
        found = module.to_q.in_features, module.heads
        if found != (entry.dim_n, entry.heads):
            raise ValueError(
                f"{what}: {entry.module_name} has {entry.dim_n} channels and {entry.heads} heads in"
                f" it, but {found[0]} and {found[1]} in the model"
            )
        ours = _mid_dim(module.linfusion.to_q_)
        if ours != entry.mid_dim:
            raise ValueError(
                f"{name} is for {_method_of(entries)}, but {entry.module_name} is attached with"
                f" mid_dim={ours} where it has {entry.mid_dim}; attach that first"
            )


def _misfit(model: torch.nn.Module, name: str) -> str:
    return f"{name} does not fit {type(model).__name__}"


def _parameters(module: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of an attention module that a checkpoint has, by the checkpoint's names."""
    own = {
        f"{part}.{name}": parameter
        for part in ("to_q_", "to_k_")
        for name, parameter in getattr(module.linfusion, part).named_parameters()
    }
    return _projections(module) | own


def _projections(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    parameters = parameters_by_own_name(module)
    return {name: p for name, p in parameters.items() if _PROJECTION.fullmatch(name)}


def _method_of(entries: Iterable[ModuleEntry]) -> str:
    """The method for a configuration, as a user would write it."""
    widths: set[float | None] = {entry.projection_mid_dim for entry in entries}
    if len(widths) > 1:
        widths = {entry.mid_dim / entry.dim_n for entry in entries}
    if len(widths) > 1:
        return "a mapping of patterns to LinFusionAttn of different mid_dim"
    return f"LinFusionAttn(mid_dim={widths.pop()})"


def _mid_dim(network: Any) -> int:
    return _IDENTITY if isinstance(network, torch.nn.Identity) else network[0].out_features
