"""The method `set_attn_processor` of diffusers' pipelines, added without importing diffusers.

Importing diffusers takes seconds, too long for `diffattn --help`. So the method is added when other
code imports diffusers' pipelines, or at once if they are imported already.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PIPELINES = "diffusers.pipelines.pipeline_utils"
_NAME = "set_attn_processor"


def add_pipeline_method() -> None:
    """Add `set_attn_processor` to `diffusers.DiffusionPipeline`, unless diffusers has one."""
    module = sys.modules.get(_PIPELINES)
    if module is not None:
        _add(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def set_attn_processor(self: Any, processor: Any) -> Any:
    """Attend by a method of diffattn; see `diffattn.set_attn_processor`."""
    from diffattn.attach.attachment import set_attn_processor

    return set_attn_processor(self, processor)


def _add(module: ModuleType) -> None:
    if not hasattr(module.DiffusionPipeline, _NAME):
        setattr(module.DiffusionPipeline, _NAME, set_attn_processor)


class _AfterImport(MetaPathFinder):
    """An import hook that adds the method to the pipelines' module as soon as it is loaded."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _PIPELINES:
            return None
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
