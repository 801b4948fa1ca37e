"""Attaching to one denoiser: its attention sites, their backends, the grid of a call.

The code of diffusers' attention processors stays in use. Each video self-attention site gets a copy
of its own processor. The copy ends in diffusers' dispatch call, like the original, but the call
goes to a private backend of diffattn. Nothing process-wide changes.
"""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from diffattn import _compat
from diffattn.attach.backend import Group, backend_of
from diffattn.attach.compiled import remember
from diffattn.attach.connection import complaint
from diffattn.attach.permute_once import Gates, may_permute, order_throughout
from diffattn.attach.pickling import Unpicklable
from diffattn.attach.run_clock import RunClock
from diffattn.attach.running_call import Call, begin_call, end_call, running_call
from diffattn.attach.sites import AttachedSite, set_processor
from diffattn.grid import TokenGrid
from diffattn.methods.base import (
    Adaptation,
    Method,
    SiteWeights,
    attends_by_mask_throughout,
)
from diffattn.models import Family
from diffattn.models.base import Part, argument
from diffattn.models.twins import dispatching

_ATTRIBUTE = "_diffattn_attached"

# The attribute of a site's module with the site's number, for methods that remember.
_PLACE = "_diffattn_place"
_places = itertools.count()

# Threads enter their calls into the set of running calls one after another.
_entering = threading.Lock()


class Owner(Protocol):
    """The attachment that the denoisers of a pipeline share."""

    @property
    def clock(self) -> RunClock: ...

    def enter_run(self, model: torch.nn.Module, args: Any, kwargs: Any) -> None: ...

    def remove(self) -> None: ...


