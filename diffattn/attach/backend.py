"""The function that diffusers' attention dispatch calls for attached sites, and its state.

diffusers calls a backend with tensors alone. The group of a site holds the method. The running call
holds the rest: the grid, and the position in the denoising run.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.attention.flex_attention import BlockMask

from diffattn import _compat
from diffattn.attach.compiled import remember, traced_attention, traced_method
from diffattn.attach.context_parallel import attend_queries, attend_sharded, gather_tables
from diffattn.attach.run_clock import RunClock
from diffattn.attach.running_call import Call, running_call
from diffattn.attach.some_queries import attend_some, attend_whole
from diffattn.blocks import BlockLayout
from diffattn.counting import watching
from diffattn.grid import TokenGrid
from diffattn.interception import modes_are_active
from diffattn.methods.agent.merging import Merging
from diffattn.methods.base import (
    Compiled,
    Method,
    Site,
    SiteWeights,
    StaticMaskMethod,
    attends_by_mask_alone,
    attends_by_mask_throughout,
)
from diffattn.methods.by_step import forget_oldest
from diffattn.methods.memory import CallMemory
from diffattn.models import Family
from diffattn.models.base import Part
from diffattn.orders import TileOrder
from diffattn.schedule import Moment, is_dense_at

# Threads count their calls of a group one after another.
_counting = threading.Lock()


@dataclass(eq=False)
class Group:
    """The sites of a denoiser that always behave alike, and their backend.

    Sites belong to one group when they have the same method, the same `kind`, the same `part` and
    the same `previous` backend. One backend serves all sites of a group, so that they share
    compiled code.

    A group holds nothing that differs between calls: `video`, `order` and the like are those of the
    call that runs in the context of the reader, or of the last call where none does.

    Compiled code finds its group by a serial number. It can hold a number as a constant, but not
    the group itself, because an operator of torch takes no Python objects. When the code runs, it
    looks up the number in the table of `compiled.remember`. The group found there gives the layout
    of the running call, or attends by its method. So compiled code depends on no grid. Code that
    Dynamo traces cannot read the running call. It reads `last`, `sparse_now` and `method_now`,
    which the denoiser sets before each forward.

    The method may differ from step to step, even in its class (`Method.at_step`). Compiled code
    looks up the step when it runs, too, and the operators of its gradients take the step from their
    forward (`at`). A method that is traced would be compiled anew for each step. Such a method is
    called as one operator or, with weights of its own, outside of compiled code.

    diffusers' registry of backends holds the group. The group holds no reference to its model,
    because the registry would then keep the model alive.

    Attributes:
        chosen: the method as the user passed it, before its parameters are resolved.
        family: the family of the model.
        variant: the model's name in the tables of recommended settings.
        kind: two numbers that all layers of the group have in common. The first is the smaller of
            the block's index and the number of blocks that may stay dense. So each block that may
            stay dense has a group of its own, and the blocks after them have equal numbers. The
            second is the method's `layer_kind` of the block.
        layer: block index of the group's first site.
        layers: number of blocks of the model.
        previous: the backend that the sites had before attaching, to which dense calls still go;
            None for diffusers' active backend.
        model: serial number of the attached denoiser, by which the running call is found.
        part: gives the tokens of the sites' calls from those of the denoiser's call; None for all.
        member: the group's own backend, as a member of diffusers' enumeration of backends. The
            processors of the sites are set to it.
        compiled_as: how compiled code calls the method: by the operator for attention under a mask
            alone, or see `Compiled`.
        last: the state of the last call that began, without the order of its tokens; None before
            any.
        method_now, sparse_now: `method` and `sparse` of the last call that began.
        traced_grid: the grid of the site whose call is traced, where grids differ inside a model;
            None outside of a trace.
        was_traced: whether calls have been compiled.
        serial: the number by which compiled code finds the group.
        sparse_calls, dense_calls: calls counted since attaching, except in compiled code.
    """

    chosen: Method
    family: Family
    variant: str
    kind: tuple[int, int]
    layer: int
    layers: int
    previous: Any
    model: int
    part: Part | None = None
    member: Any = None
    compiled_as: Compiled | Literal["mask"] = field(init=False)
    last: Call | None = None
    method_now: Method = field(init=False)
    sparse_now: bool = True
    traced_grid: TokenGrid | None = None
    was_traced: bool = False
    serial: int = field(init=False)
    sparse_calls: int = 0
    dense_calls: int = 0
    _methods: dict[tuple[int, TokenGrid | None], Method] = field(default_factory=dict)
    # The keys above are identities, which hold as long as the objects live.
    _keyed: dict[int, Method] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.method_now = self._method_on(None, Moment())
        self.compiled_as = _compiled_as(self.chosen, self.family)
        self.serial = remember(self)

    @property
    def call(self) -> Call | None:
        """The running call of this context; the last call where none is running."""
        if torch.compiler.is_dynamo_compiling():
            return self.last
        return running_call(self.model) or self.last

    @property
    def method(self) -> Method:
        """`chosen` with its parameters resolved, for the grid of the call once there is one."""
        call = None if torch.compiler.is_dynamo_compiling() else self.call
        return self.method_now if call is None else self._method_in(call)

    @property
    def video(self) -> TokenGrid | None:
        """The video tokens of the sites' calls, without text; None before a call."""
        return None if self.call is None else self._video_in(self.call)

    @property
    def sparse(self) -> bool:
        """Whether calls go to `method` at present; otherwise they go to `previous`."""
        call = None if torch.compiler.is_dynamo_compiling() else self.call
        return self.sparse_now if call is None else self.is_sparse_in(call)

    @property
    def merging(self) -> Merging | None:
        """How the tokens of the site's call were merged; None if they were not."""
        return None if self.call is None else self.call.merging

    @merging.setter
    def merging(self, merging: Merging | None) -> None:
        # Code that is traced around the merging reads the last call.
        for call in (self.call, self.last):
            if call is not None:
                call.merging = merging

    def use(self, call: Call) -> None:
        """Be prepared for the attention calls of a forward."""
        self.last = Call(call.clock, call.video)
        self.method_now = self._method_in(call)
        self.sparse_now = self.is_sparse_in(call)

    def is_sparse_in(self, call: Call) -> bool:
        """Whether attention calls of a forward go to the method."""
        method = self._method_in(call)
        return self.layer >= (method.dense_layers or 0) and self._is_sparse_step(method, call)

    def is_sparse_step(self, call: Call) -> bool:
        """Whether the method is sparse, in any layer, in the step that a forward belongs to."""
        return self._is_sparse_step(self._method_in(call), call)

    def _is_sparse_step(self, method: Method, call: Call) -> bool:
        if call.clock.always_dense:
            return False
        if self.chosen.differs_by_step and method.is_dense:
            return False
        return not is_dense_at(call.moment, method.dense_steps or 0, method.last_dense_steps)

    @property
    def moment(self) -> Moment:
        """The position in the denoising run of the running call, or of the last call."""
        return Moment() if self.call is None else self.call.moment

    def at(self, moment: Moment) -> GroupAtStep:
        """What compiled code calls in a step, or in the backward pass of a step."""
        return GroupAtStep(self, moment)

    def _memory(self, call: Call | None, place: torch.Tensor | None) -> CallMemory | None:
        """What the method keeps from step to step of a run at the site with the number `place`."""
        if call is None or place is None or not call.moment.steps:
            return None
        return call.clock.memory.of_call(int(place), *call.moment)

    def positions(self, queries: int, keys: int) -> tuple[slice, ...] | None:
        """Positions in the sequence of the queries of a call with more keys; None if unknown."""
        video = self.video
        if self.family.queries is None or video is None:
            return None
        return self.family.queries(video, queries, keys)

    def is_over_a_part(self, tokens: int) -> bool:
        """Whether a call of a site is over less than the sequence, for models that do such calls.

        Code that is traced asks for grids with tokens before the video alone: such grids belong to
        models that do.
        """
        if self.family.queries is None:
            return False
        video = self.video
        if video is None:
            return False
        if torch.compiler.is_dynamo_compiling() and not video.text_before:
            return False
        return tokens < video.tokens

    def _method_in(self, call: Call) -> Method:
        video = self._video_in(call)
        return self._method_on(None if video is None else video.alone, call.moment)

    def _video_in(self, call: Call) -> TokenGrid | None:
        return call.video if self.part is None or call.video is None else self.part(call.video)

    def _method_on(self, video: TokenGrid | None, moment: Moment) -> Method:
        of_step = self.chosen.at_step(*moment)
        known = id(of_step), video
        found = self._methods.get(known)
        if found is None:
            found = self._settled(of_step.for_model(self.variant, video))
            self._keyed[id(of_step)] = of_step
            self._methods[known] = found
            if self.chosen.differs_by_step:
                forget_oldest(self._methods)
                used = {key for key, _ in self._methods}
                self._keyed = {key: self._keyed[key] for key in used}
        return found

    def _settled(self, method: Method) -> Method:
        """A method that equals `method`, and keeps what methods of other steps have prepared."""
        others = list(self._methods.values())
        for other in reversed(others):
            if other == method:
                return other
        for other in reversed(others):
            if type(other) is type(method):
                method.share(other)
                break
        return method

    def count(self, *, sparse: bool) -> None:
        # Tracing would specialise the code to the count, and compile it again for each count.
        if torch.compiler.is_dynamo_compiling():
            self.was_traced = True
            return
        if self.call is not None:
            self.call.attention_calls += 1
        with _counting:
            self.sparse_calls += sparse
            self.dense_calls += not sparse

    def site(self, tokens: int) -> Site:
        """The `Site` that the method gets for a call over `tokens` tokens, text included.

        Raises:
            RuntimeError: outside of the model's forward, or if the tokens do not fit its grid.
        """
        call = self.call
        video = None if call is None else self._video_in(call)
        if call is None or video is None:
            raise RuntimeError(
                "an attached attention module was called outside of its model's forward, so its"
                " token grid is unknown; call the model, or set_attn_processor(None)"
            )
        if call.merging is not None:
            # The tokens that merging leaves form no rectangle.
            row = TokenGrid(1, 1, tokens)
            return Site(
                self.family.name,
                self.layer,
                self.layers,
                row,
                weights=call.weights,
                merging=call.merging,
            )
        text = tokens - video.tokens
        if text < 0 or (text > 0 and self.family.text is None):
            raise RuntimeError(
                f"the attention call has {tokens} tokens, but the model's input makes a grid of"
                f" {video} = {video.tokens} tokens"
            )
        grid = video
        if text:
            grid = grid.beside(**{self.family.text or "after": text})
        order = call.order
        if order is not None and order.grid != grid:
            raise RuntimeError(
                f"the attention call is over {grid}, but this forward has put tokens of"
                f" {order.grid} in another order"
            )
        memory = None if torch.is_grad_enabled() else self._memory(call, call.place)
        return Site(
            self.family.name, self.layer, self.layers, grid, order, call.weights, call.rotary,
            memory=memory,
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """The group of a copied model's sites, with a backend and a serial number of its own."""
        copied = Group(
            self.chosen, self.family, self.variant, self.kind, self.layer, self.layers,
            self.previous, self.model, self.part,
        )  # fmt: skip
        copied.member = _compat.register_backend(backend_of(copied))
        memo[id(self.member)] = copied.member
        if self.last is not None:
            copied.use(Call(RunClock(), self.last.video))
        return copied


@dataclass(frozen=True)
class GroupAtStep:
    """A group in one step of a run, as compiled code calls it, see `compiled.traced_attention`."""

    group: Group
    moment: Moment

    def order(self, grid: TokenGrid) -> TileOrder | None:
        """The order in which a static mask's blocks are cut from `grid`; None is the grid's own."""
        return self._static_method(grid).order(grid)

    def layout(
        self, grid: TokenGrid, device: torch.device, order: TileOrder | None = None
    ) -> BlockLayout:
        """The blocks of a static mask for a call over `grid`, text included, on `device`."""
        return self._static_method(grid).layout(grid, device, order)

    def score_scale(self, grid: TokenGrid, head_dim: int, scale: float | None) -> float | None:
        """The factor of the scores of a static mask, see `StaticMaskMethod.score_scale`."""
        return self._static_method(grid).score_scale(grid, head_dim, scale)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: TokenGrid,
        *,
        scale: float | None,
        key_mask: torch.Tensor | None,
        place: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a call over `grid`, by a method that compiled code calls as one operator.

        Tensors are as for `Method.attend`; `place` is as in `Call`, and None in training.
        """
        group = self.group
        memory = group._memory(running_call(group.model), place)
        site = Site(group.family.name, group.layer, group.layers, grid, memory=memory)
        method = group._method_on(grid.alone, self.moment)
        return method.attend(query, key, value, site, scale=scale, key_mask=key_mask)

    def _static_method(self, grid: TokenGrid) -> StaticMaskMethod:
        method = self.group._method_on(grid.alone, self.moment)
        assert isinstance(method, StaticMaskMethod)
        return method


def _compiled_as(method: Method, family: Family) -> Compiled | Literal["mask"]:
    """How compiled code calls a method in models of a family, see `Group.compiled_as`."""
    if attends_by_mask_throughout(method):
        return "mask"
    how = method.compiled_as(family.name)
    if not method.differs_by_step or how in ("operator", "outside"):
        return how
    own = type(method)
    needs_more = any(
        getattr(own, name) is not getattr(Method, name)
        for name in ("site_weights", "layer_weights", "site_processor", "adaptation")
    )
    return "outside" if needs_more else "operator"


def backend_of(group: Group) -> _compat.BackendFunction:
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
        tokens, queries = key.shape[1], None
        if query.shape[1] != tokens and over is None:
            queries = group.positions(query.shape[1], tokens)
        ordinary = (
            (query.shape[1] == tokens or queries is not None)
            and not is_causal
            and not isinstance(attn_mask, BlockMask)
            and not (over is None and group.is_over_a_part(tokens))
        )
        sparse = ordinary and group.sparse
        if not sparse and query.shape[1] == tokens and _is_reordered(group):
            _check_any_order(attn_mask, is_causal, key, group.family)
        group.count(sparse=sparse)
        if (pairs := watching()) is not None:
            pairs.add_call(query, key, sparse=sparse)
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
        if over is not None and masked and group.family.padding == "grid":
            raise NotImplementedError(
                "attention masks between blocks of frames cannot be cut for context parallelism:"
                " pass causal_block_size=1 to the pipeline, or leave context parallelism out"
            )
        if dropout_p:
            raise ValueError(f"dropout_p is {dropout_p}, but sparse attention has no dropout")
        key_mask = _key_mask(attn_mask, key, group.family)
        if key.shape[2] != query.shape[2]:
            shared_by = query.shape[2] // key.shape[2]
            key, value = (x.repeat_interleave(shared_by, dim=2) for x in (key, value))
        if queries is not None:
            return _attend_some(group, scale, query, key, value, key_mask, queries)
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
        call = group.call
        if sparse and call is not None and call.rotary is not None:
            call.rotary = gather_tables(call.rotary, query, **sequence)
        return attend_sharded(query, key, value, key_mask, attend=attend, **sequence)

    return diffattn_backend


def _is_reordered(group: Group) -> bool:
    """Whether the running forward has put its tokens in another order, as far as code can know.

    Code that is traced cannot. Only processors of diffusers' own are called in another order, and
    those of models with a `TokenFlow` make no causal calls.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    return group.call is not None and group.call.order is not None


def _check_any_order(attn_mask: Any, is_causal: bool, key: torch.Tensor, family: Family) -> None:
    """Raise unless dense attention under a mask does not depend on the order of the tokens."""
    if is_causal or isinstance(attn_mask, BlockMask):
        raise RuntimeError(
            "this attention call is causal or has a BlockMask, which is about tokens in the model's"
            " own order, but the forward has put them in another"
        )
    _key_mask(attn_mask, key, family)


def _attend_sparse(
    group: Group,
    scale: float | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    queries: tuple[range, ...] | None,
) -> torch.Tensor:
    """Attention by the group's method, for queries at the positions `queries`; None is all."""
    compiling = torch.compiler.is_dynamo_compiling() and queries is None
    if compiling and (group.compiled_as != "traced" or modes_are_active()):
        return _attend_compiled(group, scale, query, key, value, key_mask)
    site = group.site(key.shape[1])
    if queries is not None:
        return attend_queries(
            group.method, query, key, value, site, queries, scale=scale, key_mask=key_mask
        )
    return group.method.attend(query, key, value, site, scale=scale, key_mask=key_mask)


def _attend_compiled(
    group: Group,
    scale: float | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention by the group's method in code that is compiled for all grids."""
    outside = group.compiled_as == "outside" or modes_are_active()
    if group.compiled_as in ("mask", "operator") and not outside:
        traced: Any = traced_attention
        if group.compiled_as == "operator":
            last = None if torch.is_grad_enabled() else group.last
            traced = partial(traced_method, place=None if last is None else last.place)
        grid = group.traced_grid
        return traced(query, key, value, grid, group.serial, scale=scale, key_mask=key_mask)
    weights, rotary = (
        (None, None) if group.last is None else (group.last.weights, group.last.rotary)
    )
    if outside:
        return _attend_outside(group, scale, query, key, value, key_mask, weights, rotary)
    row = TokenGrid(1, 1, key.shape[1])
    site = Site(group.family.name, group.layer, group.layers, row, weights=weights, rotary=rotary)
    return group.method.attend(query, key, value, site, scale=scale, key_mask=key_mask)


@torch.compiler.disable(
    reason="diffattn attends outside of compiled code by methods with weights beside text or with"
    " merged tokens, and where a function mode (a guider's hook) changes attention"
)
def _attend_outside(
    group: Group,
    scale: float | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    weights: SiteWeights | None,
    rotary: Any,
) -> torch.Tensor:
    """Attention by the group's method with what compiled code knows of the site."""
    site = group.site(key.shape[1])
    if weights is not None:
        site = replace(site, weights=weights, rotary=rotary)
    return group.method.attend(query, key, value, site, scale=scale, key_mask=key_mask)


def _attend_some(
    group: Group,
    scale: float | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    queries: tuple[slice, ...],
) -> torch.Tensor:
    """Attention by the group's method in a call that has no other queries than those given."""
    tokens = key.shape[1]
    # The rows of a layout cannot be traced.
    if not torch.compiler.is_dynamo_compiling() and attends_by_mask_alone(group.method):
        return attend_some(
            group.method, query, key, value, group.site(tokens), queries, scale=scale,
            key_mask=key_mask,
        )  # fmt: skip

    def attend(whole: torch.Tensor) -> torch.Tensor:
        return _attend_sparse(group, scale, whole, key, value, key_mask, None)

    return attend_whole(attend, query, tokens, queries)


def _attend_dense(
    group: Group,
    scale: float | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    queries: tuple[range, ...] | None,
) -> torch.Tensor:
    """Dense attention by the backend that the group's sites had before attaching."""
    attn_mask = None if key_mask is None else key_mask[:, None, None, :]
    return _compat.dispatch(
        query, key, value, backend=group.previous, attn_mask=attn_mask, scale=scale
    )


def _key_mask(attn_mask: Any, key: torch.Tensor, family: Family) -> torch.Tensor | None:
    """Reduce a model's padding mask to bool (batch, tokens), where False hides a key.

    Args:
        attn_mask: the mask of the call; None without padding.
        key: (batch, tokens, heads, head_dim).
        family: says the form of the model's masks, and where its text and thus its padding stands.

    Raises:
        ValueError: if the mask is no padding mask of that form.
    """
    if attn_mask is None or family.padding == "grid":
        return None
    batch, tokens = key.shape[:2]
    shape = tuple(attn_mask.shape)
    by_key = shape in ((batch, tokens), (batch, 1, 1, tokens), (1, 1, 1, tokens))
    if attn_mask.dtype == torch.bool and by_key:
        return attn_mask.reshape(-1, tokens).expand(batch, tokens)
    if attn_mask.dtype == torch.bool and _is_expanded(attn_mask, batch, tokens):
        return attn_mask[:, 0, 0].expand(batch, tokens)
    by_pair = shape == (batch, 1, tokens, tokens)
    if attn_mask.dtype == torch.bool and by_pair and family.padding == "pairs":
        # Tokens of pictures see every key that is not padding, and no text stands beyond them on
        # their side. (The grid has the position of the first, but is not known to traced code.)
        return attn_mask[:, 0, -1 if family.text == "before" else 0]
    per_head = len(shape) == 4 and (shape[0], *shape[2:]) == (batch, 1, tokens)
    if attn_mask.dtype.is_floating_point and per_head and family.padding == "bias":
        return attn_mask[:, 0, 0] == 0
    if attn_mask.dtype.is_floating_point and by_pair and family.padding == "pairs":
        raise ValueError(
            f"the model passes an attention mask of {attn_mask.dtype} {shape}: numbers, which"
            f" attention adds to its scores, so that 0 for padding does not hide the padding. Pass"
            f" the model a mask of torch.bool; pipelines take one with encoded prompts, as"
            f" prompt_attention_mask=mask.bool() and negative_prompt_attention_mask=mask.bool()"
        )
    raise ValueError(
        f"the model passes an attention mask of {attn_mask.dtype} {shape}, which cannot be combined"
        f" with a sparse method; only padding masks over keys can: bool ({batch}, {tokens}) or"
        f" ({batch}, 1, 1, {tokens})"
    )


def _is_expanded(attn_mask: torch.Tensor, batch: int, tokens: int) -> bool:
    """Whether a mask (batch, heads, queries, tokens) is a padding mask that `expand` repeated.

    PRX of diffusers 0.36 repeats its masks so. No values are read, which would wait for the device.
    """
    shape = attn_mask.shape
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[3] != tokens:
        return False
    return all(shape[d] == 1 or attn_mask.stride(d) == 0 for d in (1, 2))
