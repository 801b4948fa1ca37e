"""What a comparison writes at its end: the table in Markdown, and the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .comparison import Comparison, Folder
from .sample_table import Row, write_whole
from .table import against_floors, as_markdown, lines


def write_results(comparison: Comparison, folder: Folder, rows: Sequence[Row]) -> Iterator[str]:
    """Write the results, and yield lines about them."""
    found = lines(comparison.cases, rows, comparison.measures)
    tests = against_floors(comparison.cases, rows, comparison.measures)
    text = as_markdown(found, tests, comparison.measures)
    write_whole(folder.summary, text)
    yield from text.splitlines()
    yield f"{folder.samples}: {len(rows)} samples; {folder.summary}"
