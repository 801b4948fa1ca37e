"""What twins of attention processors have in common, see `twins`.

Queries, keys and values are (batch, tokens, heads, head_dim).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

from diffattn import _compat


class Twin:
    """The attributes of a processor that diffusers' dispatch expects."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention over (batch, tokens, heads, head_dim), joined to (batch, tokens, channels)."""
        out = _compat.dispatch(
            query,
            key,
            value,
            backend=self._attention_backend,
            attn_mask=attn_mask,
            scale=scale,
            _parallel_config=self._parallel_config,
        )
        return out.flatten(2).to(query.dtype)


def heads(attn: Any, projections: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [
        getattr(attn, name)(x).unflatten(2, (attn.heads, -1))
        for name, x in zip(projections.split(), inputs, strict=True)
    ]


def joint_heads(
    attn: Any, hidden_states: torch.Tensor, text: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Queries, keys and values: of the video or image, then of the text if `text` is not None."""
    query, key, value = heads(attn, "to_q to_k to_v", *[hidden_states] * 3)
    queries, keys = [normalised(attn.norm_q, query)], [normalised(attn.norm_k, key)]
    values = [value]
    if text is not None:
        query, key, value = heads(attn, "add_q_proj add_k_proj add_v_proj", *[text] * 3)
        queries.append(normalised(attn.norm_added_q, query))
        keys.append(normalised(attn.norm_added_k, key))
        values.append(value)
    return queries, keys, values


def normalised(norm: torch.nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)


def bias(attn: Any, mask: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor | None:
    """The mask of diffusers' `Attention` as (batch, heads, 1 or queries, keys); None for None."""
    if mask is None:
        return None
    batch, tokens = key.shape[:2]
    mask = attn.prepare_attention_mask(mask, tokens, batch)
    return mask.view(batch, attn.heads, -1, tokens)


def rotated_after(text: int, x: torch.Tensor, rotary: Any, *, halves: bool = False) -> torch.Tensor:
    """Rotate the tokens after the first `text` tokens, if `rotary` is not None.

    Args:
        halves: whether channels of the first and the second half are turned by each other, instead
            of neighbouring channels.
    """
    if rotary is None:
        return x
    after = apply_rotary_emb(
        x[:, text:], rotary, use_real_unbind_dim=-2 if halves else -1, sequence_dim=1
    )
    return torch.cat([x[:, :text], after], dim=1)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channels; `cos` and `sin` are (tokens, heads, head_dim / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).float().unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def project_out(attn: Any, x: torch.Tensor) -> torch.Tensor:
    linear, dropout = attn.to_out
    return dropout(linear(x))
