"""The backend "flex": torch's compiled flex_attention under the `BlockMask` of a layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from diffattn.block_forms import to_block_mask
from diffattn.blocks import BlockLayout
from diffattn.kernels.transforms import is_forward_mode

FLEX_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLEX_VARIANTS = 64  # most shapes of layouts and tensors that one process compiles flex for


def flex_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    scale: float | None,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The `forward` of the backend "flex", see `diffattn.operator.Backend`.

    Raises:
        ValueError: for a dtype that flex_attention does not compute in.
        NotImplementedError: in forward mode, and on the CPU for gradients or a log-sum-exp.
        RuntimeError: if torch.compile is switched off.
    """
    if query.dtype not in FLEX_DTYPES:
        raise ValueError(
            f"backend 'flex' computes in {', '.join(map(str, FLEX_DTYPES))}, not {query.dtype}"
        )
    if is_forward_mode():
        raise NotImplementedError(
            "backend 'flex' has no forward-mode derivatives (torch.func.jvp, dual_level); leave the"
            " backend out, or pass backend='reference' to check results"
        )
    if query.device.type == "cpu":
        needs_grad = any(x.requires_grad for x in (query, key, value))
        for wanted, what in (
            (return_lse, "log-sum-exp"),
            (needs_grad and torch.is_grad_enabled(), "gradients"),
        ):
            if wanted:
                raise NotImplementedError(
                    f"backend 'flex' has no {what} on the CPU; leave the backend out, or pass"
                    f" backend='cpu'"
                )
        # flex_attention refuses tensors that require gradients, even where no gradient is recorded.
        query, key, value = query.detach(), key.detach(), value.detach()
    if key_mask is not None:
        block_mask = to_block_mask(layout, key_mask=key_mask)
    elif layout in _block_masks:
        block_mask = _block_masks[layout]
    else:
        block_mask = _block_masks[layout] = to_block_mask(layout)
    with torch._dynamo.config.patch(recompile_limit=FLEX_VARIANTS):
        out, lse = _compiled_flex()(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            block_mask,
            scale,
            return_lse,
        )
    return out.transpose(1, 2).contiguous(), lse


_block_masks: WeakKeyDictionary[BlockLayout, BlockMask] = WeakKeyDictionary()


@functools.cache
def _compiled_flex() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    # fullgraph: after a graph break, eager flex_attention would compute every token pair. Not
    # dynamic: Inductor's C++ for tables of varying shapes does not compile.
    return torch.compile(_flex, fullgraph=True, dynamic=False)


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    scale: float | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "backend 'flex' needs torch.compile, which is switched off here (TORCHDYNAMO_DISABLE or"
            " torch.compiler.set_stance); switch it on, or choose another backend"
        )
    out, aux = flex_attention(
        query,
        key,
        value,
        block_mask=block_mask,
        scale=scale,
        return_aux=AuxRequest(lse=return_lse),
    )
    return out, aux.lse
