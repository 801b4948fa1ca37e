"""Twins of processors of models that make pictures alone, see `twins`."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

from diffattn.models.twin import (
    Twin,
    bias,
    heads,
    joint_heads,
    normalised,
    project_out,
    rotated_after,
)


class AuraFlowTwin(Twin):
    """AuraFlowAttnProcessor2_0: registers and text before the image, or all through one layer."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        queries, keys, values = joint_heads(attn, hidden_states, encoder_hidden_states)
        query, key, value = (torch.cat(parts[::-1], dim=1) for parts in (queries, keys, values))
        out = self._attend(query, key, value, scale=attn.scale)
        if encoder_hidden_states is None:
            return project_out(attn, out)
        text = encoder_hidden_states.shape[1]
        return project_out(attn, out[:, text:]), attn.to_add_out(out[:, :text])


class CogView4Twin(Twin):
    """CogView4AttnProcessor without its mask: text before the image, through one layer."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert attention_mask is None  # the family's grid refuses calls with a mask
        text, dtype = encoder_hidden_states.shape[1], encoder_hidden_states.dtype
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = heads(attn, "to_q to_k to_v", tokens, tokens, tokens)
        query, key = normalised(attn.norm_q, query), normalised(attn.norm_k, key)
        query, key = (
            rotated_after(text, x.to(dtype), image_rotary_emb, halves=True) for x in (query, key)
        )
        out = project_out(attn, self._attend(query, key, value))
        return out[:, text:], out[:, :text]


class HiDreamTwin(Twin):
    """HiDreamAttnProcessor: text after the image, or all of it through one layer.

    Padding of the image is not hidden. Its keys are 0.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        hidden_states_masks: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        query, key, value = self._projected(attn, hidden_states, "")
        if hidden_states_masks is not None:
            key = key * hidden_states_masks[..., None, None]
        if not attn.single:
            of_text = self._projected(attn, encoder_hidden_states, "_t")
            query, key, value = (
                torch.cat(parts, dim=1) for parts in zip((query, key, value), of_text, strict=True)
            )
        query, key = (_turned(x, image_rotary_emb) for x in (query, key))
        out = self._attend(query, key, value)
        if attn.single:
            return attn.to_out(out)
        image = hidden_states.shape[1]
        return attn.to_out(out[:, :image]), attn.to_out_t(out[:, image:])

    @staticmethod
    def _projected(attn: Any, x: Any, suffix: str) -> tuple[torch.Tensor, ...]:
        """Query, key and value; the first two are normalised over all heads."""
        query, key, value = (getattr(attn, f"to_{part}{suffix}")(x) for part in "qkv")
        query = getattr(attn, f"q_rms_norm{suffix}")(query).to(x.dtype)
        key = getattr(attn, f"k_rms_norm{suffix}")(key).to(x.dtype)
        return tuple(part.unflatten(2, (attn.heads, -1)) for part in (query, key, value))


class HunyuanDiTTwin(Twin):
    """HunyuanAttnProcessor2_0 (HunyuanDiT)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = heads(attn, "to_q to_k to_v", hidden_states, context, context)
        query, key = normalised(attn.norm_q, query), normalised(attn.norm_k, key)
        query = rotated_after(0, query, image_rotary_emb)
        if not attn.is_cross_attention:
            key = rotated_after(0, key, image_rotary_emb)
        out = project_out(attn, self._attend(query, key, value, bias(attn, attention_mask, key)))
        return out / attn.rescale_output_factor


class LuminaTwin(Twin):
    """LuminaAttnProcessor2_0 (Lumina-Next): the block adds a cross-attention before it projects."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: torch.Tensor | None = None,
        key_rotary_emb: torch.Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> torch.Tensor:
        query = normalised(attn.norm_q, attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = normalised(attn.norm_k, attn.to_k(encoder_hidden_states))
        value = attn.to_v(encoder_hidden_states)
        key, value = (x.unflatten(2, (-1, query.shape[-1])) for x in (key, value))
        query, key = (
            _turned_by_numbers(query_rotary_emb, query),
            _turned_by_numbers(key_rotary_emb, key),
        )
        scale = (
            None if key_rotary_emb is None else _scale(attn, hidden_states, base_sequence_length)
        )
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        key, value = (_for_each_head(attn, x).to(query.dtype) for x in (key, value))
        out = self._attend(query, key, value, mask, scale=scale)
        return out.unflatten(2, (attn.heads, -1))


class Lumina2Twin(Twin):
    """Lumina2AttnProcessor2_0: fewer heads of keys, and scores that may grow with the tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(2, (attn.heads, -1))
        key, value = (
            projection(encoder_hidden_states).unflatten(2, (-1, query.shape[-1]))
            for projection in (attn.to_k, attn.to_v)
        )
        query, key = normalised(attn.norm_q, query), normalised(attn.norm_k, key)
        query, key = (_turned_by_numbers(image_rotary_emb, x) for x in (query, key))
        key, value = (_for_each_head(attn, x).to(query.dtype) for x in (key, value))
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        scale = _scale(attn, hidden_states, base_sequence_length)
        return project_out(attn, self._attend(query, key, value, mask, scale=scale))


def _turned_by_numbers(numbers: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels of `x` times complex numbers, (1 or batch, tokens, head_dim / 2)."""
    return x if numbers is None else apply_rotary_emb(x, numbers, use_real=False)


def _for_each_head(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """Keys or values of fewer heads, repeated for the heads that share them."""
    return x.repeat_interleave(attn.heads // x.shape[2], dim=2)


def _scale(attn: Any, hidden_states: torch.Tensor, usual_tokens: int | None) -> float:
    """The factor of the scores, which grows with the number of tokens if `usual_tokens` is set."""
    if usual_tokens is None:
        return attn.scale
    return attn.scale * math.sqrt(math.log(hidden_states.shape[1], usual_tokens))


def _turned(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels of `x`, or of its first half, times matrices of 2 x 2.

    Args:
        x: (batch, tokens, heads, head_dim).
        matrices: (batch, tokens, 1, head_dim / 2 or head_dim / 4, 2, 2).
    """
    turning = matrices.shape[-3] * 2
    pairs = x[..., :turning].float().unflatten(-1, (-1, 1, 2))
    turned = matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]
    return torch.cat([turned.flatten(-2).to(x.dtype), x[..., turning:]], dim=-1)
