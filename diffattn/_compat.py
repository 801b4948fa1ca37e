"""The one module that touches private names of diffusers.

tests/test_compat.py checks every assumption of this module, so that a diffusers release that moves
something fails in one place.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, MochiAttention

# Every class of attention module that has a processor.
ATTENTION_CLASSES = (Attention, MochiAttention, AttentionModuleMixin)

# diffusers passes a backend only the keyword arguments that the backend's signature names.
BackendFunction = Callable[..., torch.Tensor]

_serial = itertools.count()

# Backends that enter diffusers' registry together: more than a model has groups of sites.
_AT_ONCE = 64

# Modules of diffusers' hooks that move or cast weights and do not look at tokens.
_BLIND_HOOKS = ("diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting")

# Backends that support context parallelism, but cannot merge attention over parts of the keys.
_WITHOUT_LSE = ("native", "_native_npu")


@dataclass(frozen=True)
class ContextParallel:
    """The processes that a sequence is spread over.

    Rank `ring_rank * ulysses_degree + ulysses_rank` of `group` has the part of the same number.

    Attributes:
        group, ring, ulysses: the process group of all, and this process's ring and Ulysses groups.
        ring_degree, ulysses_degree: number of processes in `ring` and in `ulysses`.
        ring_rank, ulysses_rank: this process's rank in `ring` and in `ulysses`.
        uneven: whether the parts may differ in length.
    """

    group: Any
    ring: Any
    ulysses: Any
    ring_degree: int
    ulysses_degree: int
    ring_rank: int
    ulysses_rank: int
    uneven: bool

    def exceeds(self, backend: Any, masked: bool) -> bool:
        """Whether a call is more than diffusers' own path through `backend` can compute.

        Some of diffusers' backends would ignore the parallelism. Some cannot go round a ring. No
        backend passes masks between processes.

        Args:
            backend: a member of diffusers' enumeration; None is the active backend.
            masked: whether the call has an attention mask.
        """
        if backend is None:
            backend, _ = _AttentionBackendRegistry.get_active_backend()
        value = AttentionBackendName(backend).value
        return (
            masked
            or value not in _AttentionBackendRegistry._supports_context_parallel
            or (self.ring_degree > 1 and value in _WITHOUT_LSE)
        )


class _Slot:
    """An entry of diffusers' registry of backends, whose function may change.

    Dynamo guards on every name in the registry, so a new entry makes all compiled code that calls
    attention compile again, of other models too. An entry therefore stays for good, and serves one
    attached group of sites after another.

    Attributes:
        member: the key of the entry.
        function: the function of the group; None while no group has the entry.
    """

    def __init__(self) -> None:
        self.member = _new_member(f"diffattn_{next(_serial)}")
        self.function: BackendFunction | None = None
        register = _AttentionBackendRegistry.register(self.member, supports_context_parallel=True)
        register(_calling(self))


def _new_member(value: str) -> AttentionBackendName:
    """A member of the enumeration that the enumeration does not list; equal for equal values."""
    member = str.__new__(AttentionBackendName, value)
    member._name_ = value.upper()
    member._value_ = value
    return member


def _calling(slot: _Slot) -> BackendFunction:
    def diffattn_backend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        function = slot.function
        if function is None:
            raise RuntimeError(
                "an attention processor belongs to a method that was taken off its model; call"
                " set_attn_processor(None) for the model's own processors, or attach a method"
            )
        return function(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            _parallel_config=_parallel_config,
        )

    return diffattn_backend


_slots: dict[str, _Slot] = {}
_free: list[_Slot] = []


def register_backend(function: BackendFunction) -> AttentionBackendName:
    """Make `function` an attention backend of diffusers under a name of its own.

    Args:
        function: takes `query, key, value` by position and `attn_mask, dropout_p, is_causal, scale,
            enable_gqa, _parallel_config` by name, and returns the attention output, (batch, tokens,
            heads, head_dim).

    Returns:
        A member of diffusers' backend enumeration, to be set on processors. The enumeration does
        not list the member, so that nobody selects it by name. Until no processor has the member
        any more, no other function gets its name.
    """
    if not _free:
        gc.collect()  # members may be part of cycles
    if not _free:
        made = [_Slot() for _ in range(_AT_ONCE)]
        _slots.update((slot.member.value, slot) for slot in made)
        _free.extend(reversed(made))
    slot = _free.pop()
    slot.function = function
    # Not the key itself: the key lives as long as the process.
    member = _new_member(slot.member.value)
    weakref.finalize(member, _free.append, slot).atexit = False
    return member


def unregister_backend(member: AttentionBackendName) -> None:
    """Undo `register_backend`: a processor that still has the member raises an error."""
    _slots[member.value].function = None


def dispatch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, backend: Any, **kwargs: Any
) -> torch.Tensor:
    """Call diffusers' attention dispatch; `backend` None is the backend that the user made active.

    Tensors are (batch, tokens, heads, head_dim).
    """
    parallel_config = kwargs.pop("_parallel_config", None)
    return dispatch_attention_fn(
        query, key, value, backend=backend, parallel_config=parallel_config, **kwargs
    )


def uses_dispatch(processor: object) -> bool:
    """Whether an attention processor ends in diffusers' dispatch call."""
    return hasattr(processor, "_attention_backend")


