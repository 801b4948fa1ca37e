"""Attention sites: the modules of a denoiser that do video self-attention, and their processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffattn.models import Family


@dataclass(frozen=True)
class AttachedSite:
    """An attention module that a method is attached to.

    Attributes:
        module: the attention module.
        original: the module's processor from before attaching.
        processor: the processor that attaching has set.
        member: the backend of the site's group.
        weights: name of the submodule that the method has added; None if it has added none.
    """

    module: torch.nn.Module
    original: Any
    processor: Any
    member: Any
    weights: str | None


def site_names(model: torch.nn.Module, family: Family) -> list[str]:
    """Names of the modules of a denoiser that do video self-attention.

    Raises:
        ValueError: if the denoiser has no such module.
    """
    names = list(family.layers(model))
    if not names:
        raise ValueError(
            f"no attention site of {type(model).__name__} has a name like {family.sites.pattern}"
        )
    return names


def set_processor(module: torch.nn.Module, processor: Any) -> None:
    """Set the processor of an attention module, by its `set_processor` where it has one."""
    set_it: Any = getattr(module, "set_processor", None)
    if set_it is None:
        module.processor = processor
    else:
        set_it(processor)
