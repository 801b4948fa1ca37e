"""Encoded clips on the disk, each in a file of its own that is either complete or missing.

A file is named by a hash of everything that its content depends on: the clip, the caption, the
size, the model. So a stopped run continues where it was, and a clip is encoded again only after a
change. The index, which is written last, lists the files of one data set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from diffattn.lora.errors import LoraError

INDEX = "index.json"

_FORMAT = 1
_LATENTS = "latents"
_CONDITION = "conditions."
_PARTIAL = ".partial-"

# Number of values of each weight in a model's fingerprint.
_SAMPLES = 16


class CachedClips(Dataset[dict[str, Any]]):
    """A data set of latents of one shape, with the denoiser's conditions for each clip.

    Item i is {"latents": (channels, latent frames, height, width), "conditions": {name: tensor
    without batch axis}, "key": str}.

    Attributes:
        folder: the folder of the data set.
        keys: the keys of the clips, in order.
        facts: other entries of the index, such as the family and the size.
    """

    def __init__(self, folder: Path) -> None:
        """Open the data set in a folder.

        Raises:
            LoraError: if the folder has no index, or a file of the data set is missing.
        """
        self.folder = folder
        index = _read_index(folder)
        self.keys: list[str] = index["keys"]
        self._empty: str = index["empty"]
        self.facts: dict[str, Any] = index["facts"]
        missing = [key for key in (*self.keys, self._empty) if not _path(folder, key).is_file()]
        if missing:
            raise LoraError(
                f"{len(missing)} of {len(self.keys)} clips are missing in {folder}, the first is"
                f" {missing[0]}: prepare the data again, which makes only what is missing"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = self.keys[index]
        tensors = _load(_path(self.folder, key))
        latents = tensors.pop(_LATENTS)
        return {"latents": latents, "conditions": _conditions(tensors), "key": key}

    @property
    def empty(self) -> dict[str, Tensor]:
        """The denoiser's conditions for the empty caption, without batch axis."""
        return _conditions(_load(_path(self.folder, self._empty)))


def entry_key(depends_on: Mapping[str, Any]) -> str:
    """The key of an entry: a hash of everything that the entry depends on, given as JSON types."""
    text = json.dumps(depends_on, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def seed_of(key: str) -> int:
    """The seed for everything random about the entry with this key."""
    return int(key[:8], 16)


def fingerprint(*parts: Any) -> str:
    """A hash that tells models, and configurations of models or schedulers, apart.

    The hash covers every name, shape and dtype in a model's state, and a few values of each tensor.

    Args:
        parts: models, schedulers, or mappings of settings.
    """
    digest = hashlib.sha256()
    for part in parts:
        config = getattr(part, "config", part)
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        # The origin of a model and the versions of libraries do not count.
        hidden = {k for k in settings if k.startswith("_") or k.endswith("_version")}
        plain = {k: v for k, v in settings.items() if k not in hidden}
        digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
        if not isinstance(part, torch.nn.Module):
            continue
        for name, value in part.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            for tensor in _plain_tensors(value):
                flat = tensor.detach().flatten()
                some = flat[:: max(1, len(flat) // _SAMPLES)]
                digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _plain_tensors(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor of a model's state consists of; a plain tensor is itself.

    A quantised weight of torchao is an object of several tensors, and refuses the operations of a
    plain tensor. Other kinds of weights (GGUF, bitsandbytes) are plain storage with notes.
    """
    if type(value) in (Tensor, torch.nn.Parameter):
        yield value
    elif hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _plain_tensors(getattr(value, name))
    else:
        # A wrapper without the protocol has its tensors among its attributes.
        parts = [part for part in vars(value).values() if isinstance(part, Tensor)]
        for part in parts:
            yield from _plain_tensors(part)
        if not parts:
            yield value.detach().as_subclass(Tensor)


def open_folder(folder: Path) -> None:
    """Make a folder ready for entries, and remove incomplete files of a killed run.

    Raises:
        LoraError: if the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{_PARTIAL}*"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise LoraError(f"cannot write to {folder}: {error.strerror}") from None


def is_stored(folder: Path, key: str) -> bool:
    """Whether a folder has an entry; a file that something else has damaged is none."""
    try:
        # The header says how long the file must be.
        with safe_open(_path(folder, key), framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def store(
    folder: Path,
    key: str,
    latents: Tensor | None,
    conditions: Mapping[str, Tensor],
    about: Mapping[str, str],
) -> None:
    """Write an entry.

    Args:
        folder: the folder of the data set.
        key: the key of the entry.
        latents: (1, channels, latent frames, height, width); None for an entry without latents.
        conditions: the denoiser's conditions, with a batch axis of 1.
        about: notes in the file for people.

    Raises:
        LoraError: if the entry cannot be written; no part of the entry is left.
    """
    tensors = {_CONDITION + name: value[0] for name, value in conditions.items()}
    if latents is not None:
        tensors[_LATENTS] = latents[0]
    # safetensors refuses views of larger tensors and permuted tensors.
    tensors = {name: _packed(value) for name, value in tensors.items()}
    # The format writes several metadata entries in any order. With one entry a file is always the
    # same.
    header = {"clip": json.dumps(about, ensure_ascii=False)}
    _write(_path(folder, key), lambda path: save_file(tensors, path, metadata=header))


def write_index(folder: Path, keys: list[str], empty: str, facts: Mapping[str, Any]) -> None:
    """Write the index of a data set, in place of the folder's former index.

    An equal index is left alone: other processes may be reading the file.

    Args:
        folder: the folder of the data set.
        keys: the keys of the clips, in order.
        empty: the key of the empty caption.
        facts: other entries of the index, JSON types.

    Raises:
        LoraError: if the index cannot be written; the former index stays.
    """
    index = {"diffattn_clips": _FORMAT, "keys": keys, "empty": empty, "facts": dict(facts)}
    text = json.dumps(index, indent=1, ensure_ascii=False) + "\n"
    path = folder / INDEX
    if path.is_file() and path.read_bytes() == text.encode():
        return
    _write(path, lambda partial: partial.write_text(text, "utf-8"))


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise LoraError(
            f"there are no prepared clips in {folder}: it has no {INDEX}, which is written when all"
            f" clips are"
        ) from None
    except (OSError, ValueError) as error:
        raise LoraError(f"cannot read {path}: {error}") from None
    if not isinstance(index, dict) or index.get("diffattn_clips") != _FORMAT:
        raise LoraError(f"{path} is not the index of clips prepared by this version of diffattn")
    return index


def _load(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LoraError(
            f"cannot read {path}: {error}; remove it and prepare the data again"
        ) from None


def _packed(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _conditions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_CONDITION): value for name, value in tensors.items()}


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _write(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, and rename the file once it is complete on the disk."""
    partial = target.with_name(f"{_PARTIAL}{os.getpid()}-{target.name}")
    try:
        write(partial)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise LoraError(f"cannot write {target}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
