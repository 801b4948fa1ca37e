"""Attaching to one denoiser: its attention sites, their backends, the grid of a call.

The code of diffusers' attention processors stays in use. Each video self-attention site gets a copy
of its own processor. The copy ends in diffusers' dispatch call, like the original, but the call
goes to a private backend of diffattn. Nothing process-wide changes.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from diffattn import _compat
from diffattn.attach.backend import Group, backend_of
from diffattn.attach.connection import complaint
from diffattn.attach.permute_once import order_throughout
from diffattn.attach.pickling import Unpicklable
from diffattn.attach.run_clock import RunClock
from diffattn.attach.sites import AttachedSite, set_processor
from diffattn.grid import TokenGrid
from diffattn.methods.base import (
    Adaptation,
    Method,
    SiteWeights,
)
from diffattn.models import Family
from diffattn.models.base import argument
from diffattn.models.twins import dispatching

_ATTRIBUTE = "_diffattn_attached"

# Backends of models that are gone. They leave diffusers' registry before the next backend enters.
_retired: list[Any] = []


class Owner(Protocol):
    """The attachment that the denoisers of a pipeline share."""

    clock: RunClock

    def follow_scheduler(self) -> None: ...

    def remove(self) -> None: ...


@dataclass
class _Inside:
    """The grid of the sites inside a module, known from the module's calls."""

    attached: AttachedModel
    grid: TokenGrid | None = None

    def learn(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self.grid = self.attached.family.grid(module, args, kwargs)

    # Each site sets the grid anew: gradient checkpointing calls it again after other modules ran.
    def use(self, *_: Any) -> None:
        if self.grid is not None:
            self.attached._use(self.grid)


@dataclass(frozen=True)
class _WeightsOfCall:
    """Hooks that give a group the weights and rotary tables of a site while the site is called.

    Attributes:
        group: the group of the site.
        name: name of the method's weights among the submodules of the site.
    """

    group: Group
    name: str

    def begin(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        weights: Any = module.get_submodule(self.name)
        self.group.weights = weights
        rotary = self.group.family.rotary
        self.group.rotary = None if rotary is None else argument(args, kwargs, *rotary)

    def end(self, *_: Any) -> None:
        self.group.weights = self.group.rotary = None


class AttachedModel(Unpicklable):
    """A denoiser with methods attached to its sites.

    Attributes:
        owner: the attachment that the pipeline's denoisers share.
        family: the family of the denoiser.
        variant: the model's name in the tables of recommended settings.
        layers: number of blocks that have sites.
        groups: the groups of sites that share a backend.
        sites: the attached modules by name.
        grid: the video tokens of the current call; None before the first call.
    """

    def __init__(
        self,
        owner: Owner,
        model: torch.nn.Module,
        family: Family,
        pipe: Any,
        chosen: Mapping[str, Method],
    ) -> None:
        self.owner = owner
        self.family = family
        self.variant = family.variant(pipe, model)
        self.grid: TokenGrid | None = None
        self.groups: list[Group] = []
        self.sites: dict[str, AttachedSite] = {}
        self._model = model
        self._calls_before = 0
        self._first_forward = True
        self._reported = False
        self._hooks: list[RemovableHandle] = []
        self._flow_hooks: list[RemovableHandle] = []
        layers = family.layers(model)
        self.layers = max(layers.values()) + 1
        modules: dict[str, Any] = {name: model.get_submodule(name) for name in chosen}
        # All processors are made before the first is set: an error leaves the model as it was.
        processors = {name: dispatching(name, modules[name].processor) for name in chosen}
        self._adaptations = _adaptations(model, chosen)
        for adaptation in self._adaptations:
            adaptation.apply(self)
        for name, method in chosen.items():
            self._attach(name, modules[name], processors[name], method, layers[name])
        # The backends of a model that is dropped while attached leave the registry as well, but
        # later: a compilation that has read the registry may be running.
        self._retire_with(model)
        self._hooks += [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
            model.register_forward_hook(self._end_flow, always_call=True),
        ]
        if family.grid_modules is not None:
            for name, module in model.named_modules():
                if family.grid_modules.fullmatch(name):
                    self._follow(name, module)
        model.__dict__[_ATTRIBUTE] = self

    @property
    def sparse_calls(self) -> int:
        """Attention calls that ran under a method since attaching, except in compiled code."""
        return sum(group.sparse_calls for group in self.groups)

    @property
    def dense_calls(self) -> int:
        """Attention calls of attached sites that stayed dense, except in compiled code."""
        return sum(group.dense_calls for group in self.groups)

    def remove(self) -> None:
        """Restore the processors, and remove all weights, adaptations, hooks and backends."""
        for site in self.sites.values():
            # A processor that other code has set since attaching stays.
            if site.module.processor is site.processor:
                # Parallelism may have been enabled since attaching: the model stays parallel.
                _compat.share_parallelism(site.processor, site.original)
                set_processor(site.module, site.original)
            if site.weights is not None:
                weights = site.module._modules.pop(site.weights, None)
                if isinstance(weights, SiteWeights):
                    weights.leave(site.module)
        for adaptation in self._adaptations:
            adaptation.undo()
        self._end_flow()
        self._retire()
        _unregister_retired()
        for hook in self._hooks:
            hook.remove()
        self._model.__dict__.pop(_ATTRIBUTE, None)

    def _attach(
        self, name: str, module: torch.nn.Module, processor: Any, method: Method, layer: int
    ) -> None:
        group = self._group(method, layer, _compat.processor_backend(processor))
        _compat.set_processor_backend(processor, group.member)
        processor = method.site_processor(processor, group)
        original = module.processor
        set_processor(module, processor)
        weights = method.site_weights(module, self.family.text is not None)
        if weights is None:
            weights = method.layer_weights(layer)
            if weights is not None:
                weights.place_beside(module)
        if weights is not None:
            module.add_module(method.type, weights)
            call = _WeightsOfCall(group, method.type)
            self._hooks += [
                module.register_forward_pre_hook(call.begin, with_kwargs=True),
                module.register_forward_hook(call.end, always_call=True),
            ]
        name_of_weights = None if weights is None else method.type
        self.sites[name] = AttachedSite(module, original, processor, group.member, name_of_weights)

    def _group(self, method: Method, layer: int, previous: Any) -> Group:
        """The group of a site; each layer that may stay dense gets a group of its own."""
        single = method.dense_layers
        dense = min(layer, method.most_dense_layers if single is None else single)
        kind = dense, method.layer_kind(layer)
        for group in self.groups:
            if group.chosen is method and group.kind == kind and group.previous is previous:
                return group
        group = Group(method, self.family, self.variant, kind, layer, self.layers, previous)
        _unregister_retired()
        group.member = _compat.register_backend(backend_of(group))
        self.groups.append(group)
        return group

    def _before_forward(self, model: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.owner.follow_scheduler()
            self._calls_before = self.sparse_calls + self.dense_calls
        if self.family.grid_modules is None:
            self._use(self.family.grid(model, args, kwargs))
        return None if torch.compiler.is_compiling() else self._begin_flow(args, kwargs)

    def _begin_flow(self, args: Any, kwargs: Any) -> Any:
        """Put the tokens of a forward in the order of its blocks, where one order serves all calls.

        Returns:
            The arguments of the forward with their tokens in that order; None to leave them.
        """
        self._end_flow()  # an interrupted forward may have left its own
        order = order_throughout(
            self._model, self.family, self.groups, self.sites.values(), self.grid, args, kwargs
        )
        flow = self.family.flow
        if order is None or flow is None:
            return None
        for group in self.groups:
            group.reordered = order
        self._flow_hooks = flow.follow(order, self._model)
        return flow.enter(order, args, kwargs)

    def _end_flow(self, *_: Any) -> None:
        """Undo `_begin_flow`, also after a forward that fails."""
        if torch.compiler.is_compiling():
            return
        for hook in self._flow_hooks:
            hook.remove()
        self._flow_hooks = []
        for group in self.groups:
            group.reordered = None

    def _follow(self, name: str, module: torch.nn.Module) -> None:
        """Let the calls of a module set the grid of the sites inside it."""
        sites = [site.module for key, site in self.sites.items() if key.startswith(name + ".")]
        inside = _Inside(self)
        if sites:
            self._hooks.append(module.register_forward_pre_hook(inside.learn, with_kwargs=True))
        # First of the site's hooks: the others read the grid.
        self._hooks += [site.register_forward_pre_hook(inside.use, prepend=True) for site in sites]

    def group_at(self, name: str) -> Group | None:
        """The group of the site called `name`; None where nothing is attached."""
        member = self.sites[name].member if name in self.sites else None
        return next((group for group in self.groups if group.member is member), None)

    @property
    def step(self) -> int:
        """The denoising step that the next call belongs to, from 0."""
        return self.owner.clock.step

    def is_copied(self, memo: dict[int, Any]) -> bool:
        """Whether the denoiser is in the memo of a deep copy."""
        return id(self._model) in memo

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedModel:
        """The attachment of a copied denoiser, with groups and backends of its own."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        # The groups first: the copied processors must find their new backends in the memo.
        parts = ("groups", "owner", "_model", "sites", "_adaptations", "_hooks", "_flow_hooks")
        for name in parts:
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        copied._retire_with(copied._model)
        return copied

    def _retire_with(self, model: torch.nn.Module) -> None:
        self._retire = weakref.finalize(
            model, _retired.extend, [group.member for group in self.groups]
        )

    def _use(self, grid: TokenGrid) -> None:
        """Set the grid of the attention calls to come."""
        if grid == self.grid:
            return
        self.grid = grid
        for group in self.groups:
            group.use(grid)
            group.refresh(self.owner.clock)

    def _after_forward(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._reported:
            return
        calls = self.sparse_calls + self.dense_calls - self._calls_before
        found = complaint(model, self.sites, calls, first_forward=self._first_forward)
        self._first_forward = False
        if found:
            self._reported = True
            warnings.warn(
                f"{found}. Call set_attn_processor with your method again, after such changes",
                stacklevel=2,
            )


def _adaptations(model: torch.nn.Module, chosen: Mapping[str, Method]) -> list[Adaptation]:
    """The change that the methods make to a denoiser outside its sites; a list of at most one.

    Raises:
        ValueError: if the methods want different changes.
    """
    out: list[Adaptation] = []
    for method in {id(method): method for method in chosen.values()}.values():
        adaptation = method.adaptation(model)
        if adaptation is not None and adaptation not in out:
            out.append(adaptation)
    if len(out) > 1:
        raise ValueError(
            f"the methods want {type(model).__name__} changed in different ways, but it can be in"
            f" one only: {' and '.join(map(str, out))}"
        )
    return out


def _unregister_retired() -> None:
    while _retired:
        _compat.unregister_backend(_retired.pop())


def attached_to(model: torch.nn.Module) -> AttachedModel | None:
    """The attached denoiser of a model; None where nothing is attached."""
    return model.__dict__.get(_ATTRIBUTE)
