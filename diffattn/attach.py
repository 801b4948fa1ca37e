"""Attaching a method to a diffusers pipeline or model, and taking it off again.

The stock attention processors stay in place. Each video self-attention site gets a copy of its own
processor whose last step, diffusers' dispatch call, goes to a private backend of ours; nothing
process-wide changes.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from diffattn import _compat
from diffattn.grid import TokenGrid
from diffattn.methods.base import Method, Site, StaticMaskMethod, nearest
from diffattn.models import Family, denoisers, family_of
from diffattn.schedule import RunClock, resolve_steps

_ATTRIBUTE = "_diffattn_attached"


def set_attn_processor(
    target: Any, processor: Method | Mapping[str, Method] | Any | None
) -> Attachment | None:
    """Make a pipeline or a denoiser attend by `processor`; `pipe.set_attn_processor` is the same.

    Args:
        target: a diffusers pipeline (all its denoisers are attached) or a single denoiser. Without
            a pipeline there are no denoising steps to count, and every call is sparse.
        processor: one of
            - a method, for every video self-attention of the model;
            - a dict of module-name patterns to methods, such as {"blocks.0": DenseAttn(),
              "blocks.*": RadialAttn()}: the first that matches a site wins, sites that none matches
              stay as they are;
            - None, which puts back exactly what was there before;
            - a processor of diffusers, or a dict of them, for the denoisers' own
              `set_attn_processor`.

    Returns:
        The attachment, which describes and counts what it does; None where nothing is attached.

    Raises:
        ValueError: if a model's family is unknown, a pattern matches no site, or a site's processor
            does not go through diffusers' attention dispatch.
        TypeError: if a dict mixes methods with something else.
    """
    pipe, models = _split(target)
    if isinstance(processor, Method):
        processor = {"*": processor}
    if isinstance(processor, Mapping) and any(isinstance(m, Method) for m in processor.values()):
        for pattern, method in processor.items():
            if not isinstance(method, Method):
                raise TypeError(
                    f"the value for {pattern!r} is a {type(method).__name__}, but the others are"
                    f" methods of diffattn: use one kind"
                )
        attachment = Attachment(pipe, models, processor)
        return attachment
    for model in models.values():
        _detach(model)
    if processor is None:
        return None
    for name, model in models.items():
        if not hasattr(model, "set_attn_processor"):
            raise TypeError(
                f"{type(processor).__name__} is not a method of diffattn, and {name}, a"
                f" {type(model).__name__}, has no set_attn_processor of its own to take it"
            )
        # diffusers empties the dict it is given.
        model.set_attn_processor(dict(processor) if isinstance(processor, dict) else processor)
    return None


@dataclass
class Description:
    """What an attachment does in a run of a given size and length.

    Attributes:
        method: the method with every parameter resolved for this model and size.
        density: fraction of the token pairs that attend in a sparse call, text included; None
            for a method whose pairs depend on the data.
        visited_density: fraction of the blocks that a sparse call computes.
        sites: attention modules that are attached, over all denoisers.
        layers: blocks of one denoiser.
        dense_layers, dense_steps, last_dense_steps: how many stay dense.
        num_steps: length of the run.
    """

    method: Method
    density: float | None
    visited_density: float | None
    sites: int
    layers: int
    dense_layers: int
    dense_steps: int
    last_dense_steps: int
    num_steps: int

    def __str__(self) -> str:
        share = "" if self.density is None else f": {self.density:.1%} of the token pairs attend"
        if self.visited_density is not None:
            share += f", {self.visited_density:.1%} of the blocks are computed"
        return (
            f"{self.method.type} attention{share}; {self.dense_layers} of {self.layers} layers, the"
            f" first {self.dense_steps} and the last {self.last_dense_steps} of {self.num_steps}"
            f" steps stay dense"
        )


class Attachment:
    """A set of methods attached to the denoisers of a pipeline.

    Attributes:
        models: what is attached to each denoiser, by component name.
        clock: where the current denoising run is.
    """

    def __init__(
        self, pipe: Any, models: Mapping[str, torch.nn.Module], methods: Mapping[str, Method]
    ) -> None:
        chosen = {name: _choose(model, methods) for name, model in models.items()}
        _check_all_matched(methods, chosen)
        for model in models.values():
            _detach(model)
        self.clock = RunClock()
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._scheduler: Any = None
        self.models = {
            name: AttachedModel(self, model, family_of(model), pipe, chosen[name])
            for name, model in models.items()
        }
        if pipe is None:
            self._warn_without_pipeline(methods)
        else:
            self.follow_scheduler()

    @property
    def sites(self) -> int:
        """Attention modules attached, over all denoisers."""
        return sum(len(model.sites) for model in self.models.values())

    @property
    def sparse_calls(self) -> int:
        """Attention calls that ran under a method since it was attached; not counted in
        compiled code."""
        return sum(model.sparse_calls for model in self.models.values())

    @property
    def dense_calls(self) -> int:
        """Attention calls of attached sites that the schedule kept dense; not counted in
        compiled code."""
        return sum(model.dense_calls for model in self.models.values())

    def remove(self) -> None:
        """Put back what was there before."""
        for model in self.models.values():
            model.remove()
        self._leave_scheduler()

    def describe(self, grid: TokenGrid, num_steps: int) -> Description:
        """What happens in a run over `grid` of `num_steps` denoising steps.

        With several methods attached, it is the first one's.
        """
        model = next(model for model in self.models.values() if model.groups)
        method = model.groups[0].chosen.for_model(model.variant, grid)
        density = visited = None
        if isinstance(method, StaticMaskMethod):
            mask = method.mask(grid)
            density = mask.density
            visited = mask.blocks(method.block_size_on(grid)).density
        return Description(
            method=method,
            density=density,
            visited_density=visited,
            sites=self.sites,
            layers=model.layers,
            dense_layers=min(method.dense_layers or 0, model.layers),
            dense_steps=resolve_steps(method.dense_steps or 0, num_steps),
            last_dense_steps=resolve_steps(method.last_dense_steps, num_steps),
            num_steps=num_steps,
        )

    def follow_scheduler(self) -> None:
        """Count the steps of the pipeline's scheduler, also when the user has put in another."""
        pipe = self._pipe() if self._pipe is not None else None
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None or scheduler is self._scheduler:
            return
        self._leave_scheduler()
        self._scheduler = scheduler
        clock, refresh = self.clock, self.refresh
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        @functools.wraps(set_timesteps)
        def counted_set_timesteps(*args: Any, **kwargs: Any) -> Any:
            out = set_timesteps(*args, **kwargs)
            clock.start(len(scheduler.timesteps))
            refresh()
            return out

        @functools.wraps(step)
        def counted_step(*args: Any, **kwargs: Any) -> Any:
            out = step(*args, **kwargs)
            clock.advance()
            refresh()
            return out

        scheduler.set_timesteps, scheduler.step = counted_set_timesteps, counted_step
        # A scheduler put in between two runs may have its timesteps already.
        timesteps = getattr(scheduler, "timesteps", None)
        self.clock.start(0 if timesteps is None else len(timesteps))
        self.refresh()

    def refresh(self) -> None:
        """Bring every group up to date with the clock and the grid."""
        for model in self.models.values():
            for group in model.groups:
                group.refresh(self.clock)

    def _leave_scheduler(self) -> None:
        if self._scheduler is not None:
            # The wrappers are instance attributes over the class's methods.
            for name in ("set_timesteps", "step"):
                self._scheduler.__dict__.pop(name, None)
            self._scheduler = None

    def _warn_without_pipeline(self, methods: Mapping[str, Method]) -> None:
        for model in self.models.values():
            for method in methods.values():
                resolved = method.for_model(model.variant)
                if resolved.dense_steps or resolved.last_dense_steps:
                    warnings.warn(
                        f"{method.type} keeps {resolved.dense_steps} (first) and"
                        f" {resolved.last_dense_steps} (last) denoising steps dense, but without a"
                        f" pipeline there are no steps to count: every call is sparse. Attach it to"
                        f" the pipeline, or pass dense_steps=0 to say so",
                        stacklevel=4,
                    )
                    return


