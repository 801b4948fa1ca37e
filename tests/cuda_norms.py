"""The norms of CUDA's autocast, on the CPU.

CUDA's autocast computes norms in float32, the CPU's does not. With these norms, queries and keys
come in float32 and values in the dtype of the region, as on a GPU.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class CudaNorms(TorchFunctionMode):
    """Norms in float32, as CUDA's autocast has them."""

    NORMS = (F.layer_norm, F.rms_norm, F.group_norm, torch.rms_norm)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.NORMS:

            def wide(x: Any) -> Any:
                floating = isinstance(x, torch.Tensor) and x.is_floating_point()
                return x.float() if floating else x

            with torch.autocast("cpu", enabled=False):
                return func(*map(wide, args), **{name: wide(x) for name, x in kwargs.items()})
        return func(*args, **kwargs)
