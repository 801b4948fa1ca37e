"""The diffusion model of the moving-shapes pipeline, and the parts that only training needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from .paths import PathGuide
from .text import TEXT_DIM
from .vae import LATENT_CHANNELS


@dataclass(frozen=True)
class ModelSize:
    """Size of the WanTransformer3DModel."""

    heads: int = 2
    head_dim: int = 64
    layers: int = 4
    ffn_dim: int = 384


def make_transformer(size: ModelSize) -> WanTransformer3DModel:
    """Build an untrained transformer that starts by predicting zero velocity."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=size.ffn_dim,
        num_layers=size.layers,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


class FrameRope(nn.Module):
    """Rotary positions of chosen frames, so that a few frames can stand for a whole clip.

    The module replaces `transformer.rope` while training. Its tables are those of `rope`, of which
    `frames`, (batch, frames), selects the rows along time for each clip.
    """

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope: Any = rope
        self.frames: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (batch, tokens, 1, head_dim) each."""
        assert self.frames is not None
        _, patch_height, patch_width = self.rope.patch_size
        height = hidden_states.shape[3] // patch_height
        width = hidden_states.shape[4] // patch_width
        return (
            self._table(self.rope.freqs_cos, self.frames, height, width),
            self._table(self.rope.freqs_sin, self.frames, height, width),
        )

    def _table(self, table: Tensor, frames: Tensor, height: int, width: int) -> Tensor:
        time, rows, columns = table.split(
            [self.rope.t_dim, self.rope.h_dim, self.rope.w_dim], dim=1
        )
        batch, count = frames.shape
        shape = (batch, count, height, width, -1)
        parts = [
            time[frames].view(batch, count, 1, 1, -1).expand(shape),
            rows[:height].view(1, 1, height, 1, -1).expand(shape),
            columns[:width].view(1, 1, 1, width, -1).expand(shape),
        ]
        return torch.cat(parts, dim=-1).reshape(batch, count * height * width, 1, -1)


class TrainingAttention:
    """Wan attention for training: cheaper on CPUs, and with merged text padding.

    On CPUs attention is written out, because a compiled softmax between two matrix products is more
    than twice as fast as the forward and backward of the fused CPU kernel.

    In cross-attention the last text position stands for many equal positions. The pipeline pads a
    prompt with zero vectors to `max_sequence_length`, by default 512, and the model attends to this
    padding. Equal keys can be merged exactly: n copies of a key weigh as much as a single key whose
    logit is raised by log n.
    """

    # diffusers reads both attributes.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, paths: PathGuide | None = None) -> None:
        self.text_bias: Tensor | None = None
        self.paths = paths

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention, or cross-attention to the text with the current bias."""
        is_cross = encoder_hidden_states is not None
        source = encoder_hidden_states if is_cross else hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(source)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(source).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        mixed = _attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            self.text_bias if is_cross else None,
            self.paths,
        )
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3))


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of (batch, tokens, heads, head_dim)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosines[..., 0::2], sines[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, paths: PathGuide | None
) -> Tensor:
    """Softmax attention on (batch, heads, tokens, head_dim)."""
    guided = paths is not None and paths.motion is not None
    if query.is_cuda and not guided:
        return F.scaled_dot_product_attention(query, key.to(query.dtype), value, attn_mask=bias)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    weights = torch.softmax(logits, dim=-1)
    if paths is not None and guided:
        paths.observe(weights)
    return weights @ value


# Blocks whose self-attention is guided along paths. The first block has not yet seen the text.
GUIDED_LAYERS = slice(1, 3)


class TrainingView:
    """A transformer that is called on chosen frames and merged padding.

    The view changes the transformer itself; `restore` makes it a stock model again.

    Attributes:
        paths: guidance of the attention along the path of motion.
    """

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        self._transformer = transformer
        self._stock_rope = transformer.rope
        self._stock_processors = [attn.processor for attn in _attentions(transformer)]
        self._rope = FrameRope(transformer.rope)
        self.paths = PathGuide()
        plain, guided = TrainingAttention(), TrainingAttention(self.paths)
        self._processors = (plain, guided)
        transformer.rope = self._rope
        for attn in _attentions(transformer):
            attn.processor = plain
        for block in transformer.blocks[GUIDED_LAYERS]:
            block.attn1.processor = guided
        self.forward = transformer.forward

    def restore(self) -> None:
        """Put the stock rotary table and processors back."""
        self._transformer.rope = self._stock_rope
        processors = zip(_attentions(self._transformer), self._stock_processors, strict=True)
        for attn, processor in processors:
            attn.processor = processor

    def velocity(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Tensor,
        frames: Tensor,
        padded_length: Tensor,
        motion: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity of chosen frames.

        Args:
            noisy: latents (batch, channels, frames, height, width).
            sigma: noise levels in [0, 1], (batch,).
            text: embeddings (batch, positions, dim), zero behind the sentence's end.
            frames: frame numbers (batch, frames).
            padded_length: the `max_sequence_length` to imitate, (batch,), above `positions`.
            motion: (batch, 2), the motion for `PathGuide.follow`; None for no guidance.
        """
        batch, positions, _ = text.shape
        text = torch.cat([text, text.new_zeros(batch, 1, text.shape[2])], dim=1)
        bias = torch.zeros(batch, 1, 1, positions + 1, device=text.device)
        bias[..., -1] = (padded_length - positions).float().log().view(-1, 1, 1)
        self._rope.frames = frames
        self.paths.follow(frames, motion, noisy.shape[-1] // 2)
        for processor in self._processors:
            processor.text_bias = bias
        return self.forward(noisy, sigma * 1000, text, return_dict=False)[0]


def _attentions(transformer: WanTransformer3DModel) -> list[Any]:
    return [attn for block in transformer.blocks for attn in (block.attn1, block.attn2)]


def draw_noise_levels(batch: int, shifts: Sequence[float], generator: torch.Generator) -> Tensor:
    """Draw noise levels in (0, 1), (batch,), from shifted logit-normal distributions.

    Neighbouring clips take the shifts in turn; a larger shift favours high noise.
    """
    normal = torch.randn(batch, generator=generator, device=generator.device)
    shift = torch.tensor(shifts, device=generator.device)[torch.arange(batch) % len(shifts)]
    return torch.sigmoid(normal + shift.log())