@dataclass(eq=False)
class Group:
    """Sites that always do the same: one backend serves them, so that compiled code is shared.

    Attributes:
        chosen: the method as the user gave it.
        layer: block index of the first of its sites.
        previous: the backend these sites had before, None for diffusers' active one.
        member: our backend.
        method: `chosen` with its parameters resolved for the current grid; None before a call.
        site: what `method` is told about the call.
        sparse: whether calls go to `method` now, or to `previous`.
    """

    chosen: Method
    layer: int
    previous: Any
    member: Any = None
    method: Method | None = None
    site: Site | None = None
    sparse: bool = True

    def refresh(self, clock: RunClock) -> None:
        if self.method is not None:
            self.sparse = self.layer >= (self.method.dense_layers or 0) and not clock.is_dense_step(
                self.method.dense_steps or 0, self.method.last_dense_steps
            )


@dataclass(frozen=True)
class AttachedSite:
    """One attention module, the processor it had and the one it has now."""

    module: torch.nn.Module
    original: Any
    processor: Any
    member: Any


class AttachedModel:
    """What is attached to one denoiser.

    Attributes:
        variant: the model's name in the tables of recommended settings.
        layers: number of blocks that have sites.
        groups: the sites by what they do.
        sites: the attached modules by name.
        grid: the tokens of the current call; None before the first.
        sparse_calls, dense_calls: calls counted since attaching.
    """

    def __init__(
        self,
        attachment: Attachment,
        model: torch.nn.Module,
        family: Family,
        pipe: Any,
        chosen: Mapping[str, Method],
    ) -> None:
        self.attachment = attachment
        self.family = family
        self.variant = family.variant(pipe, model)
        self.grid: TokenGrid | None = None
        self.groups: list[Group] = []
        self.sites: dict[str, AttachedSite] = {}
        self.sparse_calls = self.dense_calls = 0
        self._model = model
        self._resolved: dict[tuple[int, TokenGrid], Method] = {}
        self._calls_this_forward = 0
        self._first_forward = True
        self._reported = False
        layers = {name: _layer(family, name) for name in _sites(model, family)}
        self.layers = max(layers.values()) + 1
        for name, method in chosen.items():
            self._attach(name, model.get_submodule(name), method, layers[name])
        self._hooks = (
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        )
        model.__dict__[_ATTRIBUTE] = self

    def remove(self) -> None:
        for site in self.sites.values():
            # A processor that somebody has put there since is theirs to keep.
            if site.module.processor is site.processor:
                _set_processor(site.module, site.original)
        for group in self.groups:
            _compat.unregister_backend(group.member)
        for hook in self._hooks:
            hook.remove()
        self._model.__dict__.pop(_ATTRIBUTE, None)

    def _attach(self, name: str, module: torch.nn.Module, method: Method, layer: int) -> None:
        original: Any = module.processor
        if not _compat.uses_dispatch(original):
            raise ValueError(
                f"{name} has a {type(original).__name__}, which does not call diffusers' attention"
                f" dispatch; put the model's own processor back before attaching"
            )
        group = self._group(method, layer, _compat.processor_backend(original))
        processor = copy.copy(original)
        _compat.set_processor_backend(processor, group.member)
        _set_processor(module, processor)
        self.sites[name] = AttachedSite(module, original, processor, group.member)

    def _group(self, method: Method, layer: int, previous: Any) -> Group:
        """The group of a site: layers that may be dense on their own have one each."""
        single = method.dense_layers
        layer = min(layer, method.most_dense_layers if single is None else single)
        for group in self.groups:
            if group.chosen is method and group.layer == layer and group.previous is previous:
                return group
        group = Group(method, layer, previous)
        group.member = _compat.register_backend(self._backend(group))
        self.groups.append(group)
        return group

    def _backend(self, group: Group) -> _compat.BackendFunction:
        def diffattn_backend(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | BlockMask | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
            _parallel_config: Any = None,
        ) -> torch.Tensor:
            self_attention = query.shape[1] == key.shape[1] and not is_causal
            if not (self_attention and group.sparse) or isinstance(attn_mask, BlockMask):
                self._count(sparse=False)
                return _compat.dispatch(
                    query,
                    key,
                    value,
                    backend=group.previous,
                    attn_mask=attn_mask,
                    dropout_p=dropout_p,
                    is_causal=is_causal,
                    scale=scale,
                    enable_gqa=enable_gqa,
                    _parallel_config=_parallel_config,
                )
            if _parallel_config is not None:
                raise NotImplementedError(
                    "diffattn does not work with diffusers' context parallelism yet: call"
                    " set_attn_processor(None), or do not call enable_parallelism"
                )
            if dropout_p:
                raise ValueError(f"dropout_p is {dropout_p}, but sparse attention has no dropout")
            if group.method is None or group.site is None:
                raise RuntimeError(
                    "an attached attention module was called outside of its model's forward, so its"
                    " token grid is unknown; call the model, or set_attn_processor(None)"
                )
            if query.shape[1] != group.site.grid.tokens:
                raise RuntimeError(
                    f"the attention call has {query.shape[1]} tokens, but the model's input makes a"
                    f" grid of {group.site.grid} = {group.site.grid.tokens} tokens"
                )
            self._count(sparse=True)
            return group.method.attend(
                query, key, value, group.site, scale=scale, key_mask=_key_mask(attn_mask, key)
            )

        return diffattn_backend

    def _count(self, *, sparse: bool) -> None:
        # Compiled code would be specialised to the count.
        if not torch.compiler.is_compiling():
            self._calls_this_forward += 1
            self.sparse_calls += sparse
            self.dense_calls += not sparse

    def _before_forward(self, model: torch.nn.Module, args: Any, kwargs: Any) -> None:
        grid = self.family.grid(model, args, kwargs)
        if not torch.compiler.is_compiling():
            self.attachment.follow_scheduler()
            self._calls_this_forward = 0
        if grid == self.grid:
            return
        self.grid = grid
        for index, group in enumerate(self.groups):
            if (index, grid) not in self._resolved:
                self._resolved[index, grid] = group.chosen.for_model(self.variant, grid)
            group.method = self._resolved[index, grid]
            group.site = Site(self.family.name, group.layer, self.layers, grid)
            group.refresh(self.attachment.clock)

    def _after_forward(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._reported:
            return
        lost = [
            name
            for name, site in self.sites.items()
            if site.module.processor is not site.processor
            or _compat.processor_backend(site.processor) is not site.member
        ]
        what = ""
        if lost:
            what = (
                f"{len(lost)} of {len(self.sites)} attention sites of {type(model).__name__} are no"
                f" longer attached ({lost[0]}, ...): something has set another processor or backend"
                f" on them"
            )
        elif self._first_forward and self._calls_this_forward != len(self.sites):
            what = (
                f"{type(model).__name__} made {self._calls_this_forward} attention calls through"
                f" diffattn where it has {len(self.sites)} attached sites"
            )
        self._first_forward = False
        if what:
            self._reported = True
            warnings.warn(
                f"{what}. Call set_attn_processor with your method again, after such changes",
                stacklevel=2,
            )


def _split(target: Any) -> tuple[Any, dict[str, torch.nn.Module]]:
    """(pipeline or None, denoisers) of what the user wants to attach to."""
    if isinstance(target, torch.nn.Module):
        return None, {"model": target}
    return target, denoisers(target)


def _sites(model: torch.nn.Module, family: Family) -> list[str]:
    names = [name for name, _ in model.named_modules() if family.sites.fullmatch(name)]
    if not names:
        raise ValueError(
            f"no attention site of {type(model).__name__} has a name like {family.sites.pattern}"
        )
    return names


def _layer(family: Family, name: str) -> int:
    match = family.sites.fullmatch(name)
    assert match is not None
    return int(match["layer"])


def _choose(model: torch.nn.Module, methods: Mapping[str, Method]) -> dict[str, Method]:
    """The method of each site that a pattern matches."""
    chosen = {}
    for name in _sites(model, family_of(model)):
        for pattern, method in methods.items():
            if _matches(name, pattern):
                chosen[name] = method
                break
    return chosen


def _matches(name: str, pattern: str) -> bool:
    """Does a pattern name this module, or a module that it is part of?"""
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def _check_all_matched(
    methods: Mapping[str, Method], chosen: Mapping[str, Mapping[str, Method]]
) -> None:
    names = [name for sites in chosen.values() for name in sites]
    for pattern in methods:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(
                f"no attention site matches the pattern {pattern!r}: {nearest(pattern, names)}"
            )


def _set_processor(module: torch.nn.Module, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def _detach(model: torch.nn.Module) -> None:
    attached = model.__dict__.get(_ATTRIBUTE)
    if attached is not None:
        attached.attachment.remove()


def _key_mask(attn_mask: Any, key: torch.Tensor) -> torch.Tensor | None:
    """Reduce the padding masks that models pass to bool (batch, tokens): False hides a key."""
    if attn_mask is None:
        return None
    batch, tokens = key.shape[:2]
    shape = tuple(attn_mask.shape)
    if (
        attn_mask.dtype == torch.bool
        and shape[-1] == tokens
        and shape
        in (
            (batch, tokens),
            (batch, 1, 1, tokens),
            (1, 1, 1, tokens),
        )
    ):
        return attn_mask.reshape(-1, tokens).expand(batch, tokens)
    raise ValueError(
        f"the model passes an attention mask of {attn_mask.dtype} {shape}, which cannot be combined"
        f" with a sparse method; only padding masks over keys can: bool ({batch}, {tokens}) or"
        f" ({batch}, 1, 1, {tokens})"
    )


_compat.add_pipeline_method("set_attn_processor", set_attn_processor)
