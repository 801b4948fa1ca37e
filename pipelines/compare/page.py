"""The page of a comparison: one HTML file that holds its data, videos and pictures.

Nothing is fetched: the page's own policy forbids every request.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from .case import DENSE, Case
from .comparison import Comparison, Folder, Sample
from .measures import BY_NAME
from .sample_table import Row
from .table import Column, Compared, against_floors, between, columns, lines, missing

# Bytes of videos and pictures in a page, unless its caller says another number.
MOST_MEDIA = 40_000_000
# From this many pixels a side on, videos are shown smooth.
_LARGE = 200

_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'"
)
_TYPES = {".mp4": "video/mp4", ".png": "image/png"}
_COSTS = (
    "Pairs computed: the share of the token pairs that were computed, in all calls of attention of"
    " a run; calls that a schedule keeps dense count whole. Seconds a clip: of the whole call of"
    " the pipeline, without loading and writing; one untimed step was run before."
)


def page(
    comparison: Comparison,
    folder: Folder,
    rows: Sequence[Row],
    record: Mapping[str, Any],
    papers: Sequence[Mapping[str, str]] = (),
    most_media: int = MOST_MEDIA,
) -> str:
    """The page as text.

    Args:
        comparison: the settings.
        folder: holds the videos and the pictures of masks.
        rows: the samples.
        record: the settings as the folder's record has them, with versions and device.
        papers: figures that papers report: rows of a table, with the same keys.
        most_media: bytes of videos and pictures; the samples beyond are left out.
    """
    found = lines(comparison.cases, rows, comparison.measures)
    without = missing(found, comparison.measures)
    kept = [column for column in columns(comparison.measures) if column.name not in without]
    masks = {
        line.case.name: uri
        for line in found
        if (uri := _uri(folder.mask(comparison.stem(line.case)))) is not None
    }
    # Schedules and LoRAs change no mask: each is in the page once.
    different = list(dict.fromkeys(masks.values()))
    media, shown = _media(comparison, folder, rows, most_media - sum(map(len, different)))
    size = _size(folder, comparison.samples)
    data = {
        "columns": [_column(column) for column in kept],
        "cases": [
            {
                "name": line.case.name,
                "groups": list(line.case.groups),
                "kind": _kind(line.case),
                "type": line.case.attention["type"],
                "samples": line.samples,
                "cells": {
                    name: _finite(dataclasses.asdict(cell)) for name, cell in line.cells.items()
                },
                "mask": different.index(masks[line.case.name]) if line.case.name in masks else None,
            }
            for line in found
        ],
        "floors": [
            _test(one) for one in against_floors(comparison.cases, rows, comparison.measures)
        ],
        "between": [_test(one) for one in between(comparison.cases, rows, comparison.measures)],
        "samples": [dataclasses.asdict(sample) for sample in comparison.samples],
        "media": media,
        "masks": different,
        **size,
    }
    return _document(comparison, record, data, without, shown, papers)


def _document(
    comparison: Comparison,
    record: Mapping[str, Any],
    data: Mapping[str, Any],
    without: Mapping[str, str],
    shown: int,
    papers: Sequence[Mapping[str, str]],
) -> str:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    own = files(__package__)
    device, versions = record.get("device", {}), record.get("versions", {})
    settings = record.get("settings", {})
    total = len(comparison.samples)
    about = (
        f"{settings.get('model')}, {settings.get('steps') or 'as many as usual'} steps,"
        f" {_number(len(comparison.prompts), 'prompt')} x"
        f" {_number(len(comparison.seeds), 'seed')}, on"
        f" {device.get('name', device.get('type', ''))}; diffattn {versions.get('diffattn')}, torch"
        f" {versions.get('torch')}, diffusers {versions.get('diffusers')}"
    )
    by_reason: dict[str, list[str]] = {}
    for name, reason in without.items():
        by_reason.setdefault(reason, []).append(BY_NAME[name].title)
    notes = [f"{', '.join(titles)}: {reason}." for reason, titles in by_reason.items()]
    videos = "pictures" if data["picture"] else "videos"
    if shown < total:
        notes.append(
            f"The {videos} of {shown} of {total} samples are in this page, those of the others in"
            f" the folder “samples” beside it."
        )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Without an icon of its own, a browser asks for one.
        '<link rel="icon" href="data:,">',
        f"<title>{html.escape(comparison.title)}</title>",
        f"<style>{(own / 'page.css').read_text('utf-8')}</style></head><body>",
        f'<h1>{html.escape(comparison.title)}</h1><p class="soft">{html.escape(about)}</p>',
        '<div class="bar" id="groups"></div>',
        "<h2>Table</h2>",
        "<p>Means over the samples, with their standard deviations; “equal” is a frame for frame"
        f" equal result. The shaded rows are floors: the dense model in another precision, and by"
        f" another kernel{_flex_words(comparison)}. A difference below a floor says nothing. A"
        f" click on a title sorts; the boxes choose the videos below.</p>",
        '<div class="scroll"><table id="table"></table></div>',
        *(f'<p class="soft">{html.escape(note)}</p>' for note in notes),
        "<h2>Quality over cost</h2>",
        '<div class="bar"><label>Quality: <select id="quality"></select></label>'
        f'<span class="soft">{html.escape(_COSTS)}</span></div>',
        '<div class="plots" id="plots"></div><div class="bar soft" id="legend"></div>',
        f"<h2>{videos.capitalize()}</h2>",
        '<div class="bar"><label>Sample: <select id="sample"></select></label></div>',
        '<div class="bar" id="videobar"><button id="play" data-playing="no">Play</button>'
        '<button id="back" aria-label="frame back">&#8722;1</button>'
        '<button id="forth" aria-label="frame forth">+1</button>'
        '<input id="scrub" type="range" min="0" value="0" aria-label="frame">'
        '<span id="frame" class="soft"></span><label>Speed: <select id="rate">'
        '<option value="0.25">1/4</option><option value="0.5">1/2</option>'
        '<option value="1" selected>1</option></select></label></div>',
        '<div class="grid" id="media"></div>',
        "<h2>Masks</h2>",
        "<p>What a method computes: queries from top to bottom, keys from left to right. Masks that"
        " do not depend on the content are in the order of the tokens; of others, the blocks of the"
        " last call of the first sample are in the method's own order.</p>",
        '<div class="grid" id="masks"></div>',
        "<h2>Paired tests</h2>",
        '<div class="bar"><label>Measure: <select id="tested"></select></label></div>',
        "<p>Each case against each floor, on the same samples. Corrected: by Holm's method, for the"
        " number of cases.</p>",
        '<div class="scroll"><table id="floors"></table></div>',
        "<p>Cases against each other, corrected for the number of pairs.</p>",
        '<div class="scroll"><table id="between"></table></div>',
        *_papers(papers),
        "<h2>Settings</h2>",
        f"<details><summary>Everything that was set, and the versions</summary><pre>"
        f"{html.escape(json.dumps(record, indent=1, ensure_ascii=False))}</pre></details>",
        f'<script type="application/json" id="data">{text}</script>',
        f"<script>{(own / 'page.js').read_text('utf-8')}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _flex_words(comparison: Comparison) -> str:
    if not any(case.flex_of for case in comparison.cases):
        return ""
    return (
        "; and methods whose mask torch's FlexAttention computes, compared not with the dense model"
        " but with the same method by the kernels of this package"
    )


def _papers(papers: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A table of figures that papers report."""
    if not papers:
        return
    yield "<h2>What the papers report</h2>"
    yield (
        "<p>Of large models on GPUs, as the papers print them; in the last column what this study"
        " measured on its own model. The sizes differ, so that only the order can be compared.</p>"
    )
    yield '<div class="scroll"><table id="papers"><thead><tr>'
    yield "".join(f"<th>{html.escape(name)}</th>" for name in papers[0])
    yield "</tr></thead><tbody>"
    for row in papers:
        yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row.values())}</tr>"
    yield "</tbody></table></div>"


