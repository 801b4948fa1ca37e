"""Attention's share of the time of a dense model, which bounds what a sparse method can gain."""

from __future__ import annotations

from typing import Protocol

# TFLOP/s of an H200 in bfloat16, measured: large matrix products, and cuDNN's dense attention. Only
# their ratio counts here: attention's share of the time is larger than its share of the FLOPs.
LINEAR_RATE, ATTENTION_RATE = 790, 690
# FLOPs of a transformer block outside self-attention, per token and channel squared: projections
# and a feed-forward of four times the channels.
_LINEAR_WORK = 24


class ModelFigures(Protocol):
    """The figures of a model that attention's share depends on, as `planning.ModelShape` has them.

    Attributes:
        heads, head_dim: number of self-attention heads, and their dimension.
        block_of_site: index of the transformer block that each attention site lies in.
    """

    @property
    def heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def block_of_site(self) -> tuple[int, ...]: ...

    def linear_flops(self, tokens: int) -> int | None:
        """FLOPs of one forward outside self-attention; None where they are not known."""


def share_in(figures: ModelFigures, tokens: int) -> float:
    """Attention's share of the time of a dense forward over `tokens` tokens.

    Where the model's work outside self-attention is not known, blocks with a feed-forward of four
    times the channels are assumed.
    """
    channels = figures.heads * figures.head_dim
    linear = figures.linear_flops(tokens)
    if linear is None:
        linear = _LINEAR_WORK * tokens * channels**2 * len(set(figures.block_of_site))
    return attention_share(4 * tokens**2 * channels * len(figures.block_of_site), linear)


def attention_share(attention_flops: float, linear_flops: float) -> float:
    """Attention's share of the time of a dense forward, at the rates of an H200.

    Args:
        attention_flops: FLOPs of the self-attention of all layers.
        linear_flops: FLOPs of everything else.
    """
    attention = attention_flops / ATTENTION_RATE
    return attention / (attention + linear_flops / LINEAR_RATE)
