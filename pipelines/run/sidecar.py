"""The JSON record beside each video, from which the run can be repeated."""

from __future__ import annotations

import glob
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import UserError
from .request import Request

_FORMAT = 1
# The entries by which the records of generate and of the two kinds of upscale are known.
_MARK = "diffattn_record"
_MARKS = (_MARK, "diffattn_upscale_record", "diffattn_picture_record")
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
        _MARK: _FORMAT,
        "settings": request.to_dict(),
        "versions": versions(),
        **facts,
    }
    path.write_text(
        json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
    )


def is_record(path: Path) -> bool:
    """Whether a file is a record of diffattn, of any command and version."""
    return any(mark in _content(path) for mark in _MARKS)


def describes(path: Path, name: str) -> bool:
    """Whether a file is a record whose video or picture, beside the record, has this name."""
    content = _content(path)
    files = _table(content, "files")
    return any(mark in content for mark in _MARKS) and name in files.values()


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
        raise UserError(f"cannot read {path}: {error.strerror}{_similar(path)}") from None
    except ValueError as error:
        raise UserError(f"{path} is not a record of diffattn generate: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise UserError(f'{path} is not a record of diffattn generate: it has no "settings"')
    if _MARK not in record and any(mark in record for mark in _MARKS):
        raise UserError(
            f"{path} is a record of diffattn upscale: only the runs of diffattn generate can be"
            f" repeated by --from"
        )
    if record.get(_MARK) != _FORMAT:
        raise UserError(f"{path} is a record of another version of diffattn")
    files = [path.parent / str(name) for name in _table(record, "files").values()]
    then, now = _table(record, "versions"), versions()
    changes = [
        f"recorded with {name} {then[name]}, now {now[name]}"
        for name in now
        if name in then and then[name] != now[name]
    ]
    return record["settings"], [path, *files], changes


def _content(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty for any other file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _similar(path: Path) -> str:
    """Words about the records of videos of a name, where the name alone was given."""
    found = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*.json"))
    names = [str(file) for file in found if is_record(file)]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _table(record: dict[str, Any], name: str) -> dict[str, Any]:
    """An entry that only serves for warnings; empty if the record lacks the entry."""
    entry = record.get(name)
    return entry if isinstance(entry, dict) else {}
