"""The JSON record beside each video, from which the run can be repeated."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import UserError
from .request import Request

_FORMAT = 1
_PACKAGES = ("diffattn", "torch", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """The versions, by package, that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def write_record(path: Path, request: Request, facts: dict[str, Any]) -> None:
    """Write every setting of a run, the versions, and facts about the run."""
    record = {
        "diffattn_record": _FORMAT,
        "settings": request.to_dict(),
        "versions": versions(),
        **facts,
    }
    path.write_text(
        json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
    )


def read_settings(path: Path) -> tuple[dict[str, Any], list[Path], list[str]]:
    """Read a record.

    Returns:
        The settings, the paths of the record and of the files that its run wrote, and one line for
        each version that differs from the present version.

    Raises:
        UserError: if the file cannot be read, or is no record.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not a record of diffattn generate: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise UserError(f'{path} is not a record of diffattn generate: it has no "settings"')
    if record.get("diffattn_record") != _FORMAT:
        raise UserError(f"{path} is a record of another version of diffattn")
    files = [path.parent / str(name) for name in _table(record, "files").values()]
    then, now = _table(record, "versions"), versions()
    changes = [
        f"recorded with {name} {then[name]}, now {now[name]}"
        for name in now
        if name in then and then[name] != now[name]
    ]
    return record["settings"], [path, *files], changes


def _table(record: dict[str, Any], name: str) -> dict[str, Any]:
    """An entry that only serves for warnings; empty if the record lacks the entry."""
    entry = record.get(name)
    return entry if isinstance(entry, dict) else {}
