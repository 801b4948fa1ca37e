"""The trained weights of a denoiser: the LoRA of its attention sites, and the method's own weights.

The LoRA's file has the format of diffusers: stock `pipe.load_lora_weights` reads it. The header of
the file names the method that the LoRA was trained under. The method's own weights, if there are
any, are in a second file in the same folder.

The LoRA of a second expert is written into a folder of its own. Its layers have the names and the
sizes of the first expert's, and stock diffusers would load it into the first without a word.

The factor alpha / rank is multiplied into the weights: programs that read no header, and take a
missing alpha for the rank, apply the LoRA with the strength that it was trained with.
"""

from __future__ import annotations

import inspect
import json
import struct
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from diffattn.attach.denoiser import attached_to
from diffattn.attach.sites import site_names
from diffattn.lora.errors import LoraError
from diffattn.lora.settings import TrainSettings
from diffattn.methods.base import SiteWeights
from diffattn.models import family_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
METHOD_FILE = "diffattn_method_weights.safetensors"

SECOND_EXPERT = "transformer_2"

# The name of the first adapter in peft and in diffusers.
ADAPTER = "default"

_HEADER = "diffattn"
# The entry of a file's header that holds the file's metadata, and the multiple of bytes that the
# header fills up (safetensors).
_METADATA = "__metadata__"
_ALIGNMENT = 8


@dataclass(frozen=True)
class LoraRecord:
    """The record of a training in the header of a LoRA's file.

    Attributes:
        method: the `to_dict()` of the attention method in the training.
        denoiser: the pipeline's component that the LoRA is for.
        steps: number of optimiser steps.
        latents: shape of a sample, (channels, latent frames, height, width).
        settings: the `to_dict()` of the training's settings.
        family: the name of the model's family; None in files of earlier versions.
        model: where the model was loaded from; None if unknown.
        density: the part of the token pairs that the method keeps at the size of the training; None
            for methods without a mask of their own, or if unknown.
        clips: number of clips learnt from; None if unknown.
    """

    method: Mapping[str, Any]
    denoiser: str
    steps: int
    latents: tuple[int, ...]
    settings: Mapping[str, Any]
    family: str | None = None
    model: str | None = None
    density: float | None = None
    clips: int | None = None


def add_adapter(model: Any, settings: TrainSettings) -> dict[str, torch.nn.Parameter]:
    """Add a LoRA to the attention sites of a denoiser, and freeze the denoiser's own weights.

    The attached method's weights, see `SiteWeights.trained`, are trained, too; with `method_only`
    the LoRA is not, and stays at nothing. Trained parameters are in float32 for a model of any
    dtype.

    Args:
        model: the denoiser, with a method attached.
        settings: the settings of the training.

    Returns:
        The parameters to train, by name.

    Raises:
        LoraError: as `check_adapter`; or if `method_only` leaves nothing to train.
    """
    from peft import LoraConfig

    settings = settings.completed()
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=check_adapter(model, settings),
        lora_dropout=settings.dropout,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        init_lora_weights=True,
    )
    model.requires_grad_(False)
    # The LoRA's factors start from random numbers.
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model.add_adapter(config)
    own = _method_modules(model).values()
    if settings.method_only:
        if not own:
            raise LoraError(
                f"method_only is true, but {settings.attention['type']} with these parameters has"
                f" no weights of its own to train: leave method_only out"
            )
        model.requires_grad_(False)
    for weights in own:
        for parameter in weights.trained():
            parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_adapter(model: Any, settings: TrainSettings) -> list[str]:
    """Check that a denoiser can take the LoRA of a training.

    Args:
        model: the denoiser.
        settings: the settings of the training.

    Returns:
        The full names of the layers that the LoRA is for.

    Raises:
        LoraError: if a target is no layer of any site, the rank is larger than any of the layers
            can use, or the model has a LoRA already.
    """
    if getattr(model, "peft_config", None):
        raise LoraError(
            f"{type(model).__name__} has a LoRA already: fuse it (pipe.fuse_lora, then"
            f" pipe.unload_lora_weights) or load the pipeline without it"
        )
    names = _target_names(model, settings.targets)
    rank = settings.completed().rank
    assert rank is not None
    layers: list[Any] = [model.get_submodule(name) for name in names]
    # A product of two factors has at most the rank of its smaller side.
    most = max(min(layer.in_features, layer.out_features) for layer in layers)
    if rank > most:
        raise LoraError(
            f"rank is {rank}, but the {len(names)} layers of {type(model).__name__} that get a LoRA"
            f" have a rank of {most} at most themselves: give a rank from 1 to {most}"
        )
    return names


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights by name that a training leaves: the LoRA's, and the attached method's own."""
    own = tuple(f"{name}." for name in _method_modules(model))
    return {
        name: weight
        for name, weight in model.state_dict().items()
        if ".lora_" in name or name.startswith(own)
    }


def place_of(folder: Path, denoiser: str) -> Path:
    """The folder of a denoiser's LoRA inside the folder of its training."""
    return folder / denoiser if denoiser == SECOND_EXPERT else folder


