"""Captions of clips, from a text file beside each clip or from a table; files of prompts."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from diffattn._checks import did_you_mean
from diffattn.lora.errors import LoraError

# The first name is ours, the second name that of Hugging Face's image and video folders.
_FILE_COLUMNS = ("file", "file_name")
_CAPTION_COLUMNS = ("caption", "text")


@dataclass(frozen=True)
class CaptionedClip:
    """A clip and its caption.

    Attributes:
        source: the picture that the clip was edited from; for models that edit.
    """

    path: Path
    caption: str
    source: Path | None = None


def captioned_clips(
    folder: Path, clips: Sequence[Path], table: Path | None = None
) -> tuple[list[CaptionedClip], list[Path]]:
    """Read the captions of clips.

    Args:
        folder: the folder of the clips.
        clips: the clips, files in this folder.
        table: a .csv file, or a .jsonl file with an object a line, of file names and captions. None
            if each clip has a .txt file of the same name beside it.

    Returns:
        The clips with captions, in the order of `clips`, and the clips that the table leaves out.

    Raises:
        LoraError: if a caption is missing, empty, repeated, or for no clip, or if a file cannot be
            read; names the place.
    """
    if table is None:
        return [CaptionedClip(clip, _caption_beside(clip)) for clip in clips], []
    known = {_plain(clip): clip for clip in clips}
    # Some systems take the accents of file names apart, and most tables have them whole.
    composed = {_composed(path): clip for path, clip in known.items()}
    captions: dict[Path, str] = {}
    for line, name, caption in _rows(table):
        path = _plain(folder / name)
        clip = known.get(path) or composed.get(_composed(path))
        if clip is None:
            names = [path.relative_to(folder).as_posix() for path in clips]
            hint = did_you_mean(name, names)
            raise LoraError(f"{table}, line {line}: there is no clip {name!r} in {folder}{hint}")
        if clip in captions:
            raise LoraError(f"{table}, line {line}: {name!r} has a caption already: remove one")
        captions[clip] = caption
    if not captions:
        raise LoraError(f"{table} holds no captions")
    found = [CaptionedClip(clip, captions[clip]) for clip in clips if clip in captions]
    return found, [clip for clip in clips if clip not in captions]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file, one prompt a line; blank lines are left out.

    Raises:
        LoraError: if the file cannot be read, or holds no prompt.
    """
    # splitlines() would also break at characters that may stand inside a sentence.
    lines = [line.strip() for line in _text(path).split("\n")]
    prompts = [line for line in lines if line]
    if not prompts:
        raise LoraError(f"{path} holds no prompt")
    return prompts


def _caption_beside(clip: Path) -> str:
    path = clip.with_suffix(".txt")
    if not path.is_file():
        raise LoraError(
            f"{clip} has no caption: write it to {path.name} beside it, or give a table (.csv or"
            f" .jsonl) of the clips to train on"
        )
    caption = _one_line(_text(path))
    if not caption:
        raise LoraError(f"{path} is empty, but must hold the caption of {clip.name}")
    return caption


def _rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """The line number, the file name and the caption of each row of a table."""
    suffix = table.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise LoraError(f"{table} ends in {suffix!r}, but a table of captions is .csv or .jsonl")
    text = _text(table)
    rows = _csv_rows if suffix == ".csv" else _json_rows
    for line, name, caption in rows(table, text):
        caption = _one_line(caption)
        if not name.strip() or not caption:
            what = "caption" if name.strip() else "file name"
            raise LoraError(f"{table}, line {line}: the {what} is empty")
        if not _is_text(caption):
            raise LoraError(
                f"{table}, line {line}: the caption {caption!r} is no text: JSON escapes from"
                f" \\ud800 to \\udfff stand in pairs"
            )
        yield line, name.strip(), caption


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, str, str]]:
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        file = _column(header, _FILE_COLUMNS)
        caption = _column(header, _CAPTION_COLUMNS)
        if file is None or caption is None:
            missing = _FILE_COLUMNS if file is None else _CAPTION_COLUMNS
            raise LoraError(
                f"{table} has no column {missing[0]}: its first line must name the columns,"
                f" separated by commas, such as file,caption; it is {','.join(header)!r}"
            )
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise LoraError(
                    f"{table}, line {reader.line_num}: it has {len(row)} columns, but the first"
                    f' line has {len(header)}: put a caption with commas into "quotes"'
                )
            yield reader.line_num, row[file], row[caption]
    except csv.Error as error:
        raise LoraError(f"{table}, line {reader.line_num}: {error}") from None


def _column(header: list[str], names: tuple[str, ...]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _json_rows(table: Path, text: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LoraError(f"{table}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise LoraError(f"{table}, line {number}: {line.strip()!r} is not a JSON object")
        yield (
            number,
            _entry(table, number, row, _FILE_COLUMNS),
            _entry(table, number, row, _CAPTION_COLUMNS),
        )


def _entry(table: Path, line: int, row: dict[str, object], names: tuple[str, ...]) -> str:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise LoraError(f'{table}, line {line} has no "{names[0]}": it has {", ".join(row)}')
    value = row[name]
    if not isinstance(value, str):
        raise LoraError(f'{table}, line {line}: "{name}" is {value!r}, but must be a text')
    return value


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LoraError(f"cannot read {path}: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LoraError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}"
        ) from None


def _is_text(value: str) -> bool:
    """Whether a value can be written as UTF-8; JSON may hold halves of characters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(path: Path) -> Path:
    """The absolute path without `..`, for files that exist and for files that do not."""
    return Path(os.path.abspath(path))


def _composed(path: Path) -> str:
    """A path with each letter and its accents as one character."""
    return unicodedata.normalize("NFC", str(path))
