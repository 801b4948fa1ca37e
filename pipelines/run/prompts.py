"""Files of prompts: UTF-8 text, one prompt a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError


@dataclass(frozen=True)
class PromptFile:
    """The content of a prompt file.

    Attributes:
        prompts: in the order of the file.
        blank_lines: numbers of the skipped lines, counted from 1.
        hash_lines: numbers of the lines that begin with "#", which are prompts like all others.
    """

    prompts: tuple[str, ...]
    blank_lines: tuple[int, ...]
    hash_lines: tuple[int, ...]


def read_prompts(path: Path) -> PromptFile:
    """Read one prompt a line; blank lines are skipped and their numbers kept.

    Raises:
        UserError: if the file cannot be read, is not UTF-8, or holds no prompt.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read prompt file {path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder counts from the end of a byte order mark, which only a UTF-8 file can have.
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"prompt file {path} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{error.start} (line {line})"
        ) from None
    # str.splitlines() also breaks at characters that may stand inside a sentence.
    lines = [line.strip() for line in text.split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt")
    blank = tuple(number for number, line in enumerate(lines, start=1) if not line)
    hashes = tuple(number for number, line in enumerate(lines, start=1) if line.startswith("#"))
    return PromptFile(prompts, blank, hashes)
