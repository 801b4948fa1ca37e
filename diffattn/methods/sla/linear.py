"""Linear attention of query blocks to some of the key blocks, in matrix products of torch.

The state of a key block is the sum over its keys of phi(k) v^T, and the sum of phi(k). A query
block attends to the sum of the states of its key blocks. Sums of states are a matrix product, and
nothing is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from diffattn.kernels.autocast import without_autocast
from diffattn.selected.by_kernels import selection_kernels

# Features of queries and keys; none is negative.
FEATURES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
}


@without_autocast
def linear_over_all(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    features: str,
    eps: float,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear attention over all tokens; differentiable in query, key and value.

    Args:
        query, key, value, features, counted: arguments of `linear_over_blocks`.
        eps: added to the denominator, a sum over keys; above 0.

    Returns:
        (batch, tokens, heads, head_dim): in the dtype of `query` where `takes_kernels`, else in
        float32 at least.
    """
    if takes_kernels(query, key, value):
        from diffattn.kernels.linear import triton_passes as passes

        state, total = passes.collect(key, value, None, counted, features=features)
        out: torch.Tensor = passes.apply(query, state, total, eps, None, None, features=features)[0]
        return out
    every = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    return linear_over_blocks(
        query,
        key,
        value,
        every.expand(query.shape[0], query.shape[2], -1, -1),
        block_q=query.shape[1],
        block_kv=query.shape[1],
        features=features,
        eps=eps,
        counted=counted,
    )


def takes_kernels(*tensors: torch.Tensor) -> bool:
    """Whether the kernels of linear attention take the tensors: on a GPU, without gradients."""
    return all(selection_kernels(x) is not None for x in tensors) and tensors[0].shape[-1] <= 256


@without_autocast
def linear_over_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    *,
    block_q: int,
    block_kv: int,
    features: str,
    eps: float = 0.0,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear attention under a map of blocks; differentiable in query, key and value.

    Args:
        query, key, value: (batch, tokens, heads, head_dim), as many keys as queries.
        seen: bool (batch, heads, query blocks, key blocks): the key blocks of each query block.
        block_q, block_kv: tokens per block; the last block may be short.
        features: a name in `FEATURES`.
        eps: added to the denominator, a sum over keys.
        counted: bool (batch, tokens), False for keys that do not count.

    Returns:
        (batch, tokens, heads, head_dim), in float32 at least; 0 where the denominator is 0.
    """
    phi, tokens = FEATURES[features], query.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    if counted is not None:
        # A NaN in padding must reach neither a sum nor a gradient.
        key, value = (x.masked_fill(~counted[:, :, None, None], 0) for x in (key, value))
    of_keys = phi(key.to(dtype))
    if counted is not None:
        of_keys = of_keys.masked_fill(~counted[:, :, None, None], 0)
    # A channel of ones in the values gives the denominator.
    ones = F.pad(value.to(dtype), (0, 1), value=1)
    of_keys, ones = (_in_blocks(x, block_kv) for x in (of_keys, ones))
    states = torch.einsum("bnthd,bnthe->bhnde", of_keys, ones)
    sums = (seen.to(dtype) @ states.flatten(3)).unflatten(3, states.shape[3:])
    of_queries = _in_blocks(phi(query.to(dtype)), block_q)
    both = torch.einsum("bmthd,bhmde->bmthe", of_queries, sums).flatten(1, 2)[:, :tokens]
    numerator, denominator = both[..., :-1], both[..., -1:] + eps
    there = denominator > 0
    return torch.where(there, numerator / denominator.where(there, 1), 0)


def _in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """The tokens of `x`, (batch, tokens, ...), in blocks: (batch, blocks, block, ...)."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block))
