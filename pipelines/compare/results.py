"""What a comparison writes at its end: the table in Markdown, and the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .comparison import Comparison, Folder, read_record
from .page import MOST_MEDIA, page
from .sample_table import Row, write_whole
from .table import against_floors, as_markdown, lines

# Tests of all measures that a terminal shows.
_MOST_TESTS = 100


def write_results(
    comparison: Comparison,
    folder: Folder,
    rows: Sequence[Row],
    papers: Sequence[Mapping[str, str]] = (),
    most_media: int = MOST_MEDIA,
) -> Iterator[str]:
    """Write the results, and yield lines about them.

    Args:
        comparison: the settings.
        folder: the folder of the samples, which takes the table and the page.
        rows: the samples.
        papers: figures that papers report, for the page.
        most_media: bytes of videos and pictures in the page.
    """
    found = lines(comparison.cases, rows, comparison.measures)
    tests = against_floors(comparison.cases, rows, comparison.measures)
    text = as_markdown(found, tests, comparison.measures)
    write_whole(folder.summary, text)
    if len(tests) > _MOST_TESTS:
        # On a screen the tests of many cases would hide the table.
        text = as_markdown(found, (), comparison.measures)
        text += f"\n{len(tests)} paired tests against the floors: {folder.summary}, {folder.page}\n"
    yield from text.splitlines()
    record = read_record(folder.settings)
    write_whole(folder.page, page(comparison, folder, rows, record, papers, most_media))
    yield f"{folder.samples}: {len(rows)} samples; {folder.summary}; {folder.page} to look at"
