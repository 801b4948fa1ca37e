"""Write a LoRA in another layout: those of diffusers, ComfyUI, kohya, musubi and DiffSynth.

The numbers of the factors stay as they are, bit for bit, wherever alpha is the rank, as diffattn
and diffusers write LoRAs. A strength of another LoRA stays in `alpha` where the layout has alphas,
and is multiplied into the upper factor where it has none. diffattn's record goes along in the
header.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffattn._checks import did_you_mean
from diffattn.lora.adapter import (
    LORA_FILE,
    METHOD_FILE,
    LoraRecord,
    check_finite,
    place_of,
    read_record,
)
from diffattn.lora.errors import LoraError
from diffattn.lora.layer_names import DIFFUSERS, FAMILY_NAMES, LAYOUTS, FamilyNames, names_of
from diffattn.lora.loading import find_file
from diffattn.lora.lora_file import Contents, config_entry, read_contents, written

SUFFIX = ".safetensors"
RECORD_ENTRY = "diffattn"
# Entries of the header that hold in every layout.
_KEPT = (RECORD_ENTRY, "modelspec.architecture", "modelspec.title", "ss_base_model_version")


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    family: str | None = None,
    denoiser_only: bool = False,
    without_method_weights: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write a LoRA in another layout.

    Args:
        source: the LoRA's file of any layout, or the folder of a training.
        target: the file to write. For diffusers' layout also a folder, which gets the method's own
            weights, too.
        to: the layout, one of `LAYOUTS`.
        family: the family of the LoRA's model, where neither header nor names tell.
        denoiser_only: leave out text encoders; otherwise a LoRA with any is refused.
        without_method_weights: leave out the method's own weights, which other layouts have no
            place for; otherwise a LoRA with any is refused.
        warn: takes a line for everything that is left out.

    Returns:
        The file.

    Raises:
        LoraError: if the LoRA cannot be read, or cannot be written in the layout.
    """
    if to not in LAYOUTS:
        raise LoraError(f"layout {to!r} is unknown{did_you_mean(to, LAYOUTS, or_list=True)}")
    path, place = Path(source).expanduser(), Path(target).expanduser()
    file = find_file(path)
    record = read_record(file)
    file_of = _target(place, to, record)
    recorded = record.family if record is not None else None
    contents = read_contents(file, _checked(family) or recorded)
    names = _names(contents, to)
    refuse_others(contents, denoiser_only=denoiser_only, warn=warn)
    own = file.parent / METHOD_FILE
    carried = own if own.is_file() and record is not None else None
    if carried is not None and file_of.name != LORA_FILE:
        if not without_method_weights:
            raise LoraError(
                f"LoRA {path} has weights of its method beside it, {METHOD_FILE}, for which"
                f" {_place(to, file_of)} has no place: --without-method-weights leaves them out"
            )
        warn(f"the weights of the method are left out; {own} holds them")
    tensors = written(contents.pairs, to, names, contents.denoiser)
    metadata = {key: value for key, value in contents.metadata.items() if key in _KEPT}
    if record is not None and record.family is None and contents.family is not None:
        told = asdict(record) | {"family": contents.family}
        metadata[RECORD_ENTRY] = json.dumps(told, sort_keys=True)
    if to == DIFFUSERS:
        metadata |= config_entry(contents.pairs, contents.denoiser)
    write_file(file_of, tensors, metadata, beside=carried if file_of.name == LORA_FILE else None)
    return file_of


