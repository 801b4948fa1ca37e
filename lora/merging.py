"""LoRAs merged into a model's weights, and several LoRAs joined to one.

Weights are read and written tensor by tensor: memory holds the LoRAs and one tensor of the model.
The merged files have the names, shards, shapes and dtypes of the model's own.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffattn.lora.adapter import (
    LORA_FILE,
    METHOD_FILE,
    LoraRecord,
    check_finite,
    place_of,
    read_record,
)
from diffattn.lora.convert import RECORD_ENTRY, SUFFIX, refuse_others, write_file
from diffattn.lora.errors import LoraError
from diffattn.lora.layer_names import DIFFUSERS, names_of
from diffattn.lora.loading import find_file
from diffattn.lora.lora_file import Contents, Pair, config_entry, read_contents, written
from diffattn.models import FAMILIES

_WEIGHTS = "diffusion_pytorch_model"
_CONFIG = "config.json"
_HEADER = struct.Struct("<Q")
_METADATA = "__metadata__"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Scaled:
    """A LoRA and the scale that it is to have.

    Attributes:
        path: the LoRA's file, or the folder of a training.
        scale: multiplies the LoRA's change.
    """

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class _Read:
    given: Scaled
    file: Path
    record: LoraRecord | None
    contents: Contents


def merge(
    base: Path,
    loras: Sequence[Scaled],
    output: Path,
    *,
    without_method_weights: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> int:
    """Write the weights of a pipeline's denoiser with LoRAs merged into them.

    Args:
        base: the folder of a pipeline.
        loras: the LoRAs, all for one component of the pipeline.
        output: the folder to write, as diffusers saves a model; must not exist.
        without_method_weights: merge LoRAs that have weights of their method beside them, which a
            model has no place for; otherwise refused.
        warn: takes a line for everything that the merged model lacks.

    Returns:
        The number of tensors that were changed.

    Raises:
        LoraError: if a LoRA does not fit the model, or a file cannot be read or written.
    """
    read = _read_all(loras, _family_in(base, loras))
    components = sorted({_component(one) for one in read})
    if len(components) > 1:
        raise LoraError(
            f"the LoRAs are for {' and '.join(components)}: merge those of each in a run of its own"
        )
    folder = base / components[0]
    if not folder.is_dir():
        raise LoraError(f"{base} has no {components[0]}, which the LoRA is for")
    for one in read:
        _refuse_method_weights(one, without_method_weights)
    files = _weight_files(folder)
    where = {name: file for file in files for name in _entries(file)}
    changes = _changes(read, where, folder)
    with _new_folder(output) as temporary:
        for extra in sorted(folder.glob("*.json")):
            shutil.copyfile(extra, temporary / extra.name)
        for file in files:
            _write_merged(file, temporary / file.name, changes)
    for one in read:
        if one.record is not None:
            own = one.file.parent / METHOD_FILE
            if own.is_file():
                warn(f"the weights of the method are left out; {own} holds them")
            warn(
                f"{one.given.path} was trained under {one.record.method['type']}, and is now in"
                f" every step: attach the method without dense steps, or use --lora instead"
            )
    return len(changes)


def join(
    loras: Sequence[Scaled], output: Path, *, without_method_weights: bool = False
) -> LoraRecord | None:
    """Write one LoRA that does what several do together: their ranks follow each other.

    Args:
        loras: the LoRAs, all for one component of one family, under one method or under none.
        output: the file to write, or the folder.
        without_method_weights: leave out the methods' own weights if several LoRAs have some, or
            the output is a file; otherwise refused.

    Returns:
        The record of the joined LoRA, with the sum of the steps; None for LoRAs from elsewhere.

    Raises:
        LoraError: if the LoRAs cannot be joined, or the file cannot be written.
    """
    records = [read_record(find_file(one.path)) for one in loras]
    family = next((record.family for record in records if record and record.family), None)
    read = _read_all(loras, family)
    for name, values in (
        ("components", {_component(one) for one in read}),
        ("families", {one.contents.family for one in read}),
        ("methods", {_method(one.record) for one in read}),
    ):
        if len(values) > 1:
            listed = " and ".join(sorted(str(value or "none") for value in values))
            if name == "methods":
                listed = " and ".join(
                    str(one.record.method["type"] if one.record else "none") for one in read
                )
            raise LoraError(
                f"the LoRAs have several {name}, {listed}: load them beside each other instead, by"
                f" diffattn generate --lora A --lora B"
            )
    first = read[0]
    with_weights = [file for one in read if (file := one.file.parent / METHOD_FILE).is_file()]
    to_file = output.suffix == SUFFIX
    place = output if to_file else place_of(output, _component(first)) / LORA_FILE
    if with_weights and (to_file or len(with_weights) > 1) and not without_method_weights:
        reason = f"{output.name} is a file" if to_file else f"{len(with_weights)} LoRAs have some"
        raise LoraError(
            f"weights of the method cannot be joined, since {reason}: --without-method-weights"
            f" leaves them out"
        )
    beside = None if to_file or without_method_weights else next(iter(with_weights), None)
    pairs = joined([(one.contents.pairs, one.given.scale) for one in read])
    record = _joined_record(read, pairs)
    metadata = {} if record is None else {RECORD_ENTRY: json.dumps(asdict(record), sort_keys=True)}
    denoiser = first.contents.denoiser
    tensors = written(pairs, DIFFUSERS, None, denoiser)
    write_file(place, tensors, metadata | config_entry(pairs, denoiser), beside=beside)
    return record


def joined(loras: Sequence[tuple[Mapping[str, Pair], float]]) -> dict[str, Pair]:
    """The pairs of one LoRA whose change is the sum of several, each with a scale."""
    layers = dict.fromkeys(layer for pairs, _ in loras for layer in pairs)
    found = {}
    for layer in layers:
        own = [(pairs[layer], scale) for pairs, scale in loras if layer in pairs]
        shapes = {(pair.down.shape[1:], pair.up.shape[0]) for pair, _ in own}
        if len(shapes) > 1:
            raise LoraError(f"the LoRAs are for models of different widths: {layer} differs")
        ups = [
            (pair.up.double() * (pair.strength * scale)).to(_widest(pair.up for pair, _ in own))
            for pair, scale in own
        ]
        downs = [pair.down.to(_widest(pair.down for pair, _ in own)) for pair, _ in own]
        down = torch.cat(downs)
        found[layer] = Pair(down, torch.cat(ups, dim=1), float(down.shape[0]))
    return found


def _widest(tensors: Iterator[torch.Tensor] | Any) -> torch.dtype:
    widest = None
    for tensor in tensors:
        widest = tensor.dtype if widest is None else torch.promote_types(widest, tensor.dtype)
    assert widest is not None
    return widest


def _joined_record(read: Sequence[_Read], pairs: Mapping[str, Pair]) -> LoraRecord | None:
    records = [one.record for one in read if one.record is not None]
    if not records:
        return None
    rank = max(pair.rank for pair in pairs.values())
    settings = dict(records[0].settings) | {"rank": rank, "alpha": float(rank)}
    counts = [record.clips for record in records if record.clips is not None]
    return replace(
        records[0],
        steps=sum(record.steps for record in records),
        settings=settings,
        clips=sum(counts) if len(counts) == len(records) else None,
    )


def _method(record: LoraRecord | None) -> str | None:
    return None if record is None else json.dumps(dict(record.method), sort_keys=True)


def _component(one: _Read) -> str:
    return one.record.denoiser if one.record is not None else one.contents.denoiser


def _family_in(base: Path, loras: Sequence[Scaled]) -> str | None:
    """The family of the component that the first LoRA is for; None if diffattn does not know it."""
    record = read_record(find_file(loras[0].path))
    names = [record.denoiser] if record is not None else ["transformer", "unet"]
    for name in names:
        config = base / name / _CONFIG
        if config.is_file():
            try:
                kind = json.loads(config.read_text("utf-8")).get("_class_name")
            except (ValueError, AttributeError):
                raise LoraError(f"{config} is damaged: it is no JSON object") from None
            return next((f.name for f in FAMILIES if kind in f.model_classes), None)
    raise LoraError(f"{base} is no folder of a pipeline with a {' or '.join(names)}")


def _read_all(loras: Sequence[Scaled], family: str | None) -> list[_Read]:
    read = []
    for given in loras:
        file = find_file(given.path)
        known = family if family is not None and names_of(family) else None
        contents = read_contents(file, known)
        refuse_others(contents)
        for side in ("down", "up"):
            check_finite(
                {layer: getattr(pair, side) for layer, pair in contents.pairs.items()}, given.path
            )
        read.append(_Read(given, file, read_record(file), contents))
    return read


def _refuse_method_weights(one: _Read, without_method_weights: bool) -> None:
    file = one.file.parent / METHOD_FILE
    if one.record is not None and file.is_file() and not without_method_weights:
        raise LoraError(
            f"LoRA {one.given.path} has weights of its method beside it, {METHOD_FILE}, for which a"
            f" merged model has no place: --without-method-weights leaves them out"
        )


def _weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: the shards of its index, or the only file.

    Raises:
        LoraError: if there are none, or several variants.
    """
    index = folder / f"{_WEIGHTS}{SUFFIX}.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LoraError(f"{index} is damaged: it has no weight_map") from None
        files = [folder / name for name in sorted(set(names))]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise LoraError(f"{folder} lacks {missing[0].name}, which its index names")
        return files
    single = folder / f"{_WEIGHTS}{SUFFIX}"
    if single.is_file():
        return [single]
    others = sorted(folder.glob(f"{_WEIGHTS}*{SUFFIX}"))
    if len(others) == 1:
        return others
    raise LoraError(
        f"{folder} holds {len(others)} files called {_WEIGHTS}.*{SUFFIX}, of which none is the one"
        f" to merge into: save the model again with diffusers, without a variant"
    )


