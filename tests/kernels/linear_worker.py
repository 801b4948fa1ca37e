"""What test_linear_parallel runs in two processes: linear_worker.py FOLDER RANK.

Leaves in FOLDER/RANK.pt what came out for this process's part of the tokens.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from linear_oracle import rotations

from diffattn.kernels.linear import linear_attention

TOKENS = 29
# Where a sequence is cut. One leaves a process a single token, one keys of which none counts.
CUTS = (20, 14, 1, 25)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and what weighs the output, stacked; which keys count; how tokens are rotated."""
    generator = torch.Generator().manual_seed(3)
    qkvg = torch.randn(4, 2, TOKENS, 3, 8, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, TOKENS, generator=generator) < 0.6
    mask[1, 25:] = False
    torch.manual_seed(4)
    return qkvg, mask, rotations(TOKENS, 8)


def run(part: slice, masked: bool, group: object) -> list[torch.Tensor]:
    """Output, gradients and tangent for some of the tokens."""
    qkvg, mask, rotation = (x.clone() for x in inputs())
    q, k, v, along = (x[:, part] for x in qkvg)

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        return linear_attention(
            *qkv,
            key_mask=mask[:, part] if masked else None,
            rotation=rotation[:, part],
            chunk=6,
            group=group,
        )

    _, tangent = torch.func.jvp(attend, (q, k, v), (along, along, q))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, along), tangent]


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for cut in CUTS:
        part = slice(0, cut) if rank == 0 else slice(cut, TOKENS)
        for masked in (False, True):
            results[cut, masked] = run(part, masked, dist.group.WORLD)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
