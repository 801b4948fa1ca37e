"""The exceptions that end a command: bad input, and Ctrl-C."""

from __future__ import annotations

from pathlib import Path

# Letters; the longest name of a file has 255 bytes, and a path is made of few long names.
_LONGEST_WORD = 1024


def one_line(message: object) -> str:
    """The message of any library as one line, without surplus blanks; very long words are cut."""
    return " ".join(shortened(word, _LONGEST_WORD) for word in str(message).split())


def shortened(value: object, most: int = 80) -> str:
    """A value for a message, cut to `most` characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[: most - 2]}.."


class UserError(Exception):
    """Bad input: shown as one line on stderr, exit code 2."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


class RunInterruptedError(Exception):
    """Ctrl-C during a run: shown as one line on stderr, exit code 130."""

    def __init__(self, kept: list[Path], advice: str = "") -> None:
        """Name the files and folders that are kept, and say how to go on."""
        names = ", ".join(str(path) for path in kept)
        end = f"; {advice}" if advice else ""
        super().__init__(
            f"interrupted: kept {names}{end}" if kept else "interrupted: nothing was written"
        )
