"""What is done to one denoiser: its attention sites, their backends, the grid of a call.

The stock attention processors stay in place. Each video self-attention site gets a copy of its own
processor whose last step, diffusers' dispatch call, goes to a private backend of ours; nothing
process-wide changes.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.hooks import RemovableHandle

from diffattn import _compat
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.methods.base import (
    Adaptation,
    Method,
    Site,
    SiteWeights,
    StaticMaskMethod,
    is_mask_alone,
)
from diffattn.methods.token_merging import Merging
from diffattn.models import Family
from diffattn.models.base import argument
from diffattn.models.twins import dispatching
from diffattn.orders import TileOrder
from diffattn.parallel import attend_queries, attend_sharded, gather_tables
from diffattn.schedule import RunClock
from diffattn.traced import remember, traced_attention, traced_method

_ATTRIBUTE = "_diffattn_attached"

# Backends of models that are gone; they leave diffusers' registry when the next ones come.
_retired: list[Any] = []


class Owner(Protocol):
    """What attached denoisers share: the attachment of their pipeline."""

    clock: RunClock

    def follow_scheduler(self) -> None: ...

    def remove(self) -> None: ...


@dataclass(eq=False)
class Group:
    """Sites that always do the same: one backend serves them, so that compiled code is shared.

    diffusers' registry keeps a group alive as long as its model, so it holds nothing of the model.

    Attributes:
        chosen: the method as the user gave it.
        family: the family of its model.
        variant: the model's name in the tables of recommended settings.
        kind: by how many layers it starts, up to where all are sparse, and `Method.layer_kind`.
        layer: block index of the first of its sites.
        layers: number of blocks of its model.
        previous: the backend these sites had before, None for diffusers' active one.
        member: our backend.
        method: `chosen` with its parameters resolved, for the current grid once there is one.
        video: the video tokens of the current call, without text; None before a call.
        reordered: the order that the tokens of the current forward are in; None is the model's own.
        weights, rotary, merging: at the site whose call is running, see `Site`.
        sparse: whether calls go to `method` now, or to `previous`.
        serial: by which number code being compiled finds this group.
        sparse_calls, dense_calls: calls counted since attaching, except in compiled code.
    """

    chosen: Method
    family: Family
    variant: str
    kind: tuple[int, int]
    layer: int
    layers: int
    previous: Any
    member: Any = None
    method: Method = field(init=False)
    video: TokenGrid | None = None
    reordered: TileOrder | None = None
    weights: SiteWeights | None = None
    rotary: Any = None
    merging: Merging | None = None
    sparse: bool = True
    serial: int = field(init=False)
    sparse_calls: int = 0
    dense_calls: int = 0
    _methods: dict[TokenGrid, Method] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.method = self.chosen.for_model(self.variant)
        self.serial = remember(self)

    def use(self, grid: TokenGrid) -> None:
        """Make `grid` the video tokens of the calls to come."""
        self.video = grid
        # Resolving parameters cannot be traced: compiled code does it when it runs, in `layout`.
        if not torch.compiler.is_compiling():
            self.method = self._method_on(grid)

    def order(self, grid: TokenGrid) -> TileOrder | None:
        """The order that a method with a static mask cuts the tokens of `grid` into blocks in."""
        return self._static_method().order(grid)

    def layout(
        self, grid: TokenGrid, device: torch.device, order: TileOrder | None = None
    ) -> BlockLayout:
        """The blocks of a call over `grid`, text included, under a method with a static mask."""
        return self._static_method().layout(grid, device, order)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: TokenGrid,
        *,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention by a method that is traced as a whole, of a call over `grid`."""
        assert self.video is not None
        site = Site(self.family.name, self.layer, self.layers, grid)
        method = self._method_on(self.video)
        return method.attend(query, key, value, site, scale=scale, key_mask=key_mask)

    def _static_method(self) -> StaticMaskMethod:
        assert self.video is not None
        method = self._method_on(self.video)
        assert isinstance(method, StaticMaskMethod)
        return method

    def _method_on(self, video: TokenGrid) -> Method:
        if video not in self._methods:
            self._methods[video] = self.chosen.for_model(self.variant, video)
        return self._methods[video]

    def refresh(self, clock: RunClock) -> None:
        """Decide between sparse and dense for the calls to come."""
        self.sparse = self.layer >= (self.method.dense_layers or 0) and not clock.is_dense_step(
            self.method.dense_steps or 0, self.method.last_dense_steps
        )

    def count(self, *, sparse: bool) -> None:
        # Compiled code would be specialised to the count.
        if not torch.compiler.is_compiling():
            self.sparse_calls += sparse
            self.dense_calls += not sparse

    def site(self, tokens: int) -> Site:
        """What the method is told of a call over `tokens` tokens, text included."""
        if self.video is None:
            raise RuntimeError(
                "an attached attention module was called outside of its model's forward, so its"
                " token grid is unknown; call the model, or set_attn_processor(None)"
            )
        if self.merging is not None:
            # What is left of merged tokens is no rectangle.
            row = TokenGrid(1, 1, tokens)
            return Site(
                self.family.name,
                self.layer,
                self.layers,
                row,
                weights=self.weights,
                merging=self.merging,
            )
        text = tokens - self.video.tokens
        if text < 0 or (text > 0 and self.family.text is None):
            raise RuntimeError(
                f"the attention call has {tokens} tokens, but the model's input makes a grid of"
                f" {self.video} = {self.video.tokens} tokens"
            )
        grid = self.video
        if text:
            before = text if self.family.text == "before" else 0
            grid = TokenGrid(grid.frames, grid.height, grid.width, before, text - before)
        order = self.reordered
        if order is not None and order.grid != grid:
            raise RuntimeError(
                f"the attention call is over {grid}, but this forward has put tokens of"
                f" {order.grid} in another order"
            )
        return Site(
            self.family.name, self.layer, self.layers, grid, order, self.weights, self.rotary
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """A group of the same kind for the same sites of a copied model."""
        copied = Group(
            self.chosen, self.family, self.variant, self.kind, self.layer, self.layers,
            self.previous,
        )  # fmt: skip
        copied.member = _compat.register_backend(_backend(copied))
        memo[id(self.member)] = copied.member
        if self.video is not None:
            copied.use(self.video)
        copied.refresh(RunClock())
        return copied


@dataclass(frozen=True)
class AttachedSite:
    """One attention module, the processor it had and the one it has now.

    `weights` is the name of the submodule that its method has added, if it has.
    """

    module: torch.nn.Module
    original: Any
    processor: Any
    member: Any
    weights: str | None


@dataclass
class _Inside:
    """The grid that sites inside of a module have by its calls."""

    attached: AttachedModel
    grid: TokenGrid | None = None

    def learn(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self.grid = self.attached.family.grid(module, args, kwargs)

    # Gradient checkpointing calls sites again when other modules have run since.
    def use(self, *_: Any) -> None:
        if self.grid is not None:
            self.attached._use(self.grid)


@dataclass(frozen=True)
class _WeightsOfCall:
    """Tells a group whose sites have weights of its method's which of them is being called."""

    group: Group
    name: str

    def begin(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        weights: Any = module.get_submodule(self.name)
        self.group.weights = weights
        rotary = self.group.family.rotary
        self.group.rotary = None if rotary is None else argument(args, kwargs, *rotary)

    def end(self, *_: Any) -> None:
        self.group.weights = self.group.rotary = None


class AttachedModel:
    """What is attached to one denoiser.

    Attributes:
        variant: the model's name in the tables of recommended settings.
        layers: number of blocks that have sites.
        groups: the sites by what they do.
        sites: the attached modules by name.
        grid: the tokens of the current call; None before the first.
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
        # All are made before one is set: an error leaves the model as it was.
        processors = {name: dispatching(name, modules[name].processor) for name in chosen}
        self._adaptations = _adaptations(model, chosen)
        for adaptation in self._adaptations:
            adaptation.apply()
        for name, method in chosen.items():
            self._attach(name, modules[name], processors[name], method, layers[name])
        # A model that is dropped while attached takes its backends with it, but not at once: that
        # may be in the middle of a compilation, which has looked at the registry.
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
        """Put back what the model had before."""
        for site in self.sites.values():
            # A processor that somebody has put there since is theirs to keep.
            if site.module.processor is site.processor:
                # Parallelism may have been enabled since: the model stays parallel.
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
        """The group of a site: layers that may be dense on their own have one each."""
        single = method.dense_layers
        dense = min(layer, method.most_dense_layers if single is None else single)
        kind = dense, method.layer_kind(layer)
        for group in self.groups:
            if group.chosen is method and group.kind == kind and group.previous is previous:
                return group
        group = Group(method, self.family, self.variant, kind, layer, self.layers, previous)
        _unregister_retired()
        group.member = _compat.register_backend(_backend(group))
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
        """Put the tokens of a forward in the order that its blocks are cut in, if there is one.

        Returns:
            The arguments of the forward with their tokens in that order, None to leave them.
        """
        self._end_flow()  # that of a forward that was interrupted
        order = self._order_throughout(args, kwargs)
        flow = self.family.flow
        if order is None or flow is None:
            return None
        for group in self.groups:
            group.reordered = order
        self._flow_hooks = flow.follow(order, self._model)
        return flow.enter(order, args, kwargs)

    def _end_flow(self, *_: Any) -> None:
        """Leave no trace of `_begin_flow`, also where a forward fails."""
        if torch.compiler.is_compiling():
            return
        for hook in self._flow_hooks:
            hook.remove()
        self._flow_hooks = []
        for group in self.groups:
            group.reordered = None

    def _order_throughout(self, args: Any, kwargs: Any) -> TileOrder | None:
        """The order that a whole forward may be in; None where each call has to see to its own."""
        flow, grid = self.family.flow, self.grid
        if (
            flow is None
            or grid is None
            or type(self._model).__name__ != flow.model_class
            # What is run again for the backward pass, by whatever kind of checkpointing, would not
            # know which order its tokens were in.
            or torch.is_grad_enabled()
            or not any(group.sparse for group in self.groups)
            or (flow.interrupted is not None and flow.interrupted(self._model, args, kwargs))
        ):
            return None
        if flow.text is not None:
            text = argument(args, kwargs, *flow.text).shape[1]
            before = text if self.family.text == "before" else 0
            grid = replace(grid, text_before=before, text_after=text - before)
        order = self._common_order(grid)
        return None if order is None or self._is_watched() or self._is_parallel() else order

    def _common_order(self, grid: TokenGrid) -> TileOrder | None:
        """The order that all attached methods want the tokens of `grid` in, if it is the same."""
        orders = set()
        for group in self.groups:
            if not is_mask_alone(group.method):
                return None
            if not group.method.any_order:
                orders.add(group.method.order(grid))
        return orders.pop() if len(orders) == 1 else None

    def _is_watched(self) -> bool:
        """Does code that counts on the model's own order see what passes between its modules?"""
        inside = (module for module in self._model.modules() if module is not self._model)
        return (
            len(self._model._forward_pre_hooks) > 1  # besides ours
            or _compat.is_watched(self._model)
            or any(
                module._forward_pre_hooks
                or module._forward_hooks
                or _compat.is_watched(module)
                or _has_foreign_processor(module)
                for module in inside
            )
        )

    def _is_parallel(self) -> bool:
        """Is the sequence spread over processes?"""
        processor = next(iter(self.sites.values())).processor
        config = _compat.processor_parallelism(processor)
        return _compat.context_parallel(config) is not None

    def _follow(self, name: str, module: torch.nn.Module) -> None:
        """Give the sites inside of a module the grid of its calls."""
        sites = [site.module for key, site in self.sites.items() if key.startswith(name + ".")]
        inside = _Inside(self)
        if sites:
            self._hooks.append(module.register_forward_pre_hook(inside.learn, with_kwargs=True))
        # Others want to know the grid already.
        self._hooks += [site.register_forward_pre_hook(inside.use, prepend=True) for site in sites]

    def group_at(self, name: str) -> Group | None:
        """The group of the site of a name; None where nothing is attached."""
        member = self.sites[name].member if name in self.sites else None
        return next((group for group in self.groups if group.member is member), None)

    def is_copied(self, memo: dict[int, Any]) -> bool:
        """Is the denoiser in the memo of a deep copy?"""
        return id(self._model) in memo

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedModel:
        """Comes with a deep copy of the denoiser, which gets groups and backends of its own."""
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
        """Make `grid` that of the attention calls to come."""
        if grid == self.grid:
            return
        self.grid = grid
        for group in self.groups:
            group.use(grid)
            group.refresh(self.owner.clock)

    def _why_lost(self, name: str) -> str:
        """What has disconnected a site since it was attached; empty while it is connected."""
        site = self.sites[name]
        module: Any = site.module
        if not self._is_in_place(name, module):
            return "its block was exchanged"
        if module.processor is not site.processor:
            return (
                f"it was given a {type(module.processor).__name__}{self._culprit(module.processor)}"
            )
        if _compat.processor_backend(site.processor) is not site.member:
            return "set_attention_backend gave it another backend"
        return ""

    def _is_in_place(self, name: str, module: torch.nn.Module) -> bool:
        """Is a site still part of the model? FreeNoise's split inference wraps what it is in."""
        try:
            if self._model.get_submodule(name) is module:
                return True
        except AttributeError:
            pass
        return any(part is module for part in self._model.modules())

    def _culprit(self, processor: Any) -> str:
        """Which call of diffusers has put a processor of this kind in place, if it can be told."""
        name = type(processor).__name__
        if name.startswith("Fused"):
            return " by fuse_qkv_projections"
        if "XFormers" in name:
            return " by enable_xformers_memory_efficient_attention"
        if "Sliced" in name:
            return " by enable_attention_slicing"
        # Self-attention gets a new processor of the class it had.
        others = [type(getattr(module, "processor", None)) for module in self._model.modules()]
        return " by load_ip_adapter" if any("IPAdapter" in o.__name__ for o in others) else ""

    def _after_forward(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._reported:
            return
        lost = {name: why for name in self.sites if (why := self._why_lost(name))}
        what = ""
        calls = self.sparse_calls + self.dense_calls - self._calls_before
        if lost:
            name, why = next(iter(lost.items()))
            what = (
                f"{len(lost)} of {len(self.sites)} attention sites of {type(model).__name__} are no"
                f" longer attached: {why} ({name})"
            )
        # Several calls of each site are right: FreeNoise's split inference makes them in parts.
        elif self._first_forward and _uneven(calls, len(self.sites)) and not _has_compiled(model):
            what = (
                f"{type(model).__name__} made {calls} attention calls through diffattn where it has"
                f" {len(self.sites)} attached sites"
            )
        self._first_forward = False
        if what:
            self._reported = True
            warnings.warn(
                f"{what}. Call set_attn_processor with your method again, after such changes",
                stacklevel=2,
            )


def _adaptations(model: torch.nn.Module, chosen: Mapping[str, Method]) -> list[Adaptation]:
    """What the methods of a denoiser's sites change in it besides; at most one thing."""
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


def _backend(group: Group) -> _compat.BackendFunction:
    """The function that diffusers' dispatch calls for the sites of a group."""

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
        over = _compat.context_parallel(_parallel_config)
        ordinary = (
            query.shape[1] == key.shape[1]
            and not is_causal
            and not isinstance(attn_mask, BlockMask)
        )
        sparse = ordinary and group.sparse
        if group.reordered is not None and not sparse and query.shape[1] == key.shape[1]:
            _check_any_order(attn_mask, is_causal, key, group.family.padding)
        group.count(sparse=sparse)
        masked = attn_mask is not None
        if not sparse and not (ordinary and over and over.exceeds(group.previous, masked)):
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
        if dropout_p:
            raise ValueError(f"dropout_p is {dropout_p}, but sparse attention has no dropout")
        key_mask = _key_mask(attn_mask, key, group.family.padding)
        attend = partial(_attend_sparse if sparse else _attend_dense, group, scale)
        if over is None:
            return attend(query, key, value, key_mask, None)
        assert group.video is not None
        if sparse and over.ulysses_degree > 1 and not group.method.heads_apart:
            raise NotImplementedError(
                f"{group.method.type} attention with these parameters looks at all heads together,"
                f" but Ulysses gives each process some of them; use a method or parameters that"
                f" look at each head by itself"
            )
        sequence: Any = {
            "over": over,
            "video_tokens": group.video.tokens,
            "text_first": group.family.text == "before",
        }
        if sparse and group.rotary is not None:
            group.rotary = gather_tables(group.rotary, query, **sequence)
        return attend_sharded(query, key, value, key_mask, attend=attend, **sequence)

    return diffattn_backend


def _check_any_order(attn_mask: Any, is_causal: bool, key: torch.Tensor, padding: str) -> None:
    """Raise unless dense attention under this mask is the same for tokens in another order."""
    if is_causal or isinstance(attn_mask, BlockMask):
        raise RuntimeError(
            "this attention call is causal or has a BlockMask, which is about tokens in the model's"
            " own order, but the forward has put them in another"
        )
    _key_mask(attn_mask, key, padding)


def _attend_sparse(
    group: Group,
    scale: float | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    queries: tuple[range, ...] | None,
) -> torch.Tensor:
    """Attention by the group's method, for some positions of the sequence or for all."""
    site = group.site(key.shape[1])
    if queries is not None:
        return attend_queries(
            group.method, query, key, value, site, queries, scale=scale, key_mask=key_mask
        )
    if torch.compiler.is_compiling() and is_mask_alone(group.method):
        return traced_attention(
            query,
            key,
            value,
            site.grid,
            group.serial,
            scale=group.method.score_scale(site.grid, query.shape[-1], scale),
            key_mask=key_mask,
            order=site.order,
        )
    if torch.compiler.is_compiling() and group.method.traced_whole:
        return traced_method(
            query, key, value, site.grid, group.serial, scale=scale, key_mask=key_mask
        )
    return group.method.attend(query, key, value, site, scale=scale, key_mask=key_mask)


def _attend_dense(
    group: Group,
    scale: float | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    queries: tuple[range, ...] | None,
) -> torch.Tensor:
    """Dense attention by the backend that the group's sites had before."""
    attn_mask = None if key_mask is None else key_mask[:, None, None, :]
    return _compat.dispatch(
        query, key, value, backend=group.previous, attn_mask=attn_mask, scale=scale
    )


def _uneven(calls: int, sites: int) -> bool:
    """Have some sites not been called, or fewer times than others?"""
    return calls == 0 or calls % sites != 0


def _has_compiled(model: torch.nn.Module) -> bool:
    """Is a part of the model compiled? Its calls are not counted."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def _has_foreign_processor(module: torch.nn.Module) -> bool:
    """Does a module attend by code that is neither diffusers' nor ours?"""
    processor = module.__dict__.get("processor") or module._modules.get("processor")
    package = type(processor).__module__.partition(".")[0]
    return processor is not None and package not in ("diffusers", "diffattn")


def _unregister_retired() -> None:
    while _retired:
        _compat.unregister_backend(_retired.pop())


def attached_to(model: torch.nn.Module) -> AttachedModel | None:
    """What is attached to a denoiser."""
    return model.__dict__.get(_ATTRIBUTE)


def site_names(model: torch.nn.Module, family: Family) -> list[str]:
    """Names of the modules of a denoiser that do video self-attention."""
    names = list(family.layers(model))
    if not names:
        raise ValueError(
            f"no attention site of {type(model).__name__} has a name like {family.sites.pattern}"
        )
    return names


def set_processor(module: torch.nn.Module, processor: Any) -> None:
    """Put a processor on an attention module, whether or not it has a method for that."""
    set_it: Any = getattr(module, "set_processor", None)
    if set_it is None:
        module.processor = processor
    else:
        set_it(processor)


def _key_mask(attn_mask: Any, key: torch.Tensor, padding: str) -> torch.Tensor | None:
    """Reduce the padding masks that models pass to bool (batch, tokens): False hides a key.

    Args:
        padding: how the model writes them, see `Family`.
    """
    if attn_mask is None:
        return None
    batch, tokens = key.shape[:2]
    shape = tuple(attn_mask.shape)
    by_key = shape in ((batch, tokens), (batch, 1, 1, tokens), (1, 1, 1, tokens))
    if attn_mask.dtype == torch.bool and by_key:
        return attn_mask.reshape(-1, tokens).expand(batch, tokens)
    by_pair = shape == (batch, 1, tokens, tokens)
    if attn_mask.dtype == torch.bool and by_pair and padding == "pairs":
        # The first token is one of the video: it sees every key that counts.
        return attn_mask[:, 0, 0]
    per_head = len(shape) == 4 and (shape[0], *shape[2:]) == (batch, 1, tokens)
    if attn_mask.dtype.is_floating_point and per_head and padding == "bias":
        return attn_mask[:, 0, 0] == 0
    raise ValueError(
        f"the model passes an attention mask of {attn_mask.dtype} {shape}, which cannot be combined"
        f" with a sparse method; only padding masks over keys can: bool ({batch}, {tokens}) or"
        f" ({batch}, 1, 1, {tokens})"
    )