def _column(column: Column) -> dict[str, Any]:
    return {**dataclasses.asdict(column), "is_measure": column.name in BY_NAME}


def _kind(case: Case) -> str:
    if case.name == DENSE:
        return "dense"
    return "floor" if case.is_floor else "case"


def _test(one: Compared) -> dict[str, Any]:
    apart = {k: v for k, v in dataclasses.asdict(one).items() if k != "test"}
    values = {**dataclasses.asdict(one.test), **apart}
    # A study has thousands of tests.
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON has them, which knows no infinity."""
    return {k: "inf" if v == math.inf else v for k, v in values.items()}


def _media(
    comparison: Comparison, folder: Folder, rows: Sequence[Row], room: int
) -> tuple[dict[str, dict[str, Any]], int]:
    """The videos by sample and case, and the number of samples that have any in the page."""
    found: dict[str, dict[str, Any]] = {}
    for sample in comparison.samples:
        own = {row.case: row for row in rows if row.sample == sample.key}
        paths = {name: folder.path / row.file for name, row in own.items()}
        size = sum(path.stat().st_size for path in paths.values() if path.is_file())
        if found and size * 4 / 3 > room:
            break
        room -= size * 4 // 3
        uris = {name: _uri(path) for name, path in paths.items()}
        videos = {
            name: {"uri": uri, "words": _words(own[name])} for name, uri in uris.items() if uri
        }
        if videos:
            found[str(sample.number)] = videos
    return found, len(found)


def _words(row: Row) -> str:
    ratio = row.number("psnr")
    parts = [] if ratio is None else ["equal frames" if math.isinf(ratio) else f"{ratio:.1f} dB"]
    density = row.number("density")
    parts += [] if density in (None, 1.0) else [f"{density:.0%} of the pairs"]
    return ", ".join([*parts, f"{row.seconds:.1f} s"])


def _uri(path: Path) -> str | None:
    """A file as a data URI; None if there is none."""
    if not path.is_file():
        return None
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{_TYPES[path.suffix]};base64,{content}"


def _size(folder: Folder, samples: Sequence[Sample]) -> dict[str, Any]:
    """Frames, rate and size of the videos, from those of the dense model."""
    for sample in samples:
        path = folder.dense_frames(sample)
        if path.is_file():
            with np.load(path) as found:
                frames, height, width = found["frames"].shape[:3]
                fps = float(found["fps"]) if "fps" in found else None
            return {
                "frames": frames,
                "fps": fps or 1.0,
                "picture": fps is None,
                "large": min(height, width) >= _LARGE,
            }
    return {"frames": 1, "fps": 1.0, "picture": False, "large": False}
