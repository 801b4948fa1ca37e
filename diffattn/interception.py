"""Function modes that change torch's attention change sparse attention in the same way.

diffusers' layer skip with attention scores, which perturbed-attention guidance uses, replaces
`scaled_dot_product_attention` by a mode of `torch.overrides`. Sparse attention does not call that
function by itself. So, while any mode is active, sparse attention is called through it: the modes
see a call of torch's function, and where they would call that function, sparse attention runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._device import DeviceContext

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_ARGUMENTS = ("query", "key", "value")


def modes_are_active() -> bool:
    """Whether function modes may change torch's attention at present; compiled code may ask.

    Code that is compiled is compiled anew where other modes are active.
    """
    modes = range(torch._C._len_torch_function_stack())
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in modes)


def through_modes(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """`attend(query, key, value)`, as the active function modes change torch's attention.

    Compiled code calls `attend` alone. Attached sites leave compiled code where `modes_are_active`.

    Args:
        attend: a function of three tensors (batch, tokens, heads, head_dim) that gives such a
            tensor.
        query, key, value: (batch, tokens, heads, head_dim).

    Raises:
        NotImplementedError: if a mode adds arguments to the call, such as a mask.
    """
    if torch.compiler.is_dynamo_compiling():
        return attend(query, key, value)
    modes = _get_current_function_mode_stack()
    if not modes:
        return attend(query, key, value)
    with _beneath(modes, _InPlaceOfTorchs(attend, modes)):
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
    return out.transpose(1, 2)


class _InPlaceOfTorchs(TorchFunctionMode):
    """A mode that computes `attend` where torch's attention is called."""

    def __init__(self, attend: Attend, others: list[TorchFunctionMode]) -> None:
        super().__init__()
        self._attend, self._others = attend, others

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs or {})
        added = [name for name in given if name not in _ARGUMENTS]
        if added or len(args) > len(_ARGUMENTS):
            names = ", ".join(type(mode).__name__ for mode in self._others)
            raise NotImplementedError(
                f"{names} gives scaled_dot_product_attention more arguments"
                f" ({', '.join(added) or 'by position'}), which sparse attention does not take:"
                f" leave the mode's layers dense, by a pattern of set_attn_processor"
            )
        tensors = (given[name].transpose(1, 2) for name in _ARGUMENTS)
        return self._attend(*tensors).transpose(1, 2)


@contextmanager
def _beneath(modes: list[TorchFunctionMode], mode: TorchFunctionMode) -> Iterator[None]:
    """Put a mode beneath the active modes while the block runs."""
    _replace_stack([mode, *modes])
    try:
        yield
    finally:
        _replace_stack(modes)


def _replace_stack(modes: list[TorchFunctionMode]) -> None:
    for _ in range(len(_get_current_function_mode_stack())):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
