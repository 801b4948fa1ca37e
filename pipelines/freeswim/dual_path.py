"""FreeSwim's two paths through a denoiser: a window gives the details, all tokens the content.

A guided call has every sample twice. In the first half of the samples, tokens attend to FreeSwim's
window (arXiv 2511.14712); in the second half, to all tokens. Each block's cross-attention output of
the second half replaces that of the first half. The output can be stored, and then guides later
calls, which have the first half alone.

The blocks are the stock model's. Self-attention is attached as with every method. Cross-attention
gets a processor around its own, which computes no output that is replaced or stored already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

import torch

from diffattn import _compat
from diffattn._checks import check, choice
from diffattn.attach.attachment import set_attn_processor
from diffattn.attach.sites import set_processor, site_names
from diffattn.methods.base import Site
from diffattn.methods.freeswim import FreeSwimAttn
from diffattn.models import family_of

# The cross-attention output of the first path. own: its own, without a second path. override: that
# of the second path. store: the same, and stored. reuse: the stored output, without a second path.
Guidance: TypeAlias = Literal["own", "override", "store", "reuse"]
StorePlace: TypeAlias = Literal["device", "cpu", "pinned"]

STORE_PLACES: tuple[str, ...] = get_args(StorePlace)
_TWO_PATHS = ("override", "store")
_FAMILIES = ("wan", "ltx")


class DualPath:
    """A denoiser of the Wan or LTX family with FreeSwim attached, until `remove`.

    Attributes:
        store: the outputs of cross-attention in the last call with guidance "store".
    """

    def __init__(
        self, model: torch.nn.Module, method: FreeSwimAttn, place: StorePlace = "device"
    ) -> None:
        """Attach FreeSwim; a method that is attached already is taken off.

        Args:
            model: the denoiser.
            method: the window of the first path, and the temperature of both.
            place: where outputs of cross-attention are stored: "device" is the model's device,
                "cpu" main memory, "pinned" main memory that a GPU copies from faster.

        Raises:
            ValueError: if the model is neither Wan nor LTX, or `place` is not possible here.
        """
        names = _cross_attentions(model)
        self.store = CrossStore(place)
        # All errors are raised above, before the model is changed.
        set_attn_processor(model, None)
        self._model = model
        self._guidance: Guidance = "own"
        self._set = []
        first: Any = model.get_submodule(site_names(model, family_of(model))[0])
        backend = _compat.processor_backend(first.processor)
        parameters = {f.name: getattr(method, f.name) for f in fields(FreeSwimAttn) if f.init}
        set_attn_processor(model, _TwoPaths(path=self, backend=backend, **parameters))
        for layer, name in enumerate(names):
            module: Any = model.get_submodule(name)
            processor = _GuidedCross(self, layer, module.processor)
            self._set.append((module, processor))
            set_processor(module, processor)

    @property
    def guidance(self) -> Guidance:
        """The guidance of the next calls."""
        return self._guidance

    @property
    def has_two(self) -> bool:
        """Whether the next calls have both paths, each with one half of the samples."""
        return self._guidance in _TWO_PATHS

    @contextmanager
    def guided(self, guidance: Guidance) -> Iterator[None]:
        """Guide the calls in the block this way; after a failure the store is empty.

        Raises:
            RuntimeError: for "reuse" when the store is empty.
        """
        if guidance == "reuse" and not self.store:
            raise RuntimeError("there is nothing to reuse: call with guidance 'store' first")
        if guidance == "store":
            self.store.clear()  # before the forward, whose activations need the memory
        self._guidance = guidance
        try:
            yield
        except BaseException:
            self.store.clear()
            raise
        finally:
            self._guidance = "own"

    def remove(self) -> None:
        """Put back the processors that the model had, and empty the store."""
        self.store.clear()
        set_attn_processor(self._model, None)
        for module, processor in self._set:
            # A processor that somebody else has set since then stays.
            if module.processor is processor:
                set_processor(module, processor.inner)
        self._set = []


def store_bytes(model: torch.nn.Module, tokens: int, batch: int = 1) -> int:
    """Bytes that a call with guidance "store" stores for `batch` videos of `tokens` tokens.

    Raises:
        ValueError: if the model is neither Wan nor LTX.
    """
    projections: list[Any] = [
        model.get_submodule(f"{name}.to_out.0") for name in _cross_attentions(model)
    ]
    width = sum(projection.out_features for projection in projections)
    dtype: torch.dtype = next(model.parameters()).dtype
    return batch * tokens * width * dtype.itemsize


def check_place(place: str) -> None:
    """Raise ValueError for an unknown place, or for pinned memory without an accelerator."""
    check("store", place, choice(STORE_PLACES))
    if place == "pinned" and not torch.accelerator.is_available():
        raise ValueError(
            "store is 'pinned', but pinned memory is for copies to an accelerator, and torch sees"
            " none here; use 'device' or 'cpu'"
        )


def _cross_attentions(model: torch.nn.Module) -> list[str]:
    """The names of the cross-attention modules, each beside a site of self-attention."""
    family = family_of(model)
    if family.name not in _FAMILIES:
        raise ValueError(
            f"{type(model).__name__} cannot run FreeSwim's two paths, which are known for the"
            f" families {' and '.join(_FAMILIES)}; FreeSwimAttn alone works on every family"
        )
    return [f"{name.removesuffix('attn1')}attn2" for name in site_names(model, family)]


class CrossStore:
    """Outputs of cross-attention, layer by layer, after their projection.

    Raises:
        ValueError: for an unknown place, or for pinned memory without an accelerator.
    """

    def __init__(self, place: StorePlace) -> None:
        check_place(place)
        self.place = place
        self._kept: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept.values())

    def keep(self, layer: int, output: torch.Tensor) -> None:
        if self.place == "cpu":
            output = output.cpu()
        elif self.place == "pinned":
            pinned = torch.empty_like(output, device="cpu", pin_memory=True)
            output = pinned.copy_(output, non_blocking=True)
        self._kept[layer] = output

    def fetch(self, layer: int, device: torch.device) -> torch.Tensor:
        return self._kept[layer].to(device, non_blocking=True)

    def clear(self) -> None:
        self._kept.clear()


@dataclass(frozen=True, kw_only=True)
class _TwoPaths(FreeSwimAttn):
    """The window for the first half of the samples, dense attention for the second.

    Attributes:
        path: says whether a call has both halves.
        backend: diffusers' backend for dense attention; None for its active backend.
    """

    path: DualPath = field(compare=False, repr=False)
    backend: Any = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        *,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.path.has_two:
            return super().attend(query, key, value, site, scale=scale, key_mask=key_mask)
        half = query.shape[0] // 2
        detail = super().attend(
            query[:half],
            key[:half],
            value[:half],
            site,
            scale=scale,
            key_mask=None if key_mask is None else key_mask[:half],
        )
        overall = _compat.dispatch(
            query[half:],
            key[half:],
            value[half:],
            backend=self.backend,
            attn_mask=None if key_mask is None else key_mask[half:, None, None, :],
            scale=self.score_scale(site.grid, query.shape[-1], scale),
        )
        return torch.cat([detail, overall])


class _GuidedCross:
    """The cross-attention of a block: the output of its own processor, or the stored output."""

    def __init__(self, path: DualPath, layer: int, inner: Any) -> None:
        self.inner = inner
        self._path = path
        self._layer = layer

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        path = self._path
        if path.guidance == "reuse":
            return path.store.fetch(self._layer, hidden_states.device)
        text, mask = encoder_hidden_states, attention_mask
        if path.has_two:
            batch = hidden_states.shape[0]
            hidden_states = hidden_states[batch // 2 :]
            text = text[batch // 2 :] if text.shape[0] == batch else text
            if mask is not None and mask.shape[0] == batch:
                mask = mask[batch // 2 :]
        out: torch.Tensor = self.inner(attn, hidden_states, text, mask, *args, **kwargs)
        if path.guidance == "store":
            path.store.keep(self._layer, out)
        return torch.cat([out, out]) if path.has_two else out
