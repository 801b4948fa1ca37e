"""The documents name what is there: links, paths in backticks or tables, commands, options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from diffattn.pipelines.cli.commands import app

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
NOT_THERE = re.compile(r"gpu-run|[A-Z]{3,}")


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


def command_lines(document: Path) -> list[list[str]]:
    """The words of each line of a shell block that calls `diffattn`, continued lines joined."""
    found, language = [], None
    for line in document.read_text("utf-8").replace("\\\n", " ").splitlines():
        text = line.strip()
        if text.startswith("```"):
            language = text.removeprefix("```") if language is None else None
        elif language in ("", "bash", "sh", "console"):
            text = text.removeprefix("$ ")
            if text.startswith("diffattn "):
                found.append(shlex.split(text, comments=True)[1:])
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_exist(document: Path) -> None:
    for words in command_lines(document):
        command: Any = get_command(app)
        rest = words
        while hasattr(command, "commands"):
            assert rest, f"{' '.join(words)} names no command"
            assert rest[0] in command.commands, f"no command {rest[0]!r}: {' '.join(words)}"
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for word in rest:
            option = word.partition("=")[0]
            if option.startswith("-") and not re.fullmatch(r"-?[\d.]+.*", option):
                assert option in known, f"no option {option!r}: diffattn {' '.join(words)}"


def test_command_lines_are_found() -> None:
    lines = command_lines(ROOT / "README.md")
    assert len(lines) > 10
    assert {"plan", "generate", "compare", "lora"} <= {line[0] for line in lines}
