"""The documents name files that are there: links, and paths in backticks or tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "benchmarks").glob("*.md"),
    ROOT / "tests" / "goldens" / "README.md",
    ROOT / "samples" / "moving_shapes" / "model" / "README.md",
]
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)[^)]*\)")
# A path that begins with a folder of the repository, and has no placeholder.
FOLDERS = "diffattn|kernels|pipelines|lora|samples|tests|benchmarks|docs"
PATH = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*[\w/])(?![\w*{{<])")
# Written by a run, or the user's own.
NOT_THERE = re.compile(r"gpu-run|[A-Z]{3,}|docs/benchmarks")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_exists(document: Path) -> None:
    text = document.read_text("utf-8")
    links = [document.parent / link for link in LINK.findall(text)]
    prose = re.sub(r"https?://\S+", "", text)
    paths = [ROOT / path for path in PATH.findall(prose) if not NOT_THERE.search(path)]
    missing = [path for path in [*links, *paths] if not path.exists()]
    assert not missing, missing


def test_the_documents_are_found() -> None:
    names = {path.name for path in DOCUMENTS}
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "adding-a-family.md"} <= names
