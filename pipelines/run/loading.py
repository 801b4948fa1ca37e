"""Find a model, and load its stock diffusers pipeline on the requested device."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffattn._checks import did_you_mean

from ..errors import UserError, one_line
from .request import BUNDLED_MODEL, TEXT, Request, check_option

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from diffattn.lora.adapter import LoraRecord

# An optional file beside model_index.json: arguments of the pipeline's call, and `fps`.
DEFAULTS_FILE = "generation.json"

_INDEX_FILE = "model_index.json"
# diffusers names the last of the files that it has looked for, which is a pickled one.
_NO_WEIGHTS = re.compile(
    r"no file named (\S+?)\.(?:bin|safetensors),? .*?in directory (\S+?)\.?(?: |$)"
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline that is ready to be called.

    Attributes:
        pipe: the pipeline, with its LoRA if the request has one.
        defaults: the model's recommendations, by the names of the pipeline's arguments, and `fps`.
        dtype: of all parts but the VAE.
        device: of the computation.
        record: how the LoRA in the pipeline was trained; None without a LoRA, and for a LoRA that
            was not trained by `diffattn lora train`.
    """

    pipe: DiffusionPipeline
    defaults: Mapping[str, Any]
    dtype: str
    device: str
    record: LoraRecord | None = None


def choose_device(name: str | None) -> torch.device:
    """The named device; without a name the accelerator, or the CPU where there is none.

    Raises:
        UserError: if torch sees no such device.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is no device; try cpu, cuda or cuda:1") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if accelerator is None or accelerator.type != device.type:
        there = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise UserError(f"--device {name}: torch sees no such device here (there is: {there})")
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise UserError(f"--device {name}: there are {count} {device.type} devices, from 0")
    return device


def find_model(model: str) -> Path | str:
    """The folder of a bundled or local pipeline, or the hub id of a pipeline that can be loaded.

    The check reads `model_index.json` alone, before large weights are downloaded or read.

    Raises:
        UserError: if there is no such model, or the model is of no known family.
    """
    check_option("model", model, TEXT)
    if model == BUNDLED_MODEL:
        from diffattn.samples.moving_shapes import MODEL_DIR

        if not MODEL_DIR.is_dir():
            raise UserError(f"this installation lacks the bundled model, {MODEL_DIR}")
        return _check_folder(MODEL_DIR, model)
    path = Path(model).expanduser()
    if path.exists():
        return _check_folder(path, model)
    if _HUB_ID.fullmatch(model) and not model.startswith("."):
        _check_hub(model)
        return model
    hint = did_you_mean(model, [BUNDLED_MODEL])
    raise UserError(f"there is no model folder {model}{hint}")


def model_index(model: str) -> dict[str, Any]:
    """The `model_index.json` of a bundled or local pipeline, or of a hub id.

    Raises:
        UserError: as `find_model`.
    """
    source = find_model(model)
    if isinstance(source, Path):
        return _read_json(source / _INDEX_FILE, model)
    from huggingface_hub import hf_hub_download

    # `find_model` has put the file into the cache.
    return _read_json(Path(hf_hub_download(source, _INDEX_FILE)), model)


def load_model(
    request: Request,
    record: LoraRecord | None = None,
    *,
    placed: bool = True,
    base_dtype: str | None = None,
) -> LoadedModel:
    """Load the pipeline of a request, its LoRA included, on its device.

    Args:
        request: a run of the model.
        record: how the LoRA of the request was trained, if that is known.
        placed: whether the pipeline goes to the device, or stays in main memory.
        base_dtype: how the denoisers' weights are stored, see `diffattn.lora.frozen`; None for the
            dtype of the request.

    Raises:
        UserError: if the device, the model or the LoRA is refused.
    """
    import torch

    from .processes import own_device
    from .trained_lora import load_lora

    device = own_device(choose_device(request.device), request)
    if device.type == "cpu" and request.offload != "none":
        raise UserError(f"--offload {request.offload} needs an accelerator, but the device is cpu")
    source = find_model(request.model)
    dtype = request.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    pipe = _from_pretrained(source, request, getattr(torch, dtype), base_dtype)
    if request.lora is not None:
        load_lora(pipe, request.lora, record, everywhere=request.lora_everywhere)
    if placed:
        _place(pipe, device, request.offload)
    defaults = read_defaults(request.model, source)
    return LoadedModel(pipe, defaults, dtype, str(device), record)


def _check_folder(path: Path, shown: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{shown} is a file; --model takes a pipeline's folder")
    index = path / _INDEX_FILE
    if not index.is_file():
        part = (path / "config.json").is_file()
        what = "holds a single model" if part else "is not a diffusers pipeline"
        raise UserError(f"{shown} {what}: there is no {_INDEX_FILE} in it")
    _check_index(index, shown)
    return path


def _check_hub(model: str) -> None:
    """Ask the hub for the index once, with a short wait: the client's own retries take long."""
    from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    unknown = f"{model} is neither a folder here nor in the local cache of the Hugging Face hub"
    try:
        index = try_to_load_from_cache(model, _INDEX_FILE)
        if not isinstance(index, str):
            model_info(model, timeout=10)
            index = hf_hub_download(model, _INDEX_FILE)
    except OfflineModeIsEnabled:
        raise UserError(f"{unknown}, and HF_HUB_OFFLINE is set") from None
    except GatedRepoError:
        raise UserError(
            f"{model} is gated: accept its terms at https://huggingface.co/{model} and log in "
            "with `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{unknown}, and the hub has no such model") from None
    except EntryNotFoundError:
        raise UserError(f"{model} is not a diffusers pipeline: it has no {_INDEX_FILE}") from None
    except Exception as error:
        # The hub's client changed its HTTP library once, and with the library its errors.
        raise UserError(f"{unknown}, and the hub cannot be reached: {error}") from None
    _check_index(Path(index), model)


