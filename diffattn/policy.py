"""Policies in files: `policy.json`, as `diffattn calibrate` writes it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from diffattn.methods.policy import Policy
from diffattn.methods.registry import from_dict


def load_policy(path: str | Path) -> Policy:
    """The policy in a file, for `set_attn_processor`.

    Args:
        path: a JSON file that holds a policy's `to_dict()`.

    Raises:
        ValueError: if the file cannot be read, is not JSON, holds no policy or a policy of a newer
            diffattn, or a rule of it is refused; the message begins with the path.
    """
    path = Path(path)
    try:
        entry = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the policy {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(entry, Mapping) or entry.get("type") != Policy.type:
        found = f"the method {entry['type']!r}" if _has_type(entry) else "something else"
        raise ValueError(
            f'{path} holds {found}, not a policy, which is an object with "type": "policy"'
        )
    try:
        # A newer format may have keys that this version does not know.
        Policy(format=entry.get("format", 1))
        policy = from_dict(entry)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    assert isinstance(policy, Policy)
    return policy


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy to a file, which is replaced in one piece.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    text = json.dumps(policy.to_dict(), indent=2) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _has_type(entry: object) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("type"), str)
