"""The fastest variant of each kernel on GPUs that have been measured, from JSON tables.

`tables/` has one file for each such GPU, written by `make gpu-run`. A table applies to GPUs of its
name and to the minor version of Triton that it was measured with: another compiler makes other
code. The environment variable DIFFATTN_TUNED_TABLE names a file to read instead of these files.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from .tile_tables import Choice, TileConfig

TABLE_VARIABLE = "DIFFATTN_TUNED_TABLE"
FOLDER = Path(__file__).parent / "tables"

# Every kernel that may have an entry, with its variants.
VARIANTS: dict[str, tuple[str, ...]] = {
    "forward": ("plain", "tma", "gluon"),
    "queries": ("plain", "tma"),
    "keys": ("plain", "tma"),
    "gather_forward": ("plain",),
    "gather_queries": ("plain",),
    "gather_keys": ("plain",),
}

_TABLE_KEYS = {"gpu", "triton", "torch", "revision", "date", "choices"}
_TILES = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5, 6, 7, 8),
}
_PARTIAL = (16, 32, 64, 128, 256)
_HEAD_DIMS = (16, 32, 64, 128, 256)
_CHOICE_KEYS = {"kernel", "head_dim", "variant", "partial", "ahead", *_TILES}
_MEASURED_KEYS = {"shape", "ms", "shipped_ms"}


@dataclass(frozen=True)
class TunedTable:
    """The fastest choices that were measured on one GPU.

    Attributes:
        gpu: the GPU's name, as torch has it.
        triton: the version of Triton that compiled the kernels.
        choices: by kernel and head_dim.
    """

    gpu: str
    triton: str
    choices: dict[tuple[str, int], Choice]

    def fits(self, gpu: str) -> bool:
        """Whether the table applies to a GPU with the installed Triton."""
        return self.gpu == gpu and _minor(self.triton) == _minor(triton.__version__)


def tuned_choice(kernel: str, head_dim: int) -> Choice | None:
    """The variant and tiles of a kernel that were measured to be fastest on the current device.

    They are for 16-bit inputs without a key mask, and a head_dim that needs no padding.

    Args:
        kernel: a name in `VARIANTS`.

    Returns:
        None where nothing was measured on this GPU, with this Triton, for this head_dim.

    Raises:
        ValueError: if a table is malformed, or if DIFFATTN_TUNED_TABLE names no readable file.
    """
    name = device_name()
    if name is None:
        return None
    return _choices(name, os.environ.get(TABLE_VARIABLE)).get((kernel, head_dim))


def device_name() -> str | None:
    """The current device's name, as tables have it; None where there is no GPU."""
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.xpu.is_available():
        return torch.xpu.get_device_name()
    return None


@functools.lru_cache
def _choices(gpu: str, named: str | None) -> dict[tuple[str, int], Choice]:
    paths: Iterable[Path] = [Path(named)] if named else sorted(FOLDER.glob("*.json"))
    fitting = [table for table in map(read_table, paths) if table.fits(gpu)]
    return {key: choice for table in fitting for key, choice in table.choices.items()}


def read_table(path: Path) -> TunedTable:
    """Read a table.

    Raises:
        ValueError: if the file cannot be read, is not JSON, or has an entry that no kernel takes.
            The message names the file and the entry.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"the tuned table {path} cannot be read ({error.strerror}); {TABLE_VARIABLE} must name"
            " a file that `make gpu-run` wrote, or be unset"
        ) from error
    except ValueError as error:
        raise ValueError(f"the tuned table {path} is not JSON: {error}") from error
    try:
        return _table(record)
    except ValueError as error:
        raise ValueError(f"the tuned table {path} is malformed: {error}") from error


def _table(record: Any) -> TunedTable:
    _check_keys("the table", record, _TABLE_KEYS, set())
    for key in ("gpu", "triton"):
        if not isinstance(record[key], str) or not record[key]:
            raise ValueError(f"{key} must be text; got {record[key]!r}")
    if not isinstance(record["choices"], list):
        raise ValueError(f"choices must be a list; got {record['choices']!r}")
    choices: dict[tuple[str, int], Choice] = {}
    for number, entry in enumerate(record["choices"]):
        where = f"choice {number}"
        _check_keys(where, entry, _CHOICE_KEYS, _MEASURED_KEYS)
        _check(where, "kernel", entry["kernel"], tuple(VARIANTS))
        _check(where, "variant", entry["variant"], VARIANTS[entry["kernel"]])
        _check(where, "head_dim", entry["head_dim"], _HEAD_DIMS)
        for name, allowed in _TILES.items():
            _check(where, name, entry[name], allowed)
        _check(where, "partial", entry["partial"], (None, *_PARTIAL))
        if not isinstance(entry["ahead"], bool):
            raise ValueError(f"{where}: ahead is {entry['ahead']!r}; may be true or false")
        kernel, head_dim = entry["kernel"], entry["head_dim"]
        if (kernel, head_dim) in choices:
            raise ValueError(f"{where} is a second one for {kernel}, head_dim {head_dim}")
        tiles = TileConfig(**{name: entry[name] for name in (*_TILES, "partial", "ahead")})
        choices[kernel, head_dim] = Choice(entry["variant"], tiles)
    return TunedTable(record["gpu"], record["triton"], choices)


def _check_keys(where: str, record: Any, needed: set[str], more: set[str]) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object; got {record!r}")
    for problem, keys in (
        ("lacks", needed - record.keys()),
        ("has an unknown key", record.keys() - needed - more),
    ):
        if keys:
            raise ValueError(f"{where} {problem} {', '.join(map(repr, sorted(keys)))}")


def _check(where: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    # JSON's true is equal to 1 in Python.
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{where}: {name} is {value!r}; may be {', '.join(map(repr, allowed))}")


def _minor(version: str) -> list[str]:
    """Major and minor version."""
    return version.split(".")[:2]
