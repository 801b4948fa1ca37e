"""Load a LoRA into a pipeline, after a check of its file and of the model's place for each layer.

Only .safetensors files are read: a pickled file can run code when it is read.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffattn.attach.attachment import set_attn_processor
from diffattn.attach.denoiser import attached_to
from diffattn.lora.adapter import (
    LORA_FILE,
    METHOD_FILE,
    SECOND_EXPERT,
    LoraRecord,
    check_finite,
    load_method_weights,
    method_file,
    place_of,
    read_record,
)
from diffattn.lora.errors import LoraError
from diffattn.lora.layer_names import DIFFUSERS
from diffattn.lora.lora_file import CONFIG_ENTRY, parse, read_tensors, written
from diffattn.lora.presence import keep_everywhere, keep_under_method
from diffattn.methods import from_dict
from diffattn.models import denoisers, family_of

_SUFFIX = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_FACTOR = re.compile(r"(?P<part>\w+)\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
# The names of the two factors of a layer, in the layouts of diffusers, kohya and older diffusers.
_HALVES = ((".lora_A.", ".lora_B."), (".lora_down.", ".lora_up."), (".lora.down.", ".lora.up."))


@dataclass(frozen=True)
class Lora:
    """A LoRA to load.

    Attributes:
        path: the LoRA's file, the folder of the file, or the folder of the training.
        scale: multiplies the LoRA's change.
        denoiser: the pipeline's component to load a LoRA from elsewhere into; None for all. A LoRA
            of `diffattn lora train` says it by itself.
    """

    path: str | Path
    scale: float = 1.0
    denoiser: str | None = None


def load_lora(
    pipe: Any, path: str | Path, *, scale: float = 1.0, everywhere: bool = False
) -> LoraRecord | None:
    """Load a LoRA into a pipeline, with the method that it was trained under.

    If nothing is attached to the pipeline, the method is attached, with the parameters of the
    training. An attached method stays; the method's own weights are loaded into it.

    A LoRA of `diffattn lora train` is on where the pipeline attends by the type of method that the
    LoRA was trained under. It is off in the steps that stay dense, under another method, and after
    `pipe.set_attn_processor(None)`: there the pipeline is the one without the LoRA, bit for bit. A
    LoRA from elsewhere is on everywhere, and nothing is attached. LoRAs in the pipeline stay.

    Args:
        pipe: the pipeline.
        path: the LoRA's file, the folder of the file, or the folder of the training.
        scale: multiplies the LoRA's change.
        everywhere: keep the LoRA on in every call.

    Returns:
        The record of the training; None for a LoRA that diffattn did not train.

    Raises:
        LoraError: if there is no LoRA at `path`, the file is pickled or damaged, the LoRA does not
            fit the pipeline, or its method cannot be attached.
    """
    return load_loras(pipe, [Lora(path, scale)], everywhere=everywhere)[0]


def load_loras(
    pipe: Any, loras: Sequence[Lora], *, everywhere: bool = False
) -> list[LoraRecord | None]:
    """Load several LoRAs beside each other, such as one for each expert, see `load_lora`.

    Args:
        pipe: the pipeline.
        loras: the LoRAs, each with a scale.
        everywhere: keep the LoRAs on in every call.

    Returns:
        The record of each training, in order; None for a LoRA that diffattn did not train.

    Raises:
        LoraError: as `load_lora`; also if nothing is attached and the LoRAs were trained under
            several methods, or two have weights of the method for one denoiser.
    """
    records = [read_record(find_file(_path(lora))) for lora in loras]
    open_ = all(attached_to(model) is None for model in denoisers(pipe).values())
    method = one_method(loras, records) if open_ else None
    check_method_weights(loras, records)
    for lora, record in zip(loras, records, strict=True):
        load_factors(
            pipe,
            _path(lora),
            record,
            everywhere=everywhere,
            scale=lora.scale,
            denoiser=lora.denoiser,
        )
    try:
        if method is not None:
            set_attn_processor(pipe, from_dict(method))
    except (ValueError, TypeError) as error:
        raise LoraError(error) from None
    for lora, record in zip(loras, records, strict=True):
        if record is None:
            continue
        if _attends_by(getattr(pipe, record.denoiser), record.method["type"]):
            load_method_weights(pipe, _path(lora), record)
    return records


def one_method(
    loras: Sequence[Lora], records: Sequence[LoraRecord | None]
) -> Mapping[str, Any] | None:
    """The method that all LoRAs of diffattn were trained under; None if there are none.

    Raises:
        LoraError: if the LoRAs were trained under several methods, or under several parameters.
    """
    trained = [(lora, record) for lora, record in zip(loras, records, strict=True) if record]
    if not trained:
        return None
    first, leading = trained[0]
    for lora, record in trained[1:]:
        one, other = dict(leading.method), dict(record.method)
        if one == other:
            continue
        if one["type"] != other["type"]:
            apart = f"under {one['type']} and under {other['type']}"
        else:
            name = min(k for k in one | other if one.get(k) != other.get(k))
            apart = f"with {name}={one.get(name)} and {name}={other.get(name)}"
        raise LoraError(
            f"LoRAs {first.path} and {lora.path} were trained {apart}, and a run has one method:"
            f" choose it by --attn (in Python, attach it before); LoRAs of another method are off"
        )
    return leading.method


def check_method_weights(loras: Sequence[Lora], records: Sequence[LoraRecord | None]) -> None:
    """Raise LoraError if two LoRAs for one denoiser both have weights of their method."""
    owners: dict[str, Lora] = {}
    for lora, record in zip(loras, records, strict=True):
        if record is None or method_file(_path(lora), record) is None:
            continue
        if record.denoiser in owners:
            raise LoraError(
                f"LoRAs {owners[record.denoiser].path} and {lora.path} both have weights of their"
                f" method for the {record.denoiser}, which takes one: leave one of them out"
            )
        owners[record.denoiser] = lora


def _path(lora: Lora) -> Path:
    return Path(lora.path).expanduser()


def find_file(path: Path) -> Path:
    """The file of the LoRA at `path`, a file or a folder.

    Raises:
        LoraError: if there is none, there are several to choose from, or the file is no
            .safetensors file.
    """
    if path.is_dir():
        return _file_in(path)
    if not path.exists():
        raise LoraError(f"there is no LoRA at {path}")
    if path.suffix.lower() in _PICKLED:
        raise LoraError(
            f"LoRA {path} is a pickled file ({path.suffix}), which can run code when it is read:"
            f" only {_SUFFIX} files are read; ask its author for one"
        )
    if path.suffix != _SUFFIX:
        raise LoraError(
            f"LoRA {path} is no {_SUFFIX} file: its name ends in {path.suffix or 'nothing'!r}"
        )
    return path


def _file_in(folder: Path) -> Path:
    both = [place / LORA_FILE for place in (folder, place_of(folder, SECOND_EXPERT))]
    trained = [file for file in both if file.is_file()]
    if len(trained) == 1:
        return trained[0]
    if trained:
        raise LoraError(
            f"folder {folder} holds the LoRAs of two experts: name one, {both[0]} or {both[1]}"
        )
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != METHOD_FILE)
    found = [file for file in files if file.suffix == _SUFFIX]
    if len(found) == 1:
        return found[0]
    if found:
        raise LoraError(
            f"folder {folder} holds {len(found)} {_SUFFIX} files, none of them called {LORA_FILE}:"
            f" name the file of the LoRA, such as {found[0]}"
        )
    pickled = [file for file in files if file.suffix.lower() in _PICKLED]
    if pickled:
        return find_file(pickled[0])
    raise LoraError(f"cannot read LoRA {folder}: the folder holds no {_SUFFIX} file")


def load_factors(
    pipe: Any,
    path: Path,
    record: LoraRecord | None,
    *,
    everywhere: bool = False,
    scale: float = 1.0,
    denoiser: str | None = None,
) -> None:
    """Load a LoRA into the denoiser of its record; without a record, into all denoisers.

    Where nothing fits, diffusers only warns, and would render a video without the LoRA.

    Args:
        pipe: the pipeline.
        path: the LoRA's file, or the folder of the file.
        record: the result of `read_record`.
        everywhere: keep the LoRA on in calls that it was not trained for, see `load_lora`.
        scale: multiplies the LoRA's change.
        denoiser: the only denoiser to load a LoRA without a record into.

    Raises:
        LoraError: if the file is refused, or the LoRA does not fit the model.
    """
    file = find_file(path)
    if not hasattr(pipe, "load_lora_weights"):
        raise LoraError(f"{type(pipe).__name__} takes no LoRA")
    models = denoisers(pipe)
    if record is not None and denoiser not in (None, record.denoiser):
        raise LoraError(
            f"LoRA {path} was trained for the {record.denoiser}, not for the {denoiser}: give it to"
            f" the other expert, or to none by name"
        )
    parts = list(models) if denoiser is None else [denoiser]
    factors, given = _read_factors(pipe, file, path, next(iter(models.values())))
    for name in parts if record is None else [record.denoiser]:
        if getattr(pipe, name, None) is None:
            raise LoraError(f"LoRA {path} is for the {name}, which {type(pipe).__name__} lacks")
        model = getattr(pipe, name)
        _check_fit(model, name, factors, path)
        adapter = _new_name(model, "lora" if record is None else record.method["type"])
        before = _active(model)
        # Only pipelines with two experts know this argument.
        extra = {"load_into_transformer_2": True} if name == SECOND_EXPERT else {}
        try:
            with warnings.catch_warnings():
                # Several adapters are meant here.
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                pipe.load_lora_weights(given, adapter_name=adapter, use_safetensors=True, **extra)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise LoraError(f"LoRA {path} does not fit the model: {error}") from None
        _switch_on(model, adapter, scale, before)
        if record is None or everywhere:
            keep_everywhere(model, adapter)
        else:
            keep_under_method(model, adapter, record.method["type"])


def _read_factors(
    pipe: Any, file: Path, path: Path, model: torch.nn.Module
) -> tuple[Mapping[str, torch.Tensor], Path | dict[str, torch.Tensor]]:
    """Read the tensors of a LoRA's file.

    Layouts that diffusers does not read for the pipeline, such as musubi's of HunyuanVideo, are
    read by `lora_file`.

    Returns:
        The tensors, under the names that diffusers gives them, and what diffusers is to load: the
        file, or these tensors.

    Raises:
        LoraError: if the file cannot be read, lacks one of two factors, holds NaN, or is in no
            layout that is known for this pipeline.
    """
    stored, metadata = read_tensors(file)
    _check_config(metadata.get(CONFIG_ENTRY), path)
    if not stored:
        raise LoraError(f"LoRA {path} is empty: it holds no tensors")
    _check_halves(stored, path)
    check_finite(stored, f"LoRA {path}")
    try:
        converted = pipe.lora_state_dict(file, use_safetensors=True)
    except Exception as error:
        # The conversions of diffusers raise errors of every kind for layouts that they do not know.
        own = _read_as_original(file, stored, metadata, model)
        if own is None:
            raise LoraError(
                f"LoRA {path} is not for {type(model).__name__}: diffusers cannot place its"
                f" tensors, such as {next(iter(stored))} ({type(error).__name__}: {error})"
            ) from None
        return own, own
    # Some pipelines return the alphas as well.
    factors = converted[0] if isinstance(converted, tuple) else converted
    if not any(_FACTOR.fullmatch(name) for name in factors):
        own = _read_as_original(file, stored, metadata, model)
        if own is not None:
            return own, own
    return factors, file


def _read_as_original(
    file: Path,
    stored: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    model: torch.nn.Module,
) -> dict[str, torch.Tensor] | None:
    """The tensors of a file of another program, by diffusers' names; None if they are not known."""
    try:
        contents = parse(file, stored, metadata, family_of(model).name)
    except LoraError:
        return None
    if contents.layout == DIFFUSERS or contents.unknown or contents.others or contents.magnitudes:
        return None
    return written(contents.pairs, DIFFUSERS, None, contents.denoiser)


