"""Imports point one way, and no name of the package hides a module of it."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

# A folder, and the folders and packages of this project that it may import from.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "diffattn": {"kernels", "diffattn"},
    "lora": {"kernels", "diffattn", "lora"},
    "pipelines": {"kernels", "diffattn", "lora", "pipelines", "samples"},
    "samples": {"kernels", "diffattn", "lora", "pipelines", "samples"},
}
# Rooms of diffattn/ from the ground up: a room imports from those before it, and from itself.
ROOMS = (
    ("_checks", "_compat", "_locks", "distinct", "grid"),
    ("orders", "schedule", "spans", "curves"),
    ("blocks", "block_forms"),
    ("masks", "counting"),
    ("flex_backend", "interception"),
    ("operator",),
    ("selected", "models"),
    ("routing",),
    ("methods",),
    ("policy",),
    ("planning",),
    ("draw",),
    ("attach",),
    ("calibration", "site_errors", "tile_calibration", "testing"),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
# Shortcuts of the face of the package, and what only type checkers read.
LEAVES = ("__init__", "_pipeline_method")


def imported(path: Path, package: str) -> Iterator[str]:
    """The modules that a file imports, wherever in it; not what only type checkers read."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    parts = path.parent.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "diffattn" else ("diffattn", *parts))


def folder_of(module: str) -> str | None:
    """The top-level folder of a module of this project."""
    first, _, rest = module.partition(".")
    if first != "diffattn":
        return None
    return rest.partition(".")[0] if rest.partition(".")[0] in MAY_IMPORT else "diffattn"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_one_way(folder: str) -> None:
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        for module in imported(path, package_of(path)):
            target = folder_of(module)
            assert target in MAY_IMPORT[folder] | {None}, f"{path} imports {module}"


def test_rooms_import_one_way() -> None:
    for path in (ROOT / "diffattn").rglob("*.py"):
        room = path.relative_to(ROOT / "diffattn").with_suffix("").parts[0]
        if room in LEAVES:
            continue
        assert room in FLOOR, f"{path}: give the room a floor in ROOMS"
        for module in imported(path, package_of(path)):
            target = module.partition(".")[2].partition(".")[0]
            if module.startswith("diffattn.") and target in FLOOR:
                assert FLOOR[target] <= FLOOR[room], f"{path} imports {module}"


@pytest.mark.parametrize(
    "name", ["", ".attach", ".masks", ".planning", ".selected", ".pipelines.cli", ".kernels.cpu"]
)
def test_no_name_hides_a_module(name: str) -> None:
    package = importlib.import_module(f"diffattn{name}")
    for module in pkgutil.iter_modules(package.__path__):
        found = getattr(package, module.name, None)
        assert found is None or isinstance(found, ModuleType), module.name
