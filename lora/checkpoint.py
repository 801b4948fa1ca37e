"""Checkpoints that are either complete or missing, and how a run continues from a checkpoint.

A checkpoint is a folder. It is written under a temporary name, and renamed once it is complete on
the disk. It holds accelerate's state of the run (optimiser, gradient scaler, generators), the
trained weights by name, and the LoRA of the step, ready for use.

accelerate writes its state as pickled files. A pickled file that holds more than tensors and
numbers is refused: code in it never runs.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load as load_pickled
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffattn._locks import lock_file
from diffattn.lora.errors import LoraError

FOLDER = "checkpoints"

_NAME = re.compile(r"step-(\d+)")
_PROGRESS = "progress.json"
WEIGHTS = "trained.safetensors"
_PICKLED = (".bin", ".pkl", ".pt")
# Bytes that are free on a disk that counts as full.
_FULL = 1 << 20
_LOCK = ".diffattn.lock"
_PARTIAL = ".diffattn.tmp"
# Unfinished files and folders of a killed run.
_LEFTOVERS = (_PARTIAL, f"*/{_PARTIAL}", f"{FOLDER}/.step-*.tmp", "validation/*.tmp.npz")
# The errors of a full disk: torch and safetensors raise errors of their own.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Progress:
    """The progress of a run, and the facts that must be the same for the run to continue.

    Attributes:
        step: number of optimiser steps made.
        identity: the facts that determine the next steps: settings, data, number of processes.
    """

    step: int
    identity: Mapping[str, Any]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder of a run while the block runs.

    The system ends the lock with its process, however the process ends. Unfinished files that a
    killed run has left are removed.

    Raises:
        LoraError: if another run holds the folder, or the folder cannot be written to.
    """
    path = folder / _LOCK
    try:
        lock = lock_file(path)
    except OSError as error:
        raise LoraError(f"cannot write to {folder}: {error.strerror}") from None
    if lock is None:
        holder = path.read_text("utf-8", "replace").strip() or "another process"
        raise LoraError(
            f"{folder} is in use: {holder} trains there; wait for its end, or give another output"
            f" folder"
        )
    try:
        os.ftruncate(lock.descriptor, 0)
        os.write(lock.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for path in [path for pattern in _LEFTOVERS for path in folder.glob(pattern)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        yield
    finally:
        lock.remove()


def keep_trained_only(accelerator: Accelerator, trained: Mapping[str, torch.nn.Parameter]) -> None:
    """Make accelerate's checkpoints hold the trained weights instead of the whole model.

    The checkpoints of FSDP do not come this way, see `diffattn.lora.sharded`.
    """

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if not weights:
            return
        weights.clear()
        if accelerator.is_main_process:
            tensors = {name: p.detach().cpu().contiguous() for name, p in trained.items()}
            save_file(tensors, Path(folder, WEIGHTS))

    def load(models: list[Any], folder: str) -> None:
        if not models:
            return
        models.clear()
        saved = load_file(Path(folder, WEIGHTS))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    progress: Progress,
    write: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write a checkpoint of all processes, and remove the oldest checkpoints.

    Args:
        accelerator: the accelerator of the run.
        folder: the output folder of the run.
        progress: the progress of the run.
        write: function that writes the state of the run into the checkpoint's folder. Every process
            calls `write`: reading a model that is spread over processes takes all of them.
        keep: number of checkpoints to keep.

    Returns:
        The folder of the checkpoint.

    Raises:
        LoraError: if the checkpoint cannot be written; earlier checkpoints are untouched.
    """
    place = folder / FOLDER
    target = place / f"step-{progress.step:06d}"
    temporary = place / f".{target.name}.tmp"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            text = json.dumps({"step": progress.step, "identity": progress.identity}, indent=1)
            (temporary / _PROGRESS).write_text(text + "\n", "utf-8")
            to_disk(temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            _sync(place)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    except _WRITE_ERRORS as error:
        reason = _reason(error, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise LoraError(f"cannot write {target}: {reason}; {_kept(folder)}") from None
    accelerator.wait_for_everyone()
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The folders of a run's complete checkpoints, the oldest first."""
    place = folder / FOLDER
    found = [path for path in place.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def read_progress(checkpoint: Path) -> Progress:
    """The progress of the run in a checkpoint.

    Raises:
        LoraError: if the checkpoint cannot be read.
    """
    try:
        entry = json.loads((checkpoint / _PROGRESS).read_text("utf-8"))
        return Progress(entry["step"], entry["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoraError(
            f"cannot read checkpoint {checkpoint}: {error!r}; remove it to go on from the one"
            f" before"
        ) from None


def load_checkpoint(
    checkpoint: Path, identity: Mapping[str, Any], read: Callable[[Path], None]
) -> int:
    """Put a run into the state of a checkpoint.

    Args:
        checkpoint: the folder of the checkpoint.
        identity: the facts that determine the steps of this run, see `Progress`.
        read: function that reads the state of the run from the checkpoint's folder.

    Returns:
        The number of optimiser steps made.

    Raises:
        LoraError: if the checkpoint is of another run, or cannot be read.
    """
    progress = read_progress(checkpoint)
    for name, value in identity.items():
        if progress.identity.get(name) != value:
            raise LoraError(
                f"cannot go on from {checkpoint}: its {name} is {progress.identity.get(name)!r},"
                f" now it is {value!r}; give the same, or another output folder"
            )
    _check_pickled(checkpoint)
    try:
        read(checkpoint)
    except (*_WRITE_ERRORS, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise LoraError(
            f"cannot read checkpoint {checkpoint}: {error}; remove it to go on from the one before"
        ) from None
    return progress.step


def _check_pickled(checkpoint: Path) -> None:
    """Raise LoraError if a pickled file of a checkpoint holds more than tensors and numbers.

    accelerate goes on without such a file, if the file is that of the generators.
    """
    for file in sorted(checkpoint.iterdir()):
        if file.suffix not in _PICKLED:
            continue
        try:
            # Mapped files are checked without reading their tensors.
            load_pickled(file, map_location="cpu", weights_only=True, mmap=True)
        except (*_WRITE_ERRORS, pickle.UnpicklingError, KeyError, ValueError, EOFError) as error:
            raise LoraError(
                f"cannot read checkpoint {checkpoint}: {file.name} is damaged, or is a pickled file"
                f" with more than tensors and numbers, which could run code"
                f" ({type(error).__name__}); remove it to go on from the one before"
            ) from None


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Write files into a folder so that each file is either complete or missing.

    Args:
        folder: the folder.
        write: function that writes the files into the folder in its argument.

    Raises:
        LoraError: if the files cannot be written; the folder's former files are untouched.
    """
    temporary = folder / _PARTIAL
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        to_disk(temporary)
        for file in sorted(temporary.iterdir()):
            file.replace(folder / file.name)
        _sync(folder)
    except _WRITE_ERRORS as error:
        raise LoraError(
            f"cannot write to {folder}: {_reason(error, folder)}; {_kept(folder)}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_disk(folder: Path) -> None:
    """Wait until all files in a folder are on the disk, before the folder is renamed."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def _reason(error: Exception, folder: Path) -> str:
    """Why a file could not be written, while what was written of it is still there.

    torch's error of a full disk names a line of its own source.
    """
    full = isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < _FULL
    return f"no space is left on the disk of {folder}" if full else str(error)


def _kept(folder: Path) -> str:
    whole = checkpoints(folder)
    return f"kept: {whole[-1]}" if whole else "there is no earlier checkpoint"