@dataclass
class _Inside:
    """The grid of the sites inside a module, known from the module's calls.

    Attributes:
        attached: the denoiser.
        name: name of the module.
        grid: the grid of the last call.
        traced: the grid of the call that is traced; None outside of a trace.
    """

    attached: AttachedModel
    name: str
    grid: TokenGrid | None = None
    traced: TokenGrid | None = None

    def learn(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        grid = self.attached.family.grid(module, args, kwargs)
        if torch.compiler.is_dynamo_compiling():
            self.traced = grid
        else:
            self.grid = grid
            call = running_call(self.attached.serial)
            if call is not None:
                call.inside[self.name] = grid
            self.use()

    def forget(self, *_: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            self.traced = None

    # Each site sets the grid anew: gradient checkpointing calls it again after other modules ran.
    def use(self, *_: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            for group in self.attached.groups:
                group.traced_grid = self.traced
            return
        call = running_call(self.attached.serial)
        grid = self.grid if call is None else call.inside.get(self.name)
        if grid is not None:
            self.attached._use(grid)

    def leave(self, *_: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            for group in self.attached.groups:
                group.traced_grid = None


class _InsideBreaks(_Inside):
    """The same for sites whose calls break the graph: the hooks run outside of compiled code.

    The hooks are methods, because a copy of a module has hooks of the copied object only then.
    """

    learn = torch.compiler.disable(_Inside.learn)
    forget = torch.compiler.disable(_Inside.forget)
    use = torch.compiler.disable(_Inside.use)
    leave = torch.compiler.disable(_Inside.leave)


@dataclass(frozen=True)
class _WeightsOfCall:
    """Hooks that give a call the weights and rotary tables of a site while the site is called.

    Attributes:
        group: the group of the site.
        name: name of the method's weights among the submodules of the site.
    """

    group: Group
    name: str

    def begin(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        call = self.group.call
        if call is not None:
            weights: Any = module.get_submodule(self.name)
            call.weights = weights
            rotary = self.group.family.rotary
            call.rotary = None if rotary is None else argument(args, kwargs, *rotary)

    def end(self, *_: Any) -> None:
        call = self.group.call
        if call is not None:
            call.weights = call.rotary = None


@dataclass(frozen=True)
class _PlaceOfCall:
    """Hooks that give a call the number of a site while the site is called."""

    group: Group

    def begin(self, module: torch.nn.Module, args: Any) -> None:
        call = self.group.call
        if call is not None:
            place: Any = getattr(module, _PLACE)
            call.place = place

    def end(self, *_: Any) -> None:
        call = self.group.call
        if call is not None:
            call.place = None


class AttachedModel(Unpicklable):
    """A denoiser with methods attached to its sites.

    Attributes:
        owner: the attachment that the pipeline's denoisers share.
        family: the family of the denoiser.
        variant: the model's name in the tables of recommended settings.
        layers: number of blocks that have sites.
        groups: the groups of sites that share a backend.
        sites: the attached modules by name.
        serial: the number by which the running calls of the denoiser are found.
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
        self.serial = remember(self)
        self.groups: list[Group] = []
        self.sites: dict[str, AttachedSite] = {}
        self._model = model
        self._running: weakref.WeakSet[Call] = weakref.WeakSet()
        self._first_forward = True
        self._reported = False
        self._hooks: list[RemovableHandle] = []
        self._numbers: dict[str, tuple[int, ...]] = {}
        self._gates: Gates | None = None
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
        # The backends of a model that is dropped while attached become free as well.
        self._retire_with(model)
        self._hooks += [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
            model.register_forward_hook(self._end, always_call=True),
        ]
        if family.flow is not None and may_permute(model, family, self.groups):
            self._gates = Gates(self, family.flow)
        if family.grid_modules is not None:
            for name, module in model.named_modules():
                if family.grid_modules.fullmatch(name):
                    self._follow(name, module)
        model.__dict__[_ATTRIBUTE] = self

    @property
    def grid(self) -> TokenGrid | None:
        """The video tokens of the current call; None before the first call."""
        call = self.groups[0].call if self.groups else None
        return None if call is None else call.video

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
            site.module.__dict__.pop(_PLACE, None)
            if site.weights is not None:
                weights = site.module._modules.pop(site.weights, None)
                if isinstance(weights, SiteWeights):
                    weights.leave(site.module)
        for adaptation in self._adaptations:
            adaptation.undo()
        if self._gates is not None:
            self._gates.remove()
        self._retire()
        for hook in self._hooks:
            hook.remove()
        self._model.__dict__.pop(_ATTRIBUTE, None)

    def _attach(
        self, name: str, module: torch.nn.Module, processor: Any, method: Method, layer: int
    ) -> None:
        previous = _compat.processor_backend(processor)
        group = self._group(method, layer, previous, self.family.part(name))
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
            first = module.register_forward_pre_hook(call.begin, with_kwargs=True)
            last = module.register_forward_hook(call.end, always_call=True)
            self._number_alike("weights", first, last)
            self._hooks += [first, last]
        if method.remembers:
            setattr(module, _PLACE, torch.tensor(next(_places)))
            of_call = _PlaceOfCall(group)
            first = module.register_forward_pre_hook(of_call.begin)
            last = module.register_forward_hook(of_call.end, always_call=True)
            self._number_alike("place", first, last)
            self._hooks += [first, last]
        name_of_weights = None if weights is None else method.type
        self.sites[name] = AttachedSite(module, original, processor, group.member, name_of_weights)

    def _group(self, method: Method, layer: int, previous: Any, part: Part | None) -> Group:
        """The group of a site; each layer that may stay dense gets a group of its own."""
        dense = min(layer, method.dense_layers_at_most)
        kind = dense, method.layer_kind(layer)
        for group in self.groups:
            alike = group.chosen is method and group.kind == kind and group.part is part
            if alike and group.previous is previous:
                return group
        group = Group(
            method, self.family, self.variant, kind, layer, self.layers, previous, self.serial, part
        )
        group.member = _compat.register_backend(backend_of(group))
        self.groups.append(group)
        return group

    # Outside of compiled code: what a hook reads and compares would be compiled in, call by call.
    @torch.compiler.disable
    def _before_forward(self, model: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        self.owner.enter_run(model, args, kwargs)
        grid = None
        if self.family.grid_modules is None:
            grid = self.family.grid(model, args, kwargs)
            self._check_causal(grid)
        call = Call(self.owner.clock, grid)
        call.sparse_groups = tuple(group.is_sparse_in(call) for group in self.groups)
        self._enter(call)
        for group in self.groups:
            group.use(call)
        if self._gates is None or grid is None:
            return None
        self._gates.put_in_place(model)
        call.order = order_throughout(
            model, self._gates, self.family, self.groups, self.sites.values(), grid, args, kwargs
        )
        return None if call.order is None else self._gates.flow.enter(call.order, args, kwargs)

    def _check_causal(self, grid: TokenGrid) -> None:
        """Raise ValueError if frames may not see all others and a method is no mask alone."""
        for group in self.groups if grid.causal_frames else ():
            if not attends_by_mask_throughout(group.chosen):
                raise ValueError(
                    f"{type(self._model).__name__} lets no block of {grid.causal_frames} latent"
                    f" frames see a later one, which {group.chosen.type} with these parameters"
                    f" would not keep. Use a method that is a mask alone, such as radial or gna, or"
                    f" pass causal_block_size=1 to the pipeline"
                )

    def _enter(self, call: Call) -> None:
        """Make `call` the running call.

        Raises:
            RuntimeError: if calls are running in other threads that `call` cannot run beside.
        """
        with _entering:
            self._forget()  # a forward that was interrupted may have left its own
            others = list(self._running)
            if others:
                self._check_beside(call, others)
            self._running.add(call)
        begin_call(self.serial, call)

    def _check_beside(self, call: Call, others: Iterable[Call]) -> None:
        name = type(self._model).__name__
        if self._adaptations:
            raise RuntimeError(
                f"another thread is in a call of this {name}, but {self._adaptations[0]} keeps"
                f" tensors between its modules: call it from one thread at a time, or give each"
                f" thread a copy (copy.deepcopy)"
            )
        traced = [group for group in self.groups if group.was_traced]
        if any(group.compiled_as not in ("mask", "operator") for group in traced):
            raise RuntimeError(
                f"another thread is in a call of this {name}, but compiled code of"
                f" {traced[0].chosen.type} attention is for one call at a time: call it from one"
                f" thread at a time, or give each thread a copy (copy.deepcopy)"
            )
        if traced and any(other.sparse_groups != call.sparse_groups for other in others):
            raise RuntimeError(
                f"another thread is in a denoising step of this compiled {name} that is dense, or"
                f" this thread is, and the other is in a sparse step: compiled code is in one kind"
                f" of step at a time. Attach methods with dense_steps=0 and last_dense_steps=0, do"
                f" not compile, or give each thread a copy (copy.deepcopy)"
            )

    @torch.compiler.disable
    def _end(self, *_: Any) -> None:
        """End the running call, also after a forward that fails."""
        with _entering:
            self._forget()

    def _forget(self) -> None:
        ended = end_call(self.serial)
        if ended is not None:
            self._running.discard(ended)

    def _follow(self, name: str, module: torch.nn.Module) -> None:
        """Let the calls of a module set the grid of the sites inside it."""
        sites = [site.module for key, site in self.sites.items() if key.startswith(name + ".")]
        # The graph breaks inside, where code that is not compiled looks for the grid.
        breaks = any(group.compiled_as == "outside" for group in self.groups)
        inside = (_InsideBreaks if breaks else _Inside)(self, name)
        if sites:
            self._hooks += [
                module.register_forward_pre_hook(inside.learn, with_kwargs=True),
                module.register_forward_hook(inside.forget, always_call=True),
            ]
        for site in sites:
            # First of the site's hooks: the others read the grid.
            first = site.register_forward_pre_hook(inside.use, prepend=True)
            last = site.register_forward_hook(inside.leave, always_call=True)
            self._number_alike("grid", first, last)
            before: Any = site._forward_pre_hooks
            before.move_to_end(first.id, last=False)
            self._hooks += [first, last]

    def _number_alike(self, purpose: str, *hooks: RemovableHandle) -> None:
        """Give the hooks of a site the numbers of the other sites' hooks for the same purpose.

        Compiled code depends on the numbers, so that sites share it only if these are alike.
        """
        numbers = self._numbers.setdefault(purpose, tuple(hook.id for hook in hooks))
        for hook, number in zip(hooks, numbers, strict=True):
            for ref in (hook.hooks_dict_ref, *hook.extra_dict_ref):
                table = ref()
                if table is not None and hook.id in table:
                    table[number] = table.pop(hook.id)
            hook.id = number

    def group_at(self, name: str) -> Group | None:
        """The group of the site called `name`; None where nothing is attached."""
        member = self.sites[name].member if name in self.sites else None
        return next((group for group in self.groups if group.member is member), None)

    @property
    def step(self) -> int:
        """The denoising step that the next call belongs to, from 0."""
        return self.owner.clock.step

    @property
    def has_schedule(self) -> bool:
        """Whether what a call does depends on its step in a run."""
        return bool(self._adaptations) or any(
            group.chosen.remembers
            or group.chosen.differs_by_step
            or group.method_now.dense_steps
            or group.method_now.last_dense_steps
            for group in self.groups
        )

    def is_of(self, model: Any) -> bool:
        """Whether this is attached to a model, or to the model that it is wrapped around."""
        parts = model.modules() if isinstance(model, torch.nn.Module) else ()
        return any(part is self._model for part in parts)

    def is_copied(self, memo: dict[int, Any]) -> bool:
        """Whether the denoiser is in the memo of a deep copy."""
        return id(self._model) in memo

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedModel:
        """The attachment of a copied denoiser, with groups and backends of its own."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied.serial = remember(copied)
        copied._running = weakref.WeakSet()
        # The groups first: the copied processors must find their new backends in the memo.
        for name in ("groups", "owner", "_model", "sites", "_adaptations", "_hooks", "_gates"):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        for group in copied.groups:
            group.model = copied.serial
        copied._retire_with(copied._model)
        return copied

    def _retire_with(self, model: torch.nn.Module) -> None:
        self._retire = weakref.finalize(model, _unregister, [g.member for g in self.groups])

    def _use(self, grid: TokenGrid) -> None:
        """Set the grid of the attention calls to come: of the running call, or of the next ones."""
        call = running_call(self.serial) or Call(self.owner.clock)
        call.video = grid
        for group in self.groups:
            group.use(call)

    @torch.compiler.disable
    def _after_forward(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        call = running_call(self.serial)
        if call is None or self._reported:
            return
        counted = self._first_forward and not any(group.was_traced for group in self.groups)
        found = complaint(
            model, self.sites, call.attention_calls, self._sites_in(call), first_forward=counted
        )
        self._first_forward = False
        if found:
            self._reported = True
            warnings.warn(
                f"{found}. Call set_attn_processor with your method again, after such changes",
                stacklevel=2,
            )

    def _sites_in(self, call: Call) -> int:
        """The number of sites that the denoiser has called in a call on such tokens."""
        video = call.video
        parts = [self.family.part(name) for name in self.sites]
        return sum(part is None or video is None or part(video) is not None for part in parts)


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


def _unregister(members: Iterable[Any]) -> None:
    for member in members:
        _compat.unregister_backend(member)


def attached_to(model: torch.nn.Module) -> AttachedModel | None:
    """The attached denoiser of a model; None where nothing is attached."""
    return model.__dict__.get(_ATTRIBUTE)
