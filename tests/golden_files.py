"""Where the golden vectors are, which methods' public code computed: goldens/README.md."""

from __future__ import annotations

from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens"


def matching(pattern: str, count: int) -> list[Path]:
    """The golden files whose path matches a pattern, sorted, for a test to be parametrised by.

    Raises:
        FileNotFoundError: unless `count` files are there. A file that is lost would only make the
            cases fewer.
    """
    found = sorted(GOLDENS.glob(pattern))
    if len(found) != count:
        raise FileNotFoundError(
            f"{len(found)} golden files are called {pattern}, but {count} must be in {GOLDENS}:"
            f" {', '.join(path.name for path in found) or 'none is there'}"
        )
    return found
