"""Twins of the attention processors of diffusers that cannot be given a backend.

Most of these call PyTorch's attention themselves.

A twin computes the same result as the processor in its name, and ends in diffusers' attention
dispatch, which accepts a backend. Queries, keys and values are (batch, tokens, heads, head_dim).
`Attention.forward` passes a processor the keyword arguments that the processor's signature names:
twins therefore have the signatures of diffusers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb, apply_rotary_emb_allegro

from diffattn import _compat
from diffattn.models.picture_twins import (
    AuraFlowTwin,
    CogView4Twin,
    HiDreamTwin,
    HunyuanDiTTwin,
    Lumina2Twin,
    LuminaTwin,
)
from diffattn.models.qwen_twin import QwenImage21Twin
from diffattn.models.twin import (
    Twin,
    bias,
    heads,
    joint_heads,
    normalised,
    project_out,
    rotated,
    rotated_after,
)


class AttentionTwin(Twin):
    """AttnProcessor2_0 inside a transformer block (the U-Nets)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._attention(attn, hidden_states, encoder_hidden_states, attention_mask, None)

    def _attention(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary: Any,
    ) -> torch.Tensor:
        if context is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = heads(attn, "to_q to_k to_v", hidden_states, context, context)
        query, key = normalised(attn.norm_q, query), normalised(attn.norm_k, key)
        if rotary is not None and not attn.is_cross_attention:
            query, key = (
                apply_rotary_emb_allegro(x.transpose(1, 2), *rotary).transpose(1, 2)
                for x in (query, key)
            )
        mask = bias(attn, attention_mask, key)
        hidden_states = project_out(attn, self._attend(query, key, value, mask))
        return hidden_states / attn.rescale_output_factor


class AllegroTwin(AttentionTwin):
    """AllegroAttnProcessor2_0."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        return self._attention(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )


class CogVideoXTwin(Twin):
    """CogVideoXAttnProcessor2_0: text before video, through the same projections."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = heads(attn, "to_q to_k to_v", tokens, tokens, tokens)
        query, key = normalised(attn.norm_q, query), normalised(attn.norm_k, key)
        query, key = (rotated_after(text, x, image_rotary_emb) for x in (query, key))
        out = self._attend(query, key, value, bias(attn, attention_mask, key))
        out = project_out(attn, out)
        return out[:, text:], out[:, :text]


class CosmosTwin(Twin):
    """CosmosAttnProcessor2_0: calls diffusers' dispatch, but without a backend."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = heads(attn, "to_q to_k to_v", hidden_states, context, context)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                apply_rotary_emb(x, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1)
                for x in (query, key)
            )
        return project_out(attn, self._attend(query, key, value, attention_mask))


class EasyAnimateTwin(Twin):
    """EasyAnimateAttnProcessor2_0: text before video, through other or the same projections."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = encoder_hidden_states.shape[1]
        if attn.add_q_proj is None:
            tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            queries, keys, values = joint_heads(attn, tokens, None)
        else:
            queries, keys, values = joint_heads(attn, hidden_states, encoder_hidden_states)
        query, key, value = (torch.cat(parts[::-1], dim=1) for parts in (queries, keys, values))
        query, key = (rotated_after(text, x, image_rotary_emb) for x in (query, key))
        out = self._attend(query, key, value, attention_mask)
        text_out = out[:, :text]
        if attn.to_add_out is not None:
            text_out = attn.to_add_out(text_out)
        return project_out(attn, out[:, text:]), text_out


class JointTwin(Twin):
    """JointAttnProcessor2_0 (Stable Diffusion 3): text after the image, if there is text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        query, key, value = joint_heads(attn, hidden_states, encoder_hidden_states)
        if encoder_hidden_states is None:
            return project_out(attn, self._attend(query[0], key[0], value[0]))
        image = hidden_states.shape[1]
        joint = [torch.cat(parts, dim=1) for parts in (query, key, value)]
        out = self._attend(joint[0], joint[1], joint[2])
        text_out = out[:, image:]
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return project_out(attn, out[:, :image]), text_out


class MochiTwin(Twin):
    """MochiAttnProcessor2_0: text after video, with a mask over keys for padded text.

    The original cuts the padding out of each sample, which waits for the device. Both give zeros
    for padded text.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = joint_heads(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            query[0], key[0] = (rotated(x, *image_rotary_emb) for x in (query[0], key[0]))
        video, valid = hidden_states.shape[1], attention_mask.bool()
        keys = torch.nn.functional.pad(valid, (video, 0), value=True)[:, None, None]
        joint = [torch.cat(parts, dim=1) for parts in (query, key, value)]
        out = self._attend(joint[0], joint[1], joint[2], keys)
        text_out = out[:, video:].masked_fill(~valid[..., None], 0)
        if hasattr(attn, "to_add_out"):
            text_out = attn.to_add_out(text_out)
        return project_out(attn, out[:, :video]), text_out


_TWINS: dict[str, type[Twin]] = {
    "AllegroAttnProcessor2_0": AllegroTwin,
    "AttnProcessor2_0": AttentionTwin,
    "AuraFlowAttnProcessor2_0": AuraFlowTwin,
    "CogVideoXAttnProcessor2_0": CogVideoXTwin,
    "CogView4AttnProcessor": CogView4Twin,
    "CosmosAttnProcessor2_0": CosmosTwin,
    "EasyAnimateAttnProcessor2_0": EasyAnimateTwin,
    "HiDreamAttnProcessor": HiDreamTwin,
    "HunyuanAttnProcessor2_0": HunyuanDiTTwin,
    "JointAttnProcessor2_0": JointTwin,
    "Lumina2AttnProcessor2_0": Lumina2Twin,
    "LuminaAttnProcessor2_0": LuminaTwin,
    "MochiAttnProcessor2_0": MochiTwin,
}

# Twins of processors that give only a part of their calls a backend.
_TWINS_IN_PART: dict[str, type[Twin]] = {
    "QwenImage21AttnProcessor": QwenImage21Twin,
    "QwenImage21FlexAttnProcessor": QwenImage21Twin,
}


def dispatching(site: str, processor: Any) -> Any:
    """A new processor with the result of `processor` that ends in diffusers' attention dispatch.

    Args:
        site: the name of the site, for messages.
        processor: the site's processor.

    Raises:
        ValueError: if there is no such processor; says what to do.
    """
    name = type(processor).__name__
    if name in _TWINS_IN_PART:
        twin = _TWINS_IN_PART[name]()
        _compat.share_parallelism(processor, twin)
        _compat.set_processor_backend(twin, _compat.processor_backend(processor))
        return twin
    if _compat.uses_dispatch(processor):
        return copy.copy(processor)
    if name in _TWINS:
        return _TWINS[name]()
    if name.startswith("Fused"):
        raise ValueError(
            f"{site} has a {name} since fuse_qkv_projections() was called: call"
            f" unfuse_qkv_projections() before attaching"
        )
    raise ValueError(
        f"{site} has a {name}, which does not call diffusers' attention dispatch; put the model's"
        f" own processor back before attaching"
    )
