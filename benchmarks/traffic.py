"""Counts what torch's operations do: bytes they move, operations, and bytes alive.

The counts need no values: tensors of the device "meta" have shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
# Read as many entries of their first tensor as they write.
_PICKING = (aten.gather, aten.index_select, aten.index)
# Move nothing: memory without values, and a view that does not call itself one.
_NOTHING = (
    aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided,
    aten._unsafe_view,
)  # fmt: skip


class Traffic(TorchDispatchMode):
    """Bytes and operations of everything that runs inside, one torch operation after another.

    Attributes:
        bytes: every operation reads its tensors and writes its results once, as eager torch does.
            Sorts, which pass over their numbers several times, count as one pass.
        flops: of matrix products.
        others: one for each number of the largest tensor of every other operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.others = 0
        self._products = FlopCounterMode(display=False)

    def __enter__(self) -> Traffic:
        self._products.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._products.__exit__(*error)

    @property
    def flops(self) -> int:
        total: int = self._products.get_total_flops()
        return total

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if _is_view(func) or packet in _NOTHING:
            return out
        read = [_size(x) for x in _tensors((args, kwargs))]
        written = [_size(x) for x in _tensors(out)]
        if packet in _PICKING:
            read[0] = min(read[0], sum(written))
        self.bytes += sum(read) + sum(written)
        if packet not in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            self.others += max((x.numel() for x in _tensors((args, kwargs, out))), default=0)
        return out


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside take at a time.

    Attributes:
        peak: in bytes, above what was alive at the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._before: set[int] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        for x in _tensors((args, kwargs)):
            reference = StorageWeakRef(x.untyped_storage())
            if reference.cdata not in self._alive:
                self._before.add(reference.cdata)
        out = func(*args, **(kwargs or {}))
        self._alive = {n: kept for n, kept in self._alive.items() if not kept[0].expired()}
        for x in _tensors(out):
            storage = x.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self._alive and reference.cdata not in self._before:
                self._alive[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


class NoWaiting(TorchDispatchMode):
    """Raises where a tensor of the device "meta" meets the CPU.

    On a GPU each of these waits for the device: numbers read, tensors copied to the CPU, tensors
    copied from the CPU. Results whose shape depends on values raise by themselves on "meta".
    """

    def __init__(self) -> None:
        super().__init__()
        self._copies = _NoLists()

    def __enter__(self) -> NoWaiting:
        self._copies.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in _tensors((args, kwargs, out)) if x.dim()}
        if len(devices) > 1:
            raise WaitingError(f"{func} has tensors on {' and '.join(sorted(devices))}")
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default):
            raise WaitingError(f"{func} reads a number of a tensor")
        return out


class _NoLists(TorchFunctionMode):
    """Raises where a tensor of the device "meta" is made of Python's numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.is_meta:
            raise WaitingError(f"{func.__name__} copies numbers to a device")
        return out


class WaitingError(RuntimeError):
    """A call that would wait for the device."""


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, torch.Tensor))


def _size(x: torch.Tensor) -> int:
    """Bytes of a tensor; an expanded one has those of its memory."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _is_view(func: Any) -> bool:
    results = func._schema.returns
    return bool(results) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in results
    )
