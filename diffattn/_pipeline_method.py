"""The method `set_attn_processor` of diffusers' pipelines, added without importing diffusers.

Importing diffusers takes seconds, too long for `diffattn --help`. So the method is added to a class
of pipelines when other code imports the class's module, or at once if it is imported already.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The modules of the classes that every pipeline is one of. Modular pipelines are not
# `DiffusionPipeline`s, and diffusers imports them on demand.
_CLASSES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}
_NAME = "set_attn_processor"


def add_pipeline_method() -> None:
    """Add `set_attn_processor` to diffusers' pipelines and modular pipelines.

    A class that has the method of its own is left as it is.
    """
    awaited = []
    for name in _CLASSES:
        module = sys.modules.get(name)
        if module is None:
            awaited.append(name)
        else:
            _add(module)
    if awaited and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(awaited))


def set_attn_processor(self: Any, processor: Any) -> Any:
    """Attend by a method of diffattn; see `diffattn.set_attn_processor`."""
    from diffattn.attach.attachment import set_attn_processor

    return set_attn_processor(self, processor)


def _add(module: ModuleType) -> None:
    cls = getattr(module, _CLASSES[module.__name__])
    if not hasattr(cls, _NAME):
        setattr(cls, _NAME, set_attn_processor)


class _AfterImport(MetaPathFinder):
    """An import hook that adds the method as soon as a module of `awaited` is loaded."""

    def __init__(self, awaited: list[str]) -> None:
        self._awaited = awaited

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in self._awaited:
            return None
        self._awaited.remove(fullname)
        if not self._awaited:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add(module)

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec
