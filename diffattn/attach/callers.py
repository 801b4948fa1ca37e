"""The pipeline that a denoiser is being called by.

Several pipelines may share one denoiser, each with a scheduler of its own. A denoiser is not told
which of them calls it, so the pipeline is looked for among the callers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from diffattn import _compat

# The frames of modules around a denoiser's, and of wrappers, are many fewer.
_DEPTH = 64


def calling_pipeline(model: torch.nn.Module) -> Any:
    """The pipeline, with a scheduler, in whose code a denoiser is called; None if there is none."""
    for frame in _callers():
        names = frame.f_code.co_varnames[: min(frame.f_code.co_argcount, 2)]
        # A pipeline is `self` in its own code, and `components` in the blocks of modular pipelines.
        for name in names:
            if name in ("self", "components"):
                found = frame.f_locals.get(name)
                if _has_component(found, model):
                    return found
    return None


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return
        # Reading the locals of a frame keeps them alive: code of torch has tensors and no pipeline.
        if not frame.f_globals.get("__name__", "").startswith("torch."):
            yield frame
        frame = frame.f_back


def _has_component(value: Any, model: torch.nn.Module) -> bool:
    """Whether an object is a pipeline with a scheduler and a denoiser, compiled or not."""
    if not _compat.is_pipeline(value) or getattr(value, "scheduler", None) is None:
        return False
    parts = vars(value).values()
    return any(part is model or getattr(part, "_orig_mod", None) is model for part in parts)
