"""What `diffattn methods` and `diffattn models` print, and README's list of models.

Importing the methods takes seconds, since they import torch. So the tables of this package are kept
in `catalogue.json`, which `python -m diffattn.pipelines.cli.listing` writes, together with README's
list. Tests compare both with the methods and the families themselves. Where methods of other
packages may be, the methods are imported.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

# As `diffattn.methods.registry.GROUP`, whose module imports torch.
_PLUGINS = "diffattn.methods"
_WIDTH = 100  # of a table
_CATALOGUE = Path(__file__).parent / "catalogue.json"
_README = Path(__file__).resolve().parents[2] / "README.md"  # of a checkout
_README_BEGIN = "<!-- models: written by python -m diffattn.pipelines.cli.listing -->"
_README_END = "<!-- end of models -->"


def method_names() -> list[str]:
    """The names of all methods."""
    return [method["type"] for method in _methods()]


def methods_as_json() -> str:
    """Every method with its parameters, as JSON."""
    return json.dumps(_methods(), indent=2)


def models_as_json() -> str:
    """Every model family, as JSON."""
    return json.dumps(_kept()["models"], indent=2)


def method_lines() -> Iterator[str]:
    """Describe every method: its paper, and its parameters with defaults.

    A plug-in that cannot be loaded is left out, with a warning.
    """
    for method in _methods():
        paper = "" if method["paper"] in method["title"] else f" ({method['paper']})"
        yield f"{method['type']}: {method['class']}, {method['title']}{paper}"
        width = max(len(item["name"]) for item in method["parameters"])
        for item in method["parameters"]:
            yield f"  {item['name']:{width}}  [{item['shown']}]  {item['help']}".rstrip()


def model_lines() -> Iterator[str]:
    """Yield the lines of a table of the families, each with more about it below its line.

    Below are the models, the sites, and the tokens of a sequence that are not the grid's.
    """
    families = _kept()["models"]
    head = ("family", "text", "tested on")
    rows = [head, *((f["name"], f["text"], f["tested"]) for f in families)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    yield lines[0]
    for family, line in zip(families, lines[1:], strict=True):
        yield line
        for paragraph in (
            f"{family['title']}: {', '.join(family['models'])}",
            f"sites {family['sites']}",
            f"beside the grid: {family['beside']}",
        ):
            yield from textwrap.wrap(
                paragraph,
                _WIDTH,
                initial_indent="    ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )


def readme_models(families: Sequence[Mapping[str, Any]]) -> str:
    """README's list of models, with the marks around it.

    Args:
        families: those of `catalogue`.
    """
    titles: dict[str, list[str]] = {"videos": [], "images, and for videos frame by frame": []}
    videos, images = titles.values()
    for family in families:
        (images if family["images"] else videos).append(family["title"])
    paragraphs = [f"For {kind}: {'; '.join(names)}." for kind, names in titles.items()]
    text = "\n\n".join(
        textwrap.fill(paragraph, _WIDTH, break_on_hyphens=False) for paragraph in paragraphs
    )
    return f"{_README_BEGIN}\n{text}\n{_README_END}"


def with_models(readme: str, families: Sequence[Mapping[str, Any]]) -> str:
    """The text of README with the list of models in the place of the former one."""
    before, _, rest = readme.partition(_README_BEGIN)
    _, _, after = rest.partition(_README_END)
    return before + readme_models(families) + after


def catalogue() -> dict[str, Any]:
    """The methods and the families of this package, read from themselves."""
    from diffattn.methods import METHODS
    from diffattn.models import FAMILIES

    return {
        "methods": [_described(method) for method in METHODS.values()],
        "models": [
            {
                "name": family.name,
                "title": family.title,
                "text": family.text or "apart",
                "beside": _beside(family.text, family.beside),
                "images": family.images,
                "tested": family.tested,
                "sites": _readable(family.sites.pattern),
                "models": list(family.model_classes),
            }
            for family in FAMILIES
        ],
    }


def _beside(text: str | None, others: str) -> str:
    """What becomes of the tokens of a sequence that are not the grid's."""
    parts = [] if text is None else [f"text {text} it, dense"]
    return "; ".join([*parts, others] if others else parts) or "none"


def _methods() -> list[dict[str, Any]]:
    # A program that has imported the methods may have registered more.
    imported = "diffattn.methods.registry" in sys.modules
    if not imported and not entry_points(group=_PLUGINS):
        return list(_kept()["methods"])
    from diffattn.methods import all_methods

    return [_described(method) for method in all_methods().values()]


@cache
def _kept() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_CATALOGUE.read_text("utf-8"))
    return content


def _described(method: Any) -> dict[str, Any]:
    """A method's class in JSON types."""
    items = [item for item in dataclasses.fields(method) if item.init and item.name != "by_step"]
    # Parameters that all methods share come last.
    items.sort(key=lambda item: item.name not in method.__annotations__)
    return {
        "type": method.type,
        "class": method.__name__,
        "title": (inspect.getdoc(method) or "").partition("\n")[0].rstrip("."),
        "paper": method.paper,
        "parameters": [
            {
                "name": item.name,
                "default": _default(item),
                "shown": "by model" if _default(item) is None else str(_default(item)),
                "help": item.metadata.get("help", ""),
            }
            for item in items
        ],
    }


def _default(item: Any) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def _readable(pattern: str) -> str:
    """A pattern of module names in the form that people write, with `*` for a number."""
    for regular, plain in ((r"(?P<layer>\d+)", "*"), ("?P<layer>", ""), (r"\d+", "*"), ("?:", "")):
        pattern = pattern.replace(regular, plain)
    return pattern.replace("\\", "")


if __name__ == "__main__":
    found = catalogue()
    _CATALOGUE.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    if _README.is_file():
        _README.write_text(with_models(_README.read_text("utf-8"), found["models"]), "utf-8")