def processor_backend(processor: object) -> Any:
    """The backend set on a processor; None for diffusers' active backend."""
    return processor._attention_backend  # type: ignore[attr-defined]


def set_processor_backend(processor: object, backend: Any) -> None:
    """Set the backend that a processor's dispatch call goes to."""
    processor._attention_backend = backend  # type: ignore[attr-defined]


def is_pipeline(value: object) -> bool:
    """Whether an object is a pipeline of diffusers, modular or not."""
    return isinstance(value, ConfigMixin) and hasattr(type(value), "components")


def has_parallel_plan(model: object) -> bool:
    """Whether diffusers knows how to spread a model's sequence over processes."""
    return getattr(model, "_cp_plan", None) is not None


def context_parallel(config: Any) -> ContextParallel | None:
    """The context parallelism in the `parallel_config` of an attention call; None without any."""
    config = None if config is None else config.context_parallel_config
    if config is None:
        return None
    return ContextParallel(
        group=config._flattened_mesh.get_group(),
        ring=config._ring_mesh.get_group(),
        ulysses=config._ulysses_mesh.get_group(),
        ring_degree=config.ring_degree,
        ulysses_degree=config.ulysses_degree,
        ring_rank=config._ring_local_rank,
        ulysses_rank=config._ulysses_local_rank,
        # diffusers 0.36 has neither attribute.
        uneven=getattr(config, "ulysses_anything", False)
        or getattr(config, "ring_anything", False),
    )


def is_watched(module: torch.nn.Module) -> bool:
    """Whether a hook of diffusers in a module sees or keeps what passes through the module.

    Hooks of step caches and guiders do. Hooks that offload or cast weights do not.
    """
    registry = module.__dict__.get("_diffusers_hook")
    return registry is not None and any(
        type(hook).__module__ not in _BLIND_HOOKS for hook in registry.hooks.values()
    )


def is_group_offloaded(module: torch.nn.Module) -> bool:
    """Whether diffusers' group offloading has a part in a module or in its layers."""
    registries = [part.__dict__.get("_diffusers_hook") for part in module.modules()]
    return any(
        type(hook).__module__ == "diffusers.hooks.group_offloading"
        for registry in registries
        if registry is not None
        for hook in registry.hooks.values()
    )


def hidden_forwards(module: torch.nn.Module) -> list[Callable[..., Any]]:
    """The forwards of a module that hooks of diffusers stand before."""
    registry = module.__dict__.get("_diffusers_hook")
    references = () if registry is None else registry._fn_refs
    return [ref.original_forward or ref.forward for ref in references]


def backend_function(backend: Any) -> BackendFunction:
    """The function of an attention backend; None is the backend that the user made active."""
    if backend is None:
        return _AttentionBackendRegistry.get_active_backend()[1]
    return _AttentionBackendRegistry._backends[AttentionBackendName(backend)]


def processor_parallelism(processor: object) -> Any:
    """The parallelism enabled on a processor, in the form that `context_parallel` takes."""
    return getattr(processor, "_parallel_config", None)


def share_parallelism(source: object, target: object) -> None:
    """Give `target` the parallelism of the processor `source`, if `target` supports any."""
    config = processor_parallelism(source)
    if getattr(target, "_parallel_config", config) is not config:
        target._parallel_config = config  # type: ignore[attr-defined]
