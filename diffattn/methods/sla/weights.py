"""The trained layer of SLA at an attention site."""

from __future__ import annotations

from typing import Any

import torch

from diffattn.kernels.autocast import autocast_is_on
from diffattn.methods.base import SiteWeights


class SLAWeights(SiteWeights):
    """The layer that the output of linear attention passes through.

    Attributes:
        proj_l: from the channels of a head to as many, the same for all heads; begins as 0. The
            name is that of published checkpoints.
    """

    def __init__(self, module: Any) -> None:
        """Make the layer for an attention module, on the module's device and in its dtype.

        Raises:
            ValueError: if the module does not tell the channels of a head.
        """
        super().__init__()
        width = head_width(module)
        # Attaching a method must not change the random numbers that the user draws afterwards.
        with torch.random.fork_rng(devices=[]):
            self.proj_l = torch.nn.Linear(width, width)
        for parameter in self.proj_l.parameters():
            torch.nn.init.zeros_(parameter)
        self.place_beside(module)

    def project(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The layer's output for `x`.

        Args:
            x: (batch, tokens, heads, head_dim).
            dtype: the dtype of the call, in which a layer is computed that is kept in 8 bits.
        """
        weight = self.proj_l.weight
        if weight.device != x.device and not weight.is_meta:
            # Offloading does not move layers made after its start.
            self.proj_l.to(x.device)
        # An autocast region casts by itself.
        if not autocast_is_on(x.device.type):
            x = x.to(dtype if weight.dtype.itemsize == 1 else weight.dtype)
        out: torch.Tensor = self.proj_l(x)
        return out


def head_width(module: Any) -> int:
    """The channels of a head of an attention module.

    Raises:
        ValueError: if the module does not tell.
    """
    width = getattr(module, "head_dim", None)
    if isinstance(width, int):
        return width
    counts = (getattr(module, name, None) for name in ("heads", "num_heads", "num_attention_heads"))
    heads = next((count for count in counts if isinstance(count, int)), None)
    projections = (getattr(module, name, None) for name in ("to_q", "to_query"))
    widths = [getattr(projection, "out_features", None) for projection in projections]
    channels = next((width for width in widths if isinstance(width, int)), None)
    if heads is None or channels is None:
        raise ValueError(
            f"sla cannot be attached to {type(module).__name__}, which does not tell how many"
            f" channels a head has: it needs head_dim, or heads and to_q"
        )
    return channels // heads
