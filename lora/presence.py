"""Where a LoRA is on: in the calls of the method that it was trained under, and nowhere else.

A LoRA corrects what its method changes. In a step that stays dense there is nothing to correct, and
the LoRA would do harm. So the adapter is taken off the denoiser's layers for each forward, or part
of a forward, that does not attend by the method: a dense step, a denoiser without the method, a
layer under another method. Such a forward is the model's without the LoRA, bit for bit. Other
adapters stay as they are.

The layers of the method that stay dense in a sparse step have been trained in such steps, and keep
the adapter.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from diffattn.attach.backend import Group
from diffattn.attach.denoiser import AttachedModel, attached_to
from diffattn.attach.running_call import Call
from diffattn.attach.sites import site_names
from diffattn.models import family_of

_ATTRIBUTE = "_diffattn_lora_presence"

# Guards the adapters of all denoisers while a forward begins or ends.
_lock = threading.Lock()


def keep_under_method(model: torch.nn.Module, adapter: str, method: str) -> None:
    """Let an adapter of a denoiser be on only where the denoiser attends by a method.

    Args:
        model: the denoiser.
        adapter: the name of the adapter in peft; its layers must exist.
        method: the type of the method.
    """
    presence = model.__dict__.get(_ATTRIBUTE)
    if presence is None:
        presence = model.__dict__[_ATTRIBUTE] = _Presence()
        presence.hook = model.register_forward_pre_hook(presence.begin).id
        model.register_forward_hook(presence.end, always_call=True)
    sites = site_names(model, family_of(model))
    layers = {
        name: next((site for site in sites if name.startswith(f"{site}.")), None)
        for name, layer in model.named_modules()
        if adapter in getattr(layer, "lora_A", ())
    }
    presence.adapters[adapter] = _Adapter(method, layers)


def keep_everywhere(model: torch.nn.Module, adapter: str) -> None:
    """Let an adapter of a denoiser be on in every forward again."""
    presence = model.__dict__.get(_ATTRIBUTE)
    if presence is not None:
        presence.adapters.pop(adapter, None)


@contextmanager
def under_method(model: torch.nn.Module, adapter: str, method: str) -> Iterator[None]:
    """Keep an adapter to the calls of a method while the block runs, see `keep_under_method`."""
    keep_under_method(model, adapter, method)
    try:
        yield
    finally:
        keep_everywhere(model, adapter)


@dataclass(frozen=True)
class _Adapter:
    """An adapter that was trained under a method.

    Attributes:
        method: the type of the method.
        layers: the attention site that each layer of the adapter is part of, by the layer's name;
            None for a layer outside of the sites.
    """

    method: str
    layers: dict[str, str | None]

    def layers_off(self, attached: AttachedModel | None) -> frozenset[str]:
        """The layers that the adapter is off in, in a forward with these methods attached."""
        return frozenset(
            name for name, site in self.layers.items() if not self._is_on(attached, site)
        )

    def _is_on(self, attached: AttachedModel | None, site: str | None) -> bool:
        if attached is None:
            return False
        if site is not None:
            own = attached.group_at(site)
            return own is not None and self._is_of(own) and _in_sparse_step(own, attached)
        return any(self._is_of(g) and _in_sparse_step(g, attached) for g in attached.groups)

    def _is_of(self, group: Group) -> bool:
        return group.chosen.type == self.method


def _in_sparse_step(group: Group, attached: AttachedModel) -> bool:
    """Whether the current step is one in which a group's method is sparse in any layer."""
    if torch.compiler.is_dynamo_compiling():
        # The number of the step would be a constant of the compiled code. Groups of dense layers
        # are dense in every step.
        return any(other.sparse and other.chosen is group.chosen for other in attached.groups)
    video = None if group.call is None else group.call.video
    # Of the step that begins: the last call may be of an earlier one.
    return group.is_sparse_step(Call(attached.owner.clock, video))


@dataclass(eq=False)
class _Presence:
    """Hooks of a denoiser that take adapters off before a forward, and put them back after it.

    Attributes:
        adapters: the adapters that are kept to a method, by name.
        hook: the number of the hook `begin`.
    """

    adapters: dict[str, _Adapter] = field(default_factory=dict)
    hook: int = -1
    # The layers whose adapters are changed at present, with the adapters to put back.
    _changed: list[tuple[Any, Any]] = field(default_factory=list)
    # What is off in the forwards that run at present, by thread.
    _running: dict[int, frozenset[tuple[str, str]]] = field(default_factory=dict)
    _warned: bool = False

    def begin(self, model: torch.nn.Module, args: Any) -> None:
        off = self._off(attached_to(model))
        if torch.compiler.is_dynamo_compiling():
            self._take_off(model, off)
            return
        # A method that was attached since then must learn of the forward first.
        hooks: Any = model._forward_pre_hooks
        hooks.move_to_end(self.hook)
        with _lock:
            others = self._others()
            if any(other != off for other in others):
                raise RuntimeError(
                    f"another thread is inside this {type(model).__name__} in a step with its LoRA"
                    f" {'on' if off else 'off'}, and this step needs the LoRA"
                    f" {'off' if off else 'on'}: let the threads take turns, give each thread a"
                    f" copy (copy.deepcopy of the pipeline), or load the LoRA with everywhere=True"
                )
            if not others:
                self._put_back()  # an interrupted forward may have left its own
                self._take_off(model, off)
            self._running[threading.get_ident()] = off

    def end(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            self._put_back()
            return
        with _lock:
            self._running.pop(threading.get_ident(), None)
            if not self._running:
                self._put_back()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Presence:
        copied = _Presence(dict(self.adapters), self.hook)
        memo[id(self)] = copied
        return copied

    def _off(self, attached: AttachedModel | None) -> frozenset[tuple[str, str]]:
        return frozenset(
            (adapter, layer)
            for adapter, kept in self.adapters.items()
            for layer in kept.layers_off(attached)
        )

    def _others(self) -> list[frozenset[tuple[str, str]]]:
        """What is off in the forwards of other threads; a thread may have ended in a forward."""
        alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        self._running = {ident: off for ident, off in self._running.items() if ident in alive}
        return list(self._running.values())

    def _take_off(self, model: torch.nn.Module, off: frozenset[tuple[str, str]]) -> None:
        for adapter, name in off:
            layer: Any = model.get_submodule(name)
            active = getattr(layer, "active_adapters", ())
            if adapter not in active:  # the adapter is unloaded, or switched off already
                continue
            if adapter in layer.merged_adapters:
                self._warn_of_fused(adapter)
                continue
            self._changed.append((layer, layer._active_adapter))
            layer._active_adapter = [one for one in active if one != adapter]

    def _put_back(self) -> None:
        while self._changed:
            layer, active = self._changed.pop()
            layer._active_adapter = active

    def _warn_of_fused(self, adapter: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"LoRA {adapter!r} is fused into the model's weights, so it stays on in steps that"
                f" it was not trained for: call pipe.unfuse_lora() to have it off in them",
                stacklevel=2,
            )
