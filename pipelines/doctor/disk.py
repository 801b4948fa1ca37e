"""Folders that runs write to: whether they can, and how much room there is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..run.memory import gib
from .findings import Check, Finding

_TRIED = 1 << 16  # bytes that are written for a test
_NONE_LEFT = 100 << 20
_OUTPUT, _KERNELS, _WEIGHTS = 1 << 30, 1 << 30, 20 << 30


@dataclass(frozen=True)
class Folder:
    """A folder that is written to.

    Attributes:
        subject: what is written there.
        path: the folder, which may not exist yet.
        needs: free bytes below which there is a warning.
        variable: the environment variable, or the option, that names another folder.
    """

    subject: str
    path: Path
    needs: int
    variable: str


def check_folders() -> Iterator[Finding]:
    """All folders."""
    for folder in _folders():
        yield examined(folder)


def examined(folder: Folder) -> Finding:
    """Write a file there, or in the parent in which the folder would be made."""
    place = folder.path
    while not place.exists() and place != place.parent:
        place = place.parent
    other = f"or name another folder by {folder.variable}"
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".diffattn-doctor-") as file:
            file.write(bytes(_TRIED))
            file.flush()
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(
            "problem",
            folder.subject,
            f"{folder.path} cannot be written to: {error.strerror or error}",
            f"change its permissions or make room, {other}",
        )
    said = f"{folder.path}, {gib(free)} free"
    if free < _NONE_LEFT:
        return Finding("problem", folder.subject, said, f"the disk is full: make room, {other}")
    if free < folder.needs:
        return Finding(
            "warning",
            folder.subject,
            said,
            f"{gib(folder.needs)} may be needed: make room, {other}",
        )
    return Finding("ok", folder.subject, said)


def _folders() -> Iterator[Folder]:
    home = Path.home()
    yield Folder("outputs", Path.cwd(), _OUTPUT, "--output")
    yield Folder("temporary files", Path(tempfile.gettempdir()), _OUTPUT, "TMPDIR")
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    yield Folder("compiled kernels", triton, _KERNELS, "TRITON_CACHE_DIR")
    # Last: the import may fail.
    yield Folder("models", _hub_cache(), _WEIGHTS, "HF_HUB_CACHE")


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


CHECKS: tuple[Check, ...] = (check_folders,)
