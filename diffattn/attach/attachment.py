"""Attaching a method to a diffusers pipeline or model, and taking it off again.

The module `denoiser` attaches to one denoiser. This module holds what a pipeline's denoisers share:
the choice of methods, the count of denoising steps, and the removal.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from diffattn import _compat
from diffattn.attach.callers import calling_pipeline
from diffattn.attach.choosing import check_patterns, choose, methods_by_pattern
from diffattn.attach.denoiser import AttachedModel, attached_to
from diffattn.attach.pickling import Unpicklable
from diffattn.attach.run_clock import RunClock, follow, is_followed, leave, skipped_timesteps
from diffattn.attach.sites import set_processor, site_names
from diffattn.grid import TokenGrid
from diffattn.masks.base import allowed_pairs
from diffattn.methods.base import Method, StaticMaskMethod
from diffattn.methods.words import as_table, method_words, reference_words
from diffattn.models import denoisers, family_of, without_grid
from diffattn.models.base import argument
from diffattn.planning.folder import denoiser_shape
from diffattn.schedule import Moment, is_dense_at, resolve_steps, spelled

# The position in the denoising run of this context, by attachment. A context inherits the mapping
# of the context that it was made in, so no mapping is ever changed.
_clocks: ContextVar[WeakKeyDictionary[Attachment, RunClock]] = ContextVar("diffattn_clocks")


def set_attn_processor(
    target: Any, processor: Method | str | Mapping[str, Method | str | None] | Any | None
) -> Attachment | None:
    """Make a pipeline or a denoiser attend by `processor`; `pipe.set_attn_processor` is the same.

    Args:
        target: a diffusers pipeline, modular or not (all its denoisers are attached), or a single
            denoiser. Without a pipeline there are no denoising steps to count, and every call is
            sparse.
        processor: one of
            - a method or the name of a method, such as "radial", for every video self-attention of
              the model;
            - a dict of module-name patterns to methods, such as {"blocks.0": DenseAttn(),
              "blocks.*": RadialAttn()}: the first pattern that matches a site wins, and a site
              without a match stays as it is, as does a site whose pattern has None;
            - None, to restore the processors from before attaching;
            - a processor of diffusers, or a dict of them, for the denoisers' own
              `set_attn_processor`.

    Returns:
        The attachment; None where nothing is attached.

    Raises:
        ValueError: if a model's family is unknown, a method's name is unknown, a dict is empty, a
            pattern matches no site or only sites of earlier patterns, or a site's processor does
            not go through diffusers' attention dispatch.
        TypeError: if `processor` is none of the above, such as a class in place of an instance, or
            a dict mixes methods with other values.
    """
    methods = methods_by_pattern(processor)
    pipe, models = _split(target)
    if methods is not None:
        if pipe is not None:
            _warn_of_dense(pipe)
        return Attachment(pipe, models, methods)
    for model in models.values():
        _detach(model)
    if processor is None:
        return None
    for model in models.values():
        _set_stock_processors(model, processor)
    return None


@dataclass
class Description:
    """Summary of an attachment, for a run of a given size and length.

    Attributes:
        method: the method with every parameter resolved for this model and size. A method that
            differs from step to step has only its dense layers and steps resolved.
        density: fraction of the token pairs that attend in a sparse call, text included; None
            for a method whose pairs depend on the data.
        visited_density: fraction of the blocks that a sparse call computes.
        extra_keys: keys that every video token sees in addition, such as CLEAR's pooled keys;
            neither fraction counts them.
        sites: number of attached attention modules, over all denoisers.
        layers: number of blocks of one denoiser.
        dense_layers, dense_steps, last_dense_steps: number of blocks, of first steps and of last
            steps that stay dense.
        num_steps: length of the run in denoising steps.
        references: the policy for references, in words; empty for a grid without references.
        by_step: the parameters that differ from step to step, in words; empty if none does. The
            fractions are then means over the sparse steps of the run.
        dense_by_value: further steps that are dense because the step's method is, such as one with
            a share of 1.
    """

    method: Method
    density: float | None
    visited_density: float | None
    extra_keys: int
    sites: int
    layers: int
    dense_layers: int
    dense_steps: int
    last_dense_steps: int
    num_steps: int
    references: str = ""
    by_step: str = ""
    dense_by_value: int = 0

    def __str__(self) -> str:
        share = "" if self.density is None else f": {self.density:.1%} of the token pairs attend"
        if self.visited_density is not None:
            share += f", {self.visited_density:.1%} of the blocks are computed"
        if self.extra_keys:
            share += f", and {self.extra_keys:,} pooled keys for every token"
        if self.references:
            share += f"; references {self.references}"
        if self.by_step:
            share += f"; by step: {self.by_step}"
        further = f", and {self.dense_by_value} more" if self.dense_by_value else ""
        return (
            f"{self.method.type} attention{share}; {self.dense_layers} of {self.layers} layers, the"
            f" first {self.dense_steps} and the last {self.last_dense_steps}{further} of"
            f" {self.num_steps} steps stay dense"
        )


class Attachment(Unpicklable):
    """A set of methods attached to the denoisers of a pipeline.

    Threads and tasks that call pipelines over the same denoisers are each in a run of their own.

    Attributes:
        models: the attached denoisers, by component name.
    """

    def __init__(
        self, pipe: Any, models: Mapping[str, torch.nn.Module], methods: Mapping[str, Method | None]
    ) -> None:
        names = {name: site_names(model, family_of(model)) for name, model in models.items()}
        check_patterns([site for sites in names.values() for site in sites], methods)
        chosen = {
            name: _on_model(models[name], choose(sites, methods)) for name, sites in names.items()
        }
        for model in models.values():
            _detach(model)
        self._chosen = chosen
        self._last_clock = RunClock()
        self._followed: WeakSet[Any] = WeakSet()
        self._reported: set[str] = set()
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._scheduler: Any = None
        self.models = {
            name: AttachedModel(self, model, family_of(model), pipe, chosen[name])
            for name, model in models.items()
        }
        if pipe is None:
            self._warn_without_pipeline()
        else:
            self.follow_scheduler(pipe)

    @property
    def clock(self) -> RunClock:
        """The position in the denoising run of this context, or in the last run if it has none."""
        clocks = _clocks.get(None)
        return self._last_clock if clocks is None else clocks.get(self, self._last_clock)

    def __repr__(self) -> str:
        parts = (
            f"{method.type} on {len(sites)} sites of {name}"
            for name, method, sites in self._by_method()
        )
        return f"<Attachment: {', '.join(parts)}>"

    def __str__(self) -> str:
        rows = [
            (name, method_words(method), f"{len(sites)}, from {sites[0]} to {sites[-1]}")
            for name, method, sites in self._by_method()
        ]
        return as_table([("denoiser", "method", "sites"), *rows])

    def _by_method(self) -> Iterator[tuple[str, Method, list[str]]]:
        """Each denoiser's name and methods, with the sites of each method."""
        for name in self.models:
            chosen = self._chosen[name]
            # Methods of other packages may have no hash.
            methods = [m for i, m in enumerate(chosen.values()) if m not in [*chosen.values()][:i]]
            for method in methods:
                yield name, method, [site for site, of_site in chosen.items() if of_site == method]

    @property
    def sites(self) -> int:
        """Number of attached attention modules, over all denoisers."""
        return sum(len(model.sites) for model in self.models.values())

    @property
    def sparse_calls(self) -> int:
        """Attention calls that ran under a method since attaching, except in compiled code."""
        return sum(model.sparse_calls for model in self.models.values())

    @property
    def dense_calls(self) -> int:
        """Attention calls of attached sites that stayed dense, except in compiled code."""
        return sum(model.dense_calls for model in self.models.values())

    def remove(self) -> None:
        """Detach from all denoisers and from the scheduler."""
        for model in self.models.values():
            model.remove()
        for scheduler in list(self._followed):
            self._leave(scheduler)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Keep every call dense while the block runs, as for the teacher of a sparse model."""
        self.clock.always_dense = True
        try:
            yield
        finally:
            self.clock.always_dense = False

    def leave_run(self) -> None:
        """End the denoising run: calls outside a run, as in training, have no dense steps."""
        self.clock.start(0)

    def describe(self, grid: TokenGrid, num_steps: int) -> Description:
        """Summary of a run over `grid` of `num_steps` denoising steps.

        With several methods attached, the summary is that of the first method.

        Raises:
            ValueError: if a list of the method has another number of values than `num_steps`.
        """
        model = next(model for model in self.models.values() if model.groups)
        chosen = model.groups[0].chosen.for_run(model.variant, grid.alone, num_steps)
        if chosen.differs_by_step:
            in_run = chosen.in_run(model.variant, grid.alone, num_steps)
            method: Method = chosen.with_dense_ends(model.variant, grid.alone)
        else:
            method = chosen.for_model(model.variant, grid.alone)
            in_run = [method]
        first, final = method.dense_steps or 0, method.last_dense_steps
        ends = [is_dense_at(Moment(n, num_steps), first, final) for n in range(num_steps)]
        distinct = {id(m): _shares(m, grid) for m in in_run if m is not None}
        masks = [distinct[id(m)] for m in in_run if m is not None]
        known = [shares for shares in masks if shares is not None]
        density = visited = None
        extra_keys = 0
        if known and len(known) == len(masks):
            density, visited = (
                sum(part) / len(known) for part in list(zip(*known, strict=True))[:2]
            )
            extra_keys = known[-1][2]
        return Description(
            method=method,
            density=density,
            visited_density=visited,
            extra_keys=extra_keys,
            by_step=_by_step_words(chosen),
            dense_by_value=in_run.count(None) - sum(ends) if chosen.differs_by_step else 0,
            sites=self.sites,
            layers=model.layers,
            dense_layers=min(method.dense_layers or 0, model.layers),
            dense_steps=resolve_steps(first, num_steps),
            last_dense_steps=resolve_steps(final, num_steps),
            num_steps=num_steps,
            references=reference_words(method, grid) if grid.references else "",
        )

    def enter_run(self, model: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """Find the run that a call of a denoiser is part of, and its length, before the call."""
        pipe = calling_pipeline(model) if self._has_schedule() else None
        scheduler = self.follow_scheduler(self._alive() if pipe is None else pipe)
        if scheduler is None:
            return
        if pipe is None and self._has_schedule() and self.clock.is_over:
            self._warn_once(
                f"{type(model).__name__} is called after the last step of a denoising run, by no"
                f" pipeline that diffattn knows: the call is outside of a run, so dense_steps and"
                f" last_dense_steps do not apply. For steps to count, use the scheduler of the"
                f" pipeline that set_attn_processor was called on"
            )
            self.clock.start(0)
        if self.clock.num_steps and not self.clock.has_begun:
            timestep = argument(args, kwargs, 1, "timestep")
            self.clock.begin(skipped_timesteps(scheduler, timestep))

    def follow_scheduler(self, pipe: Any) -> Any:
        """Count the steps of a pipeline's scheduler, also after the user has exchanged it.

        Returns:
            The scheduler; None if there is none.
        """
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None:
            return None
        own = pipe is self._alive()
        if own and self._scheduler is not None and self._scheduler is not scheduler:
            self._leave(self._scheduler)
        if own:
            self._scheduler = scheduler
        if not is_followed(scheduler, self):
            follow(scheduler, self)
            # The scheduler may have its timesteps already.
            self.started(scheduler)
        return scheduler

    def started(self, scheduler: Any) -> None:
        """Begin a run: a scheduler was given its timesteps."""
        self._followed.add(scheduler)
        self._check_in_place()
        timesteps = getattr(scheduler, "timesteps", None)
        clock = RunClock(always_dense=self.clock.always_dense)
        clock.start(0 if timesteps is None else len(timesteps))
        clocks = WeakKeyDictionary(_clocks.get({}))
        clocks[self] = self._last_clock = clock
        _clocks.set(clocks)

    def stepped(self, scheduler: Any, timestep: Any) -> None:
        """Count a step that a scheduler has made."""
        if not self.clock.has_begun:
            self.clock.begin(skipped_timesteps(scheduler, timestep))
        self.clock.advance(scheduler)

    def follower_of_copy(self, memo: dict[int, Any]) -> Attachment:
        """The attachment that follows a copy of the scheduler.

        With the pipeline in the memo it is the copied attachment, otherwise this attachment.
        """
        return copy.deepcopy(self, memo) if id(self._alive()) in memo else self

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """The attachment of a copied pipeline, or of a denoiser that is copied alone.

        The copy shares no state with the original. A denoiser that is copied alone has no pipeline,
        and so no denoising steps.
        """
        copied = copy.copy(self)
        memo[id(self)] = copied
        pipe = memo.get(id(self._alive()))
        copied._last_clock = RunClock()
        copied._followed = WeakSet()
        copied._reported = set()
        copied._pipe = None if pipe is None else weakref.ref(pipe)
        copied._scheduler = None if pipe is None else copy.deepcopy(self._scheduler, memo)
        if copied._scheduler is not None:
            copied._followed.add(copied._scheduler)
        copied.models = {
            name: copy.deepcopy(model, memo)
            for name, model in self.models.items()
            if pipe is not None or model.is_copied(memo)
        }
        if pipe is None and self._pipe is not None:
            copied._warn_without_pipeline()
        return copied

    def _alive(self) -> Any:
        """The pipeline; None for a bare denoiser, or once the pipeline is gone."""
        return None if self._pipe is None else self._pipe()

    def _leave(self, scheduler: Any) -> None:
        leave(scheduler, self)
        self._followed.discard(scheduler)

    def _has_schedule(self) -> bool:
        """Whether it matters to a method which step of a run a call belongs to."""
        return any(model.has_schedule for model in self.models.values())

    def _check_in_place(self) -> None:
        """Warn if the pipeline has another denoiser than those attached."""
        pipe = self._alive()
        for name, attached in self.models.items():
            component = getattr(pipe, name, None)
            if component is not None and not attached.is_of(component):
                self._warn_of_new(name, component, "exchanged")
        # A modular pipeline loads its components one by one.
        for name, component in self._unattached(pipe).items():
            self._warn_of_new(name, component, "added")

    def _unattached(self, pipe: Any) -> dict[str, torch.nn.Module]:
        """The denoisers of the pipeline under names that had none when a method was attached."""
        try:
            found = {} if pipe is None else denoisers(pipe)
        except ValueError:  # its denoisers have been taken out
            return {}
        attached = self.models.values()
        return {
            name: component
            for name, component in found.items()
            if name not in self.models and not any(model.is_of(component) for model in attached)
        }

    def _warn_of_new(self, name: str, component: torch.nn.Module, changed: str) -> None:
        self._warn_once(
            f"the pipeline's {name} was {changed} after set_attn_processor: the new"
            f" {type(component).__name__} has no method attached and attends densely. Call"
            f" set_attn_processor with your method again"
        )

    def _warn_once(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            warnings.warn(message, stacklevel=4)

    def _warn_without_pipeline(self) -> None:
        for model in self.models.values():
            for group in model.groups:
                if group.chosen.differs_by_step:
                    warnings.warn(
                        f"{group.chosen.type} differs from step to step"
                        f" ({_by_step_words(group.chosen)}), but without a pipeline there are no"
                        f" steps to count: every call is as in the last step. Attach it to the"
                        f" pipeline, or attach method.at_step(step, steps)",
                        stacklevel=4,
                    )
                    return
                method = group.chosen.for_model(model.variant)
                settings = ("dense_steps", "last_dense_steps")
                given = [name for name in settings if getattr(method, name)]
                if given:
                    zeros = ", ".join(f"{name}=0" for name in given)
                    warnings.warn(
                        f"{method.type} keeps {method.dense_steps} (first) and"
                        f" {method.last_dense_steps} (last) denoising steps dense, but without a"
                        f" pipeline there are no steps to count: every call is sparse. Attach it to"
                        f" the pipeline, or pass {zeros} to say so",
                        stacklevel=4,
                    )
                    return


def _shares(method: Method, grid: TokenGrid) -> tuple[float, float, int] | None:
    """Shares of token pairs and of blocks under a mask, and its extra keys; None for no mask."""
    if not isinstance(method, StaticMaskMethod):
        return None
    layout = method.layout(grid, torch.device("cpu"), method.order(grid))
    density = allowed_pairs(layout) / grid.tokens**2
    return density, layout.density, method.extra_keys(grid) or 0


def _by_step_words(method: Method) -> str:
    """The parameters of a method that differ from step to step."""
    if not method.differs_by_step:
        return ""
    words = [f"{name}={spelled(schedule)}" for name, schedule in method.by_step]
    return ", ".join(words) or "another method in some steps"


def _on_model(model: torch.nn.Module, chosen: dict[str, Method]) -> dict[str, Method]:
    """The methods of a denoiser's sites, told the denoiser's figures."""
    if not any(method.needs_figures for method in chosen.values()):
        return chosen
    try:
        figures = denoiser_shape(model)
    except ValueError:  # a model with grids of several sizes
        figures = None
    told = {id(method): method.on_model(figures) for method in chosen.values()}
    return {site: told[id(method)] for site, method in chosen.items()}


def _split(target: Any) -> tuple[Any, dict[str, torch.nn.Module]]:
    """The pipeline, None for a bare denoiser, and the denoisers by component name."""
    if isinstance(target, torch.nn.Module):
        return None, {"model": target}
    return target, denoisers(target)


def _warn_of_dense(pipe: Any) -> None:
    """Warn of denoisers beside the attached ones that no method can be attached to."""
    for name, reason in without_grid(pipe).items():
        warnings.warn(f"the pipeline's {name} attends densely: {reason}", stacklevel=3)


def _set_stock_processors(model: Any, processor: Any) -> None:
    """Set processors of diffusers, by the model's own `set_attn_processor` where it has one."""
    # diffusers empties the dict it is given.
    processor = dict(processor) if isinstance(processor, Mapping) else processor
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(processor)
        return
    modules = {
        f"{name}.processor": module
        for name, module in model.named_modules()
        if isinstance(module, _compat.ATTENTION_CLASSES)
    }
    if isinstance(processor, Mapping) and processor.keys() != modules.keys():
        raise ValueError(
            f"the dict has {len(processor)} processors for {type(model).__name__}, but it needs one"
            f" for each of its {len(modules)} attention modules: {', '.join(modules)}"
        )
    for name, module in modules.items():
        set_processor(module, processor[name] if isinstance(processor, Mapping) else processor)


def _detach(model: torch.nn.Module) -> None:
    attached = attached_to(model)
    if attached is not None:
        attached.owner.remove()
