"""Calls of the kernels: exactly the chosen form runs, and no other form in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffattn.blocks import BlockLayout
from diffattn.kernels.block_sparse.backward import key_gradients, query_gradients
from diffattn.kernels.block_sparse.configs import fitted, tile_config
from diffattn.kernels.block_sparse.forward_pass import forward
from diffattn.kernels.common.row_sums import RowSums, row_sums
from diffattn.kernels.common.tile_tables import Choice
from diffattn.kernels.common.tuned import VARIANTS
from diffattn.kernels.gather.backward import backward as gather_backward
from diffattn.kernels.gather.configs import tile_config as gather_tile_config
from diffattn.kernels.gather.forward import forward as gather_forward


class NotTakenError(Exception):
    """A form of a kernel does not take a call; the message names the form."""


@dataclass(frozen=True)
class Call:
    """An attention call over a layout.

    Attributes:
        q, k, v: `(batch, tokens, heads, head_dim)`.
        key_mask: bool `(batch, tokens)`, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: BlockLayout
    key_mask: torch.Tensor | None = None

    def forward(self, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp.

        Raises:
            NotTakenError: if the choice does not take the call.
        """
        arguments = (self.q, self.k, self.v, self.layout.tensors, self.key_mask)
        with _refusals():
            return forward(*arguments, **self.options, choice=self.fitted("forward", choice))

    @property
    def options(self) -> dict[str, Any]:
        return {
            "block_q": self.layout.block_q,
            "block_kv": self.layout.block_kv,
            "scale": self.q.shape[-1] ** -0.5,
        }

    def fitted(self, kernel: str, choice: Choice) -> Choice:
        """A choice with tiles no larger than the blocks."""
        tiles = fitted(kernel, choice.tiles, self.layout.block_q, self.layout.block_kv)
        return Choice(choice.variant, tiles)


@dataclass(frozen=True)
class Gradients:
    """The backward pass of a call, kernel by kernel.

    Attributes:
        sums: the row sums of the output and its gradient.
    """

    call: Call
    grad: torch.Tensor
    sums: RowSums

    @staticmethod
    def of(call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Gradients:
        """The backward pass of a call whose forward pass returned `out` and `lse`."""
        sums = row_sums(out, grad, lse, None, block_q=call.layout.block_q, wide=False)
        return Gradients(call, grad, sums)

    def queries(self, choice: Choice) -> torch.Tensor:
        """dQ.

        Raises:
            NotTakenError: if the choice does not take the call.
        """
        with _refusals():
            return query_gradients(
                *self._arguments, **self.call.options, choice=self.call.fitted("queries", choice)
            )

    def keys(self, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        """dK and dV.

        Raises:
            NotTakenError: if the choice does not take the call.
        """
        with _refusals():
            return key_gradients(
                *self._arguments, **self.call.options, choice=self.call.fitted("keys", choice)
            )

    @property
    def _arguments(self) -> tuple[Any, ...]:
        call = self.call
        layout = call.layout.tensors
        return call.q, call.k, call.v, self.grad, self.sums, layout, call.key_mask


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "does not take this call" in str(error):
            raise NotTakenError(str(error)) from error
        raise


def shipped(kernel: str, head_dim: int) -> Choice:
    """The choice that runs on the current device where nothing was tuned, for 16-bit inputs."""
    if kernel.startswith("gather_"):
        return Choice("plain", gather_tile_config(kernel, head_dim, torch.bfloat16, masked=False))
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    variant = VARIANTS[kernel][-1] if is_hopper else "plain"
    return Choice(variant, tile_config(kernel, variant, head_dim, torch.bfloat16, masked=False))


@dataclass(frozen=True)
class Gather:
    """An attention call over selected key blocks.

    Attributes:
        starts, bits: as `diffattn.kernels.gather.selected_attention` takes them.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    starts: torch.Tensor
    bits: torch.Tensor

    def forward(self, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp."""
        return gather_forward(
            self.q, self.k, self.v, self.starts, self.bits, None,
            scale=self.q.shape[-1] ** -0.5, choice=choice,
        )  # fmt: skip

    def gradients(
        self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, kernel: str, choice: Choice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dQ, dK and dV, with the chosen tiles of "gather_queries" or "gather_keys"."""
        only = {kernel.removeprefix("gather_"): choice}
        return gather_backward(
            grad, None, self.q, self.k, self.v, out, lse, self.starts, self.bits, None,
            scale=self.q.shape[-1] ** -0.5, queries=only.get("queries"), keys=only.get("keys"),
        )  # fmt: skip
