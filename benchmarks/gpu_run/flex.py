"""torch's compiled FlexAttention under the same masks, beside this package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch._functorch.config
from torch.nn.attention.flex_attention import flex_attention

from diffattn.block_forms import to_block_mask
from gpu_run.masks import Mask
from gpu_run.rates import Attention, heads_first, masks_of, measure, ours
from gpu_run.setting import Setting
from gpu_run.shapes import BACKWARD, FORWARD

FLEX = "flex"


def run(what: str, setting: Setting) -> None:
    shape = setting.shape(what)
    masks = masks_of(shape, setting.compared, setting)
    attention = flex_attention if setting.dry else compiled()
    for direction in (FORWARD, BACKWARD):
        # In a dry run FlexAttention computes every token pair, and has no gradients on the CPU.
        flexes = [flex(mask, attention) for mask in masks]
        measure(shape, direction, [*map(ours, masks), *flexes], setting)


def flex(mask: Mask, attention: Callable[..., torch.Tensor]) -> Attention:
    block_mask = to_block_mask(mask.layout)
    return Attention(FLEX, mask, partial(attention, block_mask=block_mask), heads_first)


def compiled() -> Callable[..., torch.Tensor]:
    # From the second mask on, one compilation serves all masks of a shape: only the lengths of
    # tables differ. One graph or none: eager flex_attention would compute every token pair.
    torch._dynamo.config.recompile_limit = 64
    # The backward pass is run again and again after one forward pass.
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, fullgraph=True)