def save_adapter(
    pipe: DiffusionPipeline,
    record: LoraRecord,
    folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the LoRA of a pipeline's denoiser, and the method's own weights, into a folder.

    Args:
        pipe: the pipeline.
        record: the record for the header of the LoRA's file.
        folder: the folder; made if missing.
        weights: the result of `adapter_weights`, or other weights of these names, for a denoiser
            that is spread over processes; None to read them from the denoiser.
    """
    from peft import get_peft_model_state_dict

    model: Any = getattr(pipe, record.denoiser)
    weights = adapter_weights(model) if weights is None else weights
    factors = get_peft_model_state_dict(model, dict(weights), adapter_name=ADAPTER)
    config = model.peft_config[ADAPTER]
    factors = _with_strength(factors, config)
    part = "unet" if record.denoiser == "unet" else "transformer"
    arguments: dict[str, Any] = {f"{part}_lora_layers": _compact(factors)}
    known = inspect.signature(type(pipe).save_lora_weights).parameters
    if f"{part}_lora_adapter_metadata" in known:
        # diffusers leaves the layers of a loaded LoRA in training mode: dropout would be active.
        changed = {"lora_dropout": 0.0, "lora_alpha": config.r, "use_rslora": False}
        metadata = config.to_dict() | changed
        # The order of a set differs from process to process.
        arguments[f"{part}_lora_adapter_metadata"] = {
            key: sorted(value) if isinstance(value, set | frozenset) else value
            for key, value in metadata.items()
        }
    folder.mkdir(parents=True, exist_ok=True)
    pipe.save_lora_weights(folder, weight_name=LORA_FILE, **arguments)
    _add_header(folder / LORA_FILE, record)
    own = {
        f"{name}.{key}": weights[f"{name}.{key}"]
        for name, module in _method_modules(model).items()
        for key in module.state_dict()
    }
    if own:
        save_file(_compact(own), folder / METHOD_FILE, metadata={"format": "pt"})


def read_record(path: Path) -> LoraRecord | None:
    """The record in the header of a LoRA's file.

    Args:
        path: the LoRA's file, the folder of the file, or the folder of the training.

    Returns:
        The record; None for a LoRA that diffattn did not train.

    Raises:
        LoraError: if the file cannot be read, or was written by another version of diffattn.
    """
    file = path / LORA_FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        file = place_of(path, SECOND_EXPERT) / LORA_FILE
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_HEADER)
    except (OSError, SafetensorError) as error:
        raise LoraError(f"cannot read LoRA {path}: {error}") from None
    if text is None:
        return None
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraError(
            f"LoRA {path} has a damaged header: its entry {_HEADER!r} is no JSON ({error}); write"
            f" the LoRA again, or remove the entry to use the LoRA as one from elsewhere"
        ) from None
    if not isinstance(entry, dict):
        raise LoraError(
            f"LoRA {path} has a damaged header: its entry {_HEADER!r} is {entry!r:.40}, but must be"
            f" an object; write the LoRA again"
        )
    missing = [
        item.name
        for item in fields(LoraRecord)
        if item.name not in entry and item.default is MISSING
    ]
    if missing:
        raise LoraError(
            f"LoRA {path} was written by another version of diffattn: its header lacks"
            f" {missing[0]!r}"
        )
    known = {item.name: entry[item.name] for item in fields(LoraRecord) if item.name in entry}
    record = LoraRecord(**known)
    method = record.method
    if not isinstance(method, dict) or not isinstance(method.get("type"), str):
        raise LoraError(
            f"LoRA {path} has a damaged header: its method is {method!r:.40}, but must be an object"
            f' with a "type"; write the LoRA again'
        )
    if not isinstance(record.denoiser, str):
        raise LoraError(
            f"LoRA {path} has a damaged header: its denoiser is {record.denoiser!r:.40}, but must"
            f" be the name of a component; write the LoRA again"
        )
    if not isinstance(record.family, str | None):
        raise LoraError(
            f"LoRA {path} has a damaged header: its family is {record.family!r:.40}, but must be"
            f" the name of a family; write the LoRA again"
        )
    return record


def check_finite(weights: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Raise LoraError, with the name of the file at `path`, if a weight is NaN or infinite."""
    broken = [
        name
        for name, weight in weights.items()
        # Not every dtype of 8 bits has a test of its own.
        if weight.is_floating_point() and not weight.float().isfinite().all()
    ]
    if broken:
        raise LoraError(
            f"{path} holds NaN or infinity in {len(broken)} of its {len(weights)} tensors, such as"
            f" {broken[0]}: the file is damaged or its training has diverged; take an earlier"
            f" checkpoint"
        )


def method_file(path: Path, record: LoraRecord) -> Path | None:
    """The file with the weights of a LoRA's method; None if there are none.

    Args:
        path: the LoRA's file, the folder of the file, or the folder of the training.
        record: the result of `read_record`.
    """
    folder = path if path.is_dir() else path.parent
    places = (folder, place_of(folder, record.denoiser))
    return next((file for place in places if (file := place / METHOD_FILE).is_file()), None)


def load_method_weights(pipe: DiffusionPipeline, path: Path, record: LoraRecord) -> int:
    """Load the method's own weights that were trained together with a LoRA.

    Args:
        pipe: the pipeline, with the method attached.
        path: the LoRA's file, the folder of the file, or the folder of the training.
        record: the result of `read_record`.

    Returns:
        The number of sites whose weights were loaded; 0 if there is nothing to load.

    Raises:
        LoraError: if the weights do not fit the attached method.
    """
    file = method_file(path, record)
    if file is None:
        return 0
    model = getattr(pipe, record.denoiser)
    modules = _method_modules(model)
    own = {
        f"{name}.{key}": weight.shape
        for name, module in modules.items()
        for key, weight in module.state_dict().items()
    }
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise LoraError(f"cannot read {file}: {error}") from None
    shapes = {name: weight.shape for name, weight in weights.items()}
    strange = dict(shapes.items() ^ own.items())
    if strange:
        raise LoraError(
            f"{file} does not fit the attached method: {len(strange)} weights differ in name or"
            f" shape, such as {min(strange)}; attach it with the parameters that the LoRA was"
            f" trained with: {dict(record.method)}"
        )
    check_finite(weights, file)
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict(
            {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
        )
    return len(modules)


def start_from(pipe: DiffusionPipeline, folder: Path, denoiser: str) -> None:
    """Load the method's own weights of another training into a denoiser, and none of its LoRA.

    Args:
        pipe: the pipeline, with the method attached.
        folder: the output folder of the other training.
        denoiser: the pipeline's component that has the method attached.

    Raises:
        LoraError: if the folder has no such weights, or they do not fit the attached method.
    """
    record = read_record(folder)
    file = None if record is None else method_file(folder, record)
    if record is None or file is None:
        raise LoraError(
            f"method_weights is {folder}, but must be the output folder of a finished training of a"
            f" method with weights of its own: it has no {METHOD_FILE} beside a {LORA_FILE}"
        )
    load_method_weights(pipe, file.parent, replace(record, denoiser=denoiser))


# Projections, and the layer that has them in blocks of one stream of Flux.2.
_IN_ONE_LAYER = {
    "to_q": "to_qkv_mlp_proj",
    "to_k": "to_qkv_mlp_proj",
    "to_v": "to_qkv_mlp_proj",
    "to_out.0": "to_out",
}


def _target_names(model: torch.nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The full names of the layers of all sites that `targets` names.

    In a site whose projections are one layer, that layer is named by each of them.

    Raises:
        LoraError: if a target is a linear layer of no site.
    """
    sites = site_names(model, family_of(model))
    found: list[str] = []
    for target in targets:
        names = (target, _IN_ONE_LAYER[target]) if target in _IN_ONE_LAYER else (target,)
        matches = [
            f"{site}.{name}"
            for site in sites
            for name in names
            if isinstance(_part(model.get_submodule(site), name), torch.nn.Linear)
        ]
        if not matches:
            known = [
                name
                for name, part in model.get_submodule(sites[0]).named_modules()
                if isinstance(part, torch.nn.Linear)
            ]
            raise LoraError(
                f"target {target!r} matches no layer of the {len(sites)} attention sites of"
                f" {type(model).__name__}: those of {sites[0]} are {', '.join(known)}"
            )
        found += matches
    return list(dict.fromkeys(found))


def _part(module: torch.nn.Module, name: str) -> torch.nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _method_modules(model: torch.nn.Module) -> dict[str, SiteWeights]:
    """The modules with the attached method's own weights, by name."""
    attached = attached_to(model)
    if attached is None:
        return {}
    found = {
        f"{name}.{site.weights}": site.module.get_submodule(site.weights)
        for name, site in attached.sites.items()
        if site.weights is not None
    }
    return {name: module for name, module in found.items() if isinstance(module, SiteWeights)}


def _compact(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}


def _with_strength(factors: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The factors of a LoRA with the factor of its config multiplied into each B."""
    strength = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return {
        name: factor * strength if ".lora_B." in name else factor
        for name, factor in factors.items()
    }


def _add_header(file: Path, record: LoraRecord) -> None:
    """Add a record to the metadata of a LoRA's file, and put the metadata in order.

    The safetensors library writes metadata in any order. In alphabetical order equal LoRAs are
    equal files.
    """
    data = file.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    start = struct.calcsize("<Q")
    header = json.loads(data[start : start + length])
    metadata = header.pop(_METADATA, {}) | {_HEADER: json.dumps(asdict(record), sort_keys=True)}
    ordered = {_METADATA: dict(sorted(metadata.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[start + length :])