def _entries(file: Path) -> dict[str, Any]:
    """The header of a .safetensors file: dtype, shape and offsets of each tensor by name."""
    try:
        with file.open("rb") as opened:
            (length,) = _HEADER.unpack(opened.read(_HEADER.size))
            header = json.loads(opened.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise LoraError(f"cannot read {file}: {error}") from None
    return {name: entry for name, entry in header.items() if name != _METADATA}


def _changes(
    read: Sequence[_Read], where: Mapping[str, Path], folder: Path
) -> dict[str, list[tuple[Pair, float]]]:
    """The pairs and scales by the weight that they change."""
    entries = {
        name: entry for file in set(where.values()) for name, entry in _entries(file).items()
    }
    changes: dict[str, list[tuple[Pair, float]]] = {}
    for one in read:
        for layer, pair in one.contents.pairs.items():
            name = f"{layer}.weight"
            if name not in entries:
                raise LoraError(
                    f"LoRA {one.given.path} does not fit {folder}: it has no weight {name}"
                )
            shape, dtype = list(entries[name]["shape"]), entries[name]["dtype"]
            own = [pair.up.shape[0], *pair.down.shape[1:]]
            if shape != own:
                raise LoraError(
                    f"LoRA {one.given.path} does not fit {folder}: {name} is of shape {shape}, the"
                    f" LoRA is for {own}"
                )
            if dtype not in _DTYPES:
                raise LoraError(
                    f"{name} of {folder} is of dtype {dtype}, into which nothing is merged: take a"
                    f" model of {', '.join(_DTYPES)}"
                )
            changes.setdefault(name, []).append((pair, one.given.scale))
    return changes


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `output` when the block ends well."""
    if output.exists():
        raise LoraError(f"{output} exists: give another name, or remove it first")
    temporary = output.parent / f".{output.name}.diffattn.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoraError(f"cannot write {output}: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_merged(
    source: Path, target: Path, changes: Mapping[str, list[tuple[Pair, float]]]
) -> None:
    """Copy a .safetensors file with changed weights; header and places stay the same."""
    entries = _entries(source)
    ordered = sorted(entries, key=lambda name: entries[name]["data_offsets"][0])
    with (
        source.open("rb") as raw,
        safe_open(source, framework="pt") as tensors,
        target.open("wb") as out,
    ):
        head = raw.read(_HEADER.size)
        (length,) = _HEADER.unpack(head)
        out.write(head + raw.read(length))
        for name in ordered:
            weight = tensors.get_tensor(name)
            if name in changes:
                weight = merged_weight(weight, changes[name])
                check_finite({name: weight}, source)
            out.write(weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        out.flush()
        os.fsync(out.fileno())
    if target.stat().st_size != source.stat().st_size:
        raise OSError(f"{target.name} has another size than {source.name}")
    with safe_open(target, framework="pt") as opened:
        if set(opened.keys()) != set(entries):
            raise OSError(f"{target.name} reads back with other tensors")


def merged_weight(weight: torch.Tensor, changes: Sequence[tuple[Pair, float]]) -> torch.Tensor:
    """A layer's weight with the changes of LoRAs, summed in float32 or more and rounded once.

    Args:
        weight: (outputs, inputs), or (outputs, inputs, height, width).
        changes: the pairs for the layer, each with its scale.
    """
    wide = torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32
    total = weight.to(wide)
    for pair, scale in changes:
        up, down = pair.up.flatten(1).to(wide), pair.down.flatten(1).to(wide)
        total = total + (pair.strength * scale) * (up @ down).view(weight.shape)
    return total.to(weight.dtype)
