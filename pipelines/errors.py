"""The one exception that means "the user can put this right", and how names are suggested."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``word``, or nothing."""
    matches = get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_line(message: object) -> str:
    """Return a message of any library as one line without surplus blanks."""
    return " ".join(str(message).split())


class UserError(Exception):
    """Bad input: shown as one line on stderr, exit code 2."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


class RunInterruptedError(Exception):
    """Ctrl-C during a run: shown as one line on stderr, exit code 130."""

    def __init__(self, kept: list[Path]) -> None:
        names = ", ".join(str(path) for path in kept)
        super().__init__(
            f"interrupted: kept {names}" if kept else "interrupted: nothing was written"
        )
