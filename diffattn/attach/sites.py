"""Attention sites: the modules of a denoiser that do video self-attention, and their processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffattn.models import Family


@dataclass(frozen=True)
class AttachedSite:
    """One attention module, the processor it had and the one it has now.

    `weights` is the name of the submodule that its method has added, if it has.
    """

    module: torch.nn.Module
    original: Any
    processor: Any
    member: Any
    weights: str | None


def site_names(model: torch.nn.Module, family: Family) -> list[str]:
    """Names of the modules of a denoiser that do video self-attention."""
    names = list(family.layers(model))
    if not names:
        raise ValueError(
            f"no attention site of {type(model).__name__} has a name like {family.sites.pattern}"
        )
    return names


def set_processor(module: torch.nn.Module, processor: Any) -> None:
    """Put a processor on an attention module, whether or not it has a method for that."""
    set_it: Any = getattr(module, "set_processor", None)
    if set_it is None:
        module.processor = processor
    else:
        set_it(processor)
