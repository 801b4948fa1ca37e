"""The kernels as this program calls them: exactly the chosen form, and no other in its place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import torch

from diffattn.blocks import BlockLayout
from diffattn.kernels.block_sparse import forward as plain
from diffattn.kernels.block_sparse import hopper
from diffattn.kernels.block_sparse.backward import backward
from diffattn.kernels.block_sparse.configs import Choice, TileConfig, tile_config
from diffattn.kernels.block_sparse.launch import Problem
from diffattn.kernels.gather.backward import backward as gather_backward
from diffattn.kernels.gather.configs import tile_config as gather_tile_config
from diffattn.kernels.gather.forward import forward as gather_forward
from diffattn.kernels.gather.launch import Problem as GatherProblem

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class NotTakenError(Exception):
    """A form of a kernel does not take a call, or is not there; says why."""


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

    @property
    def options(self) -> dict[str, object]:
        return {
            "block_q": self.layout.block_q,
            "block_kv": self.layout.block_kv,
            "scale": self.q.shape[-1] ** -0.5,
        }

    def forward(self, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp."""
        run = {
            "plain": plain.forward,
            "tma": hopper.forward_tma,
            "tma_ws": hopper.forward_warp_specialized,
        }.get(choice.variant)
        if run is None:
            raise NotTakenError(f"no {choice.variant}")
        arguments = (self.q, self.k, self.v, self.layout.tensors, self.key_mask)
        if choice.variant == "tma_ws" and not hopper.warp_specialized_takes(
            *arguments, **self.options
        ):
            raise NotTakenError("tma_ws does not take this call")
        return run(*arguments, **self.options, config=self._fitted(choice.tiles))

    def _fitted(self, tiles: TileConfig) -> TileConfig:
        return replace(
            tiles,
            block_m=min(tiles.block_m, self.layout.block_q),
            block_n=min(tiles.block_n, self.layout.block_kv),
        )


@dataclass(frozen=True)
class Gradients:
    """The backward pass of a call, kernel by kernel."""

    call: Call
    grad: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor

    @staticmethod
    def of(call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Gradients:
        return Gradients(call, grad, out, lse)

    def queries(self, choice: Choice) -> torch.Tensor:
        """dQ."""
        return self._run("queries", choice)[0]

    def keys(self, choice: Choice) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """dQ where the form computes it on the way, dK and dV."""
        return None, *self._run("keys", choice)[1:]

    def _run(self, kernel: str, choice: Choice) -> tuple[torch.Tensor, ...]:
        if choice.variant != "plain":
            raise NotTakenError(f"no {choice.variant}")
        call, shipped = self.call, Problem.tiles

        def tiles(problem: Problem, name: str) -> TileConfig:
            return call._fitted(choice.tiles) if name == kernel else shipped(problem, name)

        with mock.patch.object(Problem, "tiles", tiles):
            return backward(
                self.grad, None, call.q, call.k, call.v, self.out, self.lse,
                call.layout.tensors, call.key_mask, **call.options,
            )  # fmt: skip


def shipped(kernel: str, head_dim: int) -> Choice:
    """What runs of a kernel where nothing was tuned, with blocks of 128 and 16-bit inputs."""
    if kernel.startswith("gather_"):
        name = kernel.removeprefix("gather_")
        return Choice("plain", gather_tile_config(name, head_dim, torch.bfloat16, masked=False))
    return Choice("plain", tile_config(kernel, head_dim, torch.bfloat16, 128, 128, masked=False))


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
            scale=self.q.shape[-1] ** -0.5, config=choice.tiles,
        )  # fmt: skip

    def gradients(
        self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, kernel: str, choice: Choice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dQ, dK and dV, with the chosen tiles of "gather_queries" or "gather_keys"."""
        name = kernel.removeprefix("gather_")
        shipped = GatherProblem.tiles

        def tiles(problem: GatherProblem, asked: str) -> TileConfig:
            return choice.tiles if asked == name else shipped(problem, asked)

        with mock.patch.object(GatherProblem, "tiles", tiles):
            return gather_backward(
                grad, None, self.q, self.k, self.v, out, lse, self.starts, self.bits, None,
                scale=self.q.shape[-1] ** -0.5,
            )  # fmt: skip
