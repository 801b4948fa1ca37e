"""The trained weights of SLA and of SLA2 at an attention site."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

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
        width = head_width(module, "sla")
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


# The share of softmax attention in the output before training; the paper does not give it.
_FIRST_ALPHA = 0.9


class SLA2Weights(SiteWeights):
    """The router of SLA2, and the shares of softmax attention in its output.

    Attributes:
        router_q, router_k: (head_dim, head_dim), the same for all heads: the weights of linear
            layers for the mean queries and the mean keys of blocks. Begin as the identity.
        alpha_logits: (heads, positions), the logits of alpha, the share of softmax attention, at
            even distances along the sequence; begin at an alpha of 0.9.
    """

    def __init__(self, module: Any, positions: int, trains_router: bool) -> None:
        """Make the weights for an attention module, on the module's device and in its dtype.

        Args:
            module: the attention module.
            positions: places of the sequence that have an alpha of their own.
            trains_router: whether a training trains the router.

        Raises:
            ValueError: if the module does not tell its heads and their channels.
        """
        super().__init__()
        heads, width = head_count(module, "sla2"), head_width(module, "sla2")
        self._trains_router = trains_router
        self.router_q = torch.nn.Parameter(torch.eye(width))
        self.router_k = torch.nn.Parameter(torch.eye(width))
        first = torch.logit(torch.tensor(_FIRST_ALPHA))
        self.alpha_logits = torch.nn.Parameter(first.repeat(heads, positions))
        self.place_beside(module)

    def trained(self) -> Iterable[torch.nn.Parameter]:
        # No gradient reaches the router through a hard selection.
        return self.parameters() if self._trains_router else [self.alpha_logits]

    def forward(
        self, of_queries: torch.Tensor, of_keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The router's mean queries and mean keys, and alpha.

        Args:
            of_queries: (batch, query blocks, heads, head_dim).
            of_keys: (batch, key blocks, heads, head_dim).

        Returns:
            Tensors in the shapes of `of_queries` and `of_keys`; and alpha of all heads of the site,
            (heads, query blocks).
        """
        if self.router_q.device != of_queries.device and not self.router_q.is_meta:
            # Offloading does not move weights made after its start.
            self.to(of_queries.device)
        logits = self.alpha_logits.to(of_queries.dtype)
        size = of_queries.shape[1]
        along = F.interpolate(logits[None], size=size, mode="linear", align_corners=True)[0]
        router_q, router_k = (x.to(of_queries.dtype) for x in (self.router_q, self.router_k))
        return F.linear(of_queries, router_q), F.linear(of_keys, router_k), along.sigmoid()


def head_width(module: Any, method: str) -> int:
    """The channels of a head of an attention module.

    Raises:
        ValueError: if the module does not tell; names the method that needs to know.
    """
    width = getattr(module, "head_dim", None)
    if isinstance(width, int):
        return width
    heads, channels = _named_heads(module), _channels(module)
    if heads is None or channels is None:
        raise ValueError(
            f"{method} cannot be attached to {type(module).__name__}, which does not tell how many"
            f" channels a head has: it needs head_dim, or heads and to_q"
        )
    return channels // heads


def head_count(module: Any, method: str) -> int:
    """The number of query heads of an attention module.

    Raises:
        ValueError: if the module does not tell; names the method that needs to know.
    """
    heads, channels, width = (
        _named_heads(module), _channels(module), getattr(module, "head_dim", None)
    )  # fmt: skip
    if heads is not None:
        return heads
    if channels is None or not isinstance(width, int):
        raise ValueError(
            f"{method} cannot be attached to {type(module).__name__}, which does not tell how many"
            f" heads it has: it needs heads, or head_dim and to_q"
        )
    return channels // width


def _named_heads(module: Any) -> int | None:
    counts = (getattr(module, name, None) for name in ("heads", "num_heads", "num_attention_heads"))
    return next((count for count in counts if isinstance(count, int)), None)


def _channels(module: Any) -> int | None:
    projections = (getattr(module, name, None) for name in ("to_q", "to_query"))
    widths = [getattr(projection, "out_features", None) for projection in projections]
    return next((width for width in widths if isinstance(width, int)), None)
