"""A cache of data that kernels derive from layouts, kept as long as the layouts' tensors live."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .checks import LayoutTensors

Derived = TypeVar("Derived")


@dataclass(frozen=True)
class _Entry(Generic[Derived]):
    tensors: tuple[weakref.ref[torch.Tensor], ...]
    versions: tuple[int, ...]
    sizes: tuple[int, ...]
    derived: Derived


class LayoutCache(Generic[Derived]):
    """Data derived from a layout and some sizes, found by the identity of the layout's tensors.

    A layout has one entry, for the latest sizes. The cache keeps none of the layout's tensors
    alive: the derived data must not keep `full_index` alive either.
    """

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(
        self, layout: LayoutTensors, sizes: tuple[int, ...], derive: Callable[[], Derived]
    ) -> Derived:
        """The result of `derive` for a layout; derived again once its tensors were written to."""
        # Inference tensors count no versions: they are taken to be constant.
        versions = tuple(0 if t.is_inference() else t._version for t in layout)
        entry = self._entries.get(layout[1])
        if (
            entry is not None
            and entry.sizes == sizes
            and entry.versions == versions
            and all(ref() is t for ref, t in zip(entry.tensors, layout, strict=True))
        ):
            return entry.derived
        derived = derive()
        refs = tuple(map(weakref.ref, layout))
        self._entries[layout[1]] = _Entry(refs, versions, sizes, derived)
        return derived

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, full_index: torch.Tensor) -> bool:
        return full_index in self._entries