def _check_config(text: str | None, path: Path) -> None:
    """Raise LoraError if the header's config of the LoRA, which diffusers reads, is damaged."""
    try:
        is_config = text is None or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_config = False
    if not is_config:
        raise LoraError(
            f"LoRA {path} has a damaged header: its entry {CONFIG_ENTRY!r} is no JSON object; write"
            f" the LoRA again"
        )


def _check_halves(stored: Mapping[str, torch.Tensor], path: Path) -> None:
    lacking = [
        (name, name.replace(one, other))
        for halves in _HALVES
        for one, other in (halves, halves[::-1])
        for name in stored
        if one in name and name.endswith(".weight") and name.replace(one, other) not in stored
    ]
    if lacking:
        name, counterpart = lacking[0]
        raise LoraError(
            f"LoRA {path} is half a LoRA: {len(lacking)} of its {len(stored)} tensors have no"
            f" counterpart, such as {name}, which needs {counterpart}; get the whole file"
        )


def _check_fit(
    model: torch.nn.Module, part: str, factors: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Raise LoraError unless the model has a layer of the right size for each factor."""
    layers = dict(model.named_modules())
    prefix = "unet" if part == "unet" else "transformer"
    found = [match for key in factors if (match := _FACTOR.fullmatch(key))]
    matches = [match for match in found if match["part"] == prefix]
    if not matches:
        if part == "unet":  # U-Nets take factors by older names, too
            return
        raise LoraError(
            f"LoRA {path} does not fit: none of its {len(factors)} tensors is for the transformer"
        )
    unknown = sorted({match["layer"] for match in matches} - set(layers))
    if unknown:
        raise LoraError(
            f"LoRA {path} does not fit {type(model).__name__}: it has no layer {unknown[0]}"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
        )
    for match in matches:
        layer = layers[match["layer"]]
        attribute, axis = ("in_features", 1) if match["side"] == "A" else ("out_features", 0)
        wanted = getattr(layer, attribute, None)
        shape = tuple(factors[match.string].shape)
        if wanted is not None and (len(shape) != 2 or shape[axis] != wanted):
            size = shape[axis] if len(shape) == 2 else shape
            raise LoraError(
                f"LoRA {path} does not fit {type(model).__name__}: {match['layer']} has "
                f"{attribute} {wanted}, the LoRA is for {size}"
            )
        other = factors.get(match.string.replace(".lora_A.", ".lora_B."))
        if match["side"] == "A" and other is not None and shape[0] != other.shape[1]:
            raise LoraError(
                f"LoRA {path} is damaged: the factors of {match['layer']} are of rank {shape[0]}"
                f" and {other.shape[1]}, but must be of one rank"
            )


def _active(model: torch.nn.Module) -> dict[str, list[str]]:
    """The adapters that are on in each adapted layer, by the layer's name."""
    layers: dict[str, Any] = dict(model.named_modules())
    return {
        name: list(layer.active_adapters)
        for name, layer in layers.items()
        if hasattr(layer, "lora_A")
    }


def _switch_on(
    model: torch.nn.Module, adapter: str, scale: float, before: Mapping[str, list[str]]
) -> None:
    """Have a new adapter on beside those that were on before, which peft has switched off."""
    layers: dict[str, Any] = dict(model.named_modules())
    for name, layer in layers.items():
        if not hasattr(layer, "lora_A"):
            continue
        new = adapter in layer.lora_A
        layer.set_adapter([*before.get(name, ()), *([adapter] if new else ())])
        if new:
            layer.set_scale(adapter, scale)


def _new_name(model: Any, kind: str) -> str:
    """A name for an adapter that the model does not have yet."""
    # A dot would be a path of modules.
    stem = f"diffattn_{kind.replace('.', '_')}"
    taken = getattr(model, "peft_config", None) or {}
    names = (stem, *(f"{stem}_{number}" for number in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)


def _attends_by(model: torch.nn.Module, method: str) -> bool:
    attached = attached_to(model)
    return attached is not None and any(group.chosen.type == method for group in attached.groups)