def _check_index(index: Path, shown: str) -> None:
    """Refuse a pipeline without a model of a known family."""
    from diffattn.models import FAMILIES

    entries = _read_json(index, shown)
    classes = [
        entry[1]
        for entry in entries.values()
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
    ]
    known = {name for family in FAMILIES for name in family.model_classes}
    if not known.intersection(classes):
        pipeline = entries.get("_class_name", "an unknown pipeline")
        titles = ", ".join(family.title for family in FAMILIES)
        raise UserError(f"{shown} ({pipeline}) is of no known model family; there are: {titles}")


def read_defaults(model: str, source: Path | str) -> dict[str, Any]:
    """The recommendations of a model that `find_model` found, see `LoadedModel.defaults`."""
    if isinstance(source, Path) and (source / DEFAULTS_FILE).is_file():
        return _read_json(source / DEFAULTS_FILE, model)
    return {}


def _read_json(path: Path, shown: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{shown}: cannot read {path.name}: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{shown}: {path.name} holds no JSON object")
    return data


def _from_pretrained(
    source: Path | str, request: Request, dtype: torch.dtype, base_dtype: str | None = None
) -> DiffusionPipeline:
    import torch

    from .pipeline_class import makes_pictures, pipeline_class

    shown = request.model
    cls: Any = pipeline_class(model_index(shown), request)
    # Wan's VAE is published in float32, and decodes visibly worse in less. The VAEs of other video
    # models are loaded in float32 too, since decoding is a small part of a run. The pipelines of
    # other models do not convert pictures and latents for a VAE of a more precise type.
    starts_from_pixels = request.image or request.input is not None
    apart = "Wan" in cls.__name__ or not (makes_pictures(cls) or starts_from_pixels)
    dtypes = {"default": dtype, "vae": torch.float32 if apart else dtype}
    try:
        # Newer releases call the argument dtype; all supported releases take the old name.
        if base_dtype is None:
            return cls.from_pretrained(source, torch_dtype=dtypes)
        return _stored(cls, source, dtypes, base_dtype)
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"cannot load {shown}: its configuration does not fit diffusers' classes"
            f" ({type(error).__name__}: {one_line(error)})"
        ) from None
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        missing = _NO_WEIGHTS.search(one_line(error))
        if missing is not None:
            raise UserError(
                f"cannot load {shown}: there is no {missing[1]}.safetensors in {missing[2]}"
            ) from None
        raise UserError(f"cannot load {shown}: {one_line(error)}") from None


def _stored(
    cls: Any, source: Path | str, dtypes: Mapping[str, torch.dtype], base_dtype: str
) -> DiffusionPipeline:
    """Load a pipeline whose denoisers have the weights of their blocks in few bytes."""
    import diffusers

    from diffattn.lora.frozen import quantisation, store_in_fp8
    from diffattn.models import FAMILIES, denoisers

    known = {name for family in FAMILIES for name in family.model_classes}
    entries = {
        name: entry[1]
        for name, entry in model_index(str(source)).items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] in known
    }
    dtype = dtypes["default"]
    classes = {name: getattr(diffusers, entry) for name, entry in entries.items()}
    config = quantisation(classes, source, base_dtype, dtype)
    given = {} if config is None else {"quantization_config": config}
    pipe: DiffusionPipeline = cls.from_pretrained(source, torch_dtype=dtypes, **given)
    if base_dtype == "fp8":
        for model in denoisers(pipe).values():
            store_in_fp8(model, dtype)
    return pipe


def _place(pipe: DiffusionPipeline, device: torch.device, offload: str) -> None:
    import torch

    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )
    else:
        pipe.to(device)