def write_file(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    beside: Path | None = None,
) -> None:
    """Write a .safetensors file under a temporary name, read it back, and rename it.

    Args:
        file: the file; its folder is made.
        tensors: the tensors; they may share memory.
        metadata: the header's entries.
        beside: a file to copy beside it, under its own name, before the rename.

    Raises:
        LoraError: if the file exists or cannot be written, or a tensor is NaN or infinite.
    """
    if file.exists():
        raise LoraError(f"{file} exists: give another name, or remove it first")
    check_finite(tensors, file)
    temporary: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".diffattn-", suffix=SUFFIX)
        os.close(descriptor)
        temporary = Path(name)
        save_file(_apart(tensors), temporary, metadata={"format": "pt", **metadata})
        _check_written(temporary, tensors)
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as opened:
            os.fsync(opened.fileno())
        if beside is not None:
            shutil.copyfile(beside, file.parent / beside.name)
        temporary.replace(file)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoraError(f"cannot write {file}: {reason}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without shared memory, which safetensors refuses."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        start = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if start in seen else tensor
        seen.add(start)
    return apart


def _check_written(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        same = names == set(tensors) and all(
            torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items()
        )
    if not same:
        raise OSError("the file reads back with other numbers; is the disk damaged?")


def _target(place: Path, to: str, record: LoraRecord | None) -> Path:
    if place.suffix == SUFFIX:
        return place
    if to != DIFFUSERS:
        raise LoraError(f"{place} is no {SUFFIX} file: the {to} layout is a file; name one")
    if place.suffix:
        raise LoraError(f"{place} is neither a {SUFFIX} file nor a folder's name")
    return place_of(place, record.denoiser if record else "transformer") / LORA_FILE


def _place(to: str, file: Path) -> str:
    return f"the {to} layout" if to != DIFFUSERS else f"a single file, {file.name}"


def _checked(family: str | None) -> str | None:
    known = [names.family for names in FAMILY_NAMES]
    if family is not None and family not in known:
        raise LoraError(
            f"diffattn knows no other layout for family {family!r}"
            f"{did_you_mean(family, known, or_list=True)}"
        )
    return family


def _names(contents: Contents, to: str) -> FamilyNames | None:
    if contents.layout == DIFFUSERS and to == DIFFUSERS:
        return None
    if contents.family is None:
        could = contents.candidates or tuple(names.family for names in FAMILY_NAMES)
        raise LoraError(
            f"LoRA {contents.path} does not say which family it is for, and its names do not tell:"
            f" give --family {' or '.join(could)}"
        )
    names = names_of(contents.family)
    if names is None:
        known = ", ".join(names.family for names in FAMILY_NAMES)
        raise LoraError(
            f"diffattn knows no other layout for family {contents.family!r} than diffusers' own:"
            f" layouts are known for {known}"
        )
    if to != DIFFUSERS and to not in names.layouts:
        raise LoraError(
            f"no program is known to read {names.title} LoRAs in the {to} layout: choose"
            f" {' or '.join((DIFFUSERS, *names.layouts))}"
        )
    return names


def refuse_others(
    contents: Contents,
    *,
    denoiser_only: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Check that a LoRA is nothing but pairs for a denoiser.

    Args:
        contents: the LoRA.
        denoiser_only: only warn of tensors for text encoders.
        warn: takes the warning.

    Raises:
        LoraError: if the LoRA holds layers of unknown names, or more than pairs.
    """
    if contents.unknown:
        family = names_of(contents.family or "")
        raise LoraError(
            f"LoRA {contents.path} does not fit {family.title if family else 'any known family'}:"
            f" diffattn knows no layer {contents.unknown[0]} of it"
            + (f" (nor {len(contents.unknown) - 1} more)" if len(contents.unknown) > 1 else "")
        )
    if contents.magnitudes:
        raise LoraError(
            f"LoRA {contents.path} is a DoRA: its {len(contents.magnitudes)} magnitudes cannot be"
            f" converted or merged"
        )
    if contents.others:
        held = ", ".join(f"{count} {kind}" for kind, count in contents.others.items())
        raise LoraError(
            f"LoRA {contents.path} holds {held} beside its factors, which cannot be"
            f" converted or merged"
        )
    if contents.text_encoders:
        if not denoiser_only:
            raise LoraError(
                f"LoRA {contents.path} holds {contents.text_encoders} tensors for text encoders,"
                f" which are not converted or merged: lora convert --denoiser-only leaves them out"
            )
        warn(f"{contents.text_encoders} tensors for text encoders are left out")
