"""Compiles the forward-mode kernel for GPUs that need not be there, and prints what came out.

    python tests/kernels/compile_tangent.py [--arch 80 90 ...]

As compile_configurations.py does for the kernels of attention and its gradients.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from compile_configurations import HEADS, examine, main

from diffattn.blocks import EMPTY, FULL, PARTIAL, layout_from_states
from diffattn.kernels.block_sparse.tangent import tangent

BLOCK = 128
TOKENS = 300

# Head dimension, dtype, key mask: every entry of the table of tiles, without and with padding,
# except for the float32 ones that are known to spill.
ENTRIES = (
    *((head_dim, torch.bfloat16, False) for head_dim in (64, 128, 256)),
    *((head_dim, torch.float16, True) for head_dim in (48, 80, 192)),
    (64, torch.float32, False),
    (48, torch.float32, True),
)


def launch(head_dim: int, dtype: torch.dtype, has_key_mask: bool) -> object:
    states = torch.tensor([[FULL, PARTIAL, EMPTY]] * 3, dtype=torch.uint8)
    layout = layout_from_states(
        states,
        lambda row, column: torch.rand(row.numel(), BLOCK, BLOCK) < 0.5,
        tokens_q=TOKENS, tokens_kv=TOKENS, block_q=BLOCK, block_kv=BLOCK,
    )  # fmt: skip
    x = torch.zeros(1, TOKENS, HEADS, head_dim, dtype=dtype)
    lse = torch.zeros(1, HEADS, TOKENS)
    key_mask = torch.ones(1, TOKENS, dtype=torch.bool) if has_key_mask else None
    return tangent(
        (x, x, x), x, x, x, x, lse, layout.tensors, key_mask,
        block_q=BLOCK, block_kv=BLOCK, scale=0.1,
    )  # fmt: skip


def check(arch: int, everything: bool = False) -> tuple[int, list[str]]:
    """Compile everything for one architecture; how many kernels there were, and what is wrong."""
    return examine(
        arch,
        (
            (
                "tangent",
                f"d{entry[0]} {str(entry[1]).removeprefix('torch.')}{' key_mask' * entry[2]}",
                partial(launch, *entry),
            )
            for entry in ENTRIES
        ),
    )


if __name__ == "__main__":
    sys.exit(main(check))
