"""The twin of Qwen-Image 2.1's attention processors, see `twins`.

Text and images to edit stand before the target and see what is before them alone. The stock
processors attend to them part by part, or by one mask, and take no backend for these calls. The
twin attends part by part, and its call for the target takes a backend.
"""

from __future__ import annotations

from typing import Any

import torch

from diffattn import _compat
from diffattn.models.twin import Twin, normalised


class QwenImage21Twin(Twin):
    """QwenImage21AttnProcessor and QwenImage21FlexAttnProcessor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: Any | None = None,
        rotary_emb: torch.Tensor | None = None,
        layer_cache: Any | None = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Tensor parallelism leaves each process some of the heads.
        head_dim = attn.inner_dim // attn.heads
        query, key, value = (
            project(hidden_states).unflatten(2, (-1, head_dim))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            _rotated(normalised(norm, x).to(value.dtype), rotary_emb)
            for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
        )
        if layer_cache is not None and kv_cache_mode == "extract" and cache_write_slice is not None:
            layer_cache.store(*(x[:, cache_write_slice].clone() for x in (key, value)))
        elif layer_cache is not None and kv_cache_mode == "cached":
            key, value = (
                torch.cat(pair, 1) for pair in zip(layer_cache.get(), (key, value), strict=True)
            )
        if segments is None:
            out = self._attend(query, key, value, attention_mask)
        else:
            outputs = [self._attend_prefix(query, key, value, part, key_valid) for part in segments]
            target = query[:, segments[-1][1] if segments else 0 :]
            mask = None if key_valid is None else key_valid[:, None, None, :]
            out = torch.cat([*outputs, self._attend(target, key, value, mask)], 1)
        return attn.to_out[1](attn.to_out[0](out.type_as(query)))

    def _attend_prefix(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        part: tuple[int, int, bool],
        key_valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the tokens from `start` to `end`; each text token sees none after itself."""
        start, end, is_text = part
        mask = None if key_valid is None else key_valid[:, None, None, :end]
        if is_text:
            place = torch.arange(end, device=query.device)
            earlier = (place <= place[start:, None])[None, None]
            mask = earlier if mask is None else earlier & mask
        out = _compat.dispatch(
            query[:, start:end],
            key[:, :end],
            value[:, :end],
            backend=None,
            attn_mask=mask,
            _parallel_config=self._parallel_config,
        )
        return out.flatten(2)


def _rotated(x: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """`x` (batch, tokens, heads, head_dim) turned by a complex table (tokens, head_dim / 2)."""
    if table is None:
        return x
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).type_as(x)
