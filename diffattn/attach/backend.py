"""The function that diffusers' attention dispatch calls for attached sites, and its state.

diffusers calls a backend with tensors alone. The group of a site holds the rest: the method, the
grid of the current call, and whether the current denoising step is sparse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from diffattn import _compat
from diffattn.attach.compiled import remember, traced_attention, traced_method
from diffattn.attach.context_parallel import attend_queries, attend_sharded, gather_tables
from diffattn.attach.run_clock import RunClock
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.methods.agent.merging import Merging
from diffattn.methods.base import Method, Site, SiteWeights, StaticMaskMethod, attends_by_mask_alone
from diffattn.models import Family
from diffattn.orders import TileOrder


@dataclass(eq=False)
class Group:
    """The sites of a denoiser that always behave alike, and the state of their backend.

    Sites belong to one group when they have the same method, the same `kind` and the same
    `previous` backend. One backend serves all sites of a group, so that they share compiled code.

    Compiled code finds its group by a serial number. It can hold a number as a constant, but not
    the group itself, because an operator of torch takes no Python objects. When the code runs, it
    looks up the number in the table of `compiled.remember`. The group found there gives the layout
    of the call, or attends by its method.

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
        member: the group's own backend, as a member of diffusers' enumeration of backends. The
            processors of the sites are set to it.
        method: `chosen` with its parameters resolved, for the current grid once there is one.
        video: the video tokens of the current call, without text; None before a call.
        reordered: the order that the current forward has put its tokens in; None for the model's
            own order.
        weights, rotary, merging: those of the site whose call is running, see `Site`.
        sparse: whether calls go to `method` at present; otherwise they go to `previous`.
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
        """Set the video tokens of the calls to come."""
        self.video = grid
        # Resolving parameters cannot be traced: compiled code does so in `layout`, at run time.
        if not torch.compiler.is_compiling():
            self.method = self._method_on(grid)

    def order(self, grid: TokenGrid) -> TileOrder | None:
        """The order in which a static mask's blocks are cut from `grid`; None is the grid's own."""
        return self._static_method().order(grid)

    def layout(
        self, grid: TokenGrid, device: torch.device, order: TileOrder | None = None
    ) -> BlockLayout:
        """The blocks of a static mask for a call over `grid`, text included, on `device`."""
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
        """Attention of a call over `grid`, by a method that compiled code calls as one operator.

        Tensors are as for `Method.attend`.
        """
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
        # Tracing would specialise the code to the count, and compile it again for each count.
        if not torch.compiler.is_compiling():
            self.sparse_calls += sparse
            self.dense_calls += not sparse

    def site(self, tokens: int) -> Site:
        """The `Site` that the method gets for a call over `tokens` tokens, text included.

        Raises:
            RuntimeError: outside of the model's forward, or if the tokens do not fit its grid.
        """
        if self.video is None:
            raise RuntimeError(
                "an attached attention module was called outside of its model's forward, so its"
                " token grid is unknown; call the model, or set_attn_processor(None)"
            )
        if self.merging is not None:
            # The tokens that merging leaves form no rectangle.
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
        """The group of a copied model's sites, with a backend and a serial number of its own."""
        copied = Group(
            self.chosen, self.family, self.variant, self.kind, self.layer, self.layers,
            self.previous,
        )  # fmt: skip
        copied.member = _compat.register_backend(backend_of(copied))
        memo[id(self.member)] = copied.member
        if self.video is not None:
            copied.use(self.video)
        copied.refresh(RunClock())
        return copied


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
    """Raise unless dense attention under a mask does not depend on the order of the tokens."""
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
    """Attention by the group's method, for queries at the positions `queries`; None is all."""
    site = group.site(key.shape[1])
    if queries is not None:
        return attend_queries(
            group.method, query, key, value, site, queries, scale=scale, key_mask=key_mask
        )
    if torch.compiler.is_compiling() and attends_by_mask_alone(group.method):
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
    """Dense attention by the backend that the group's sites had before attaching."""
    attn_mask = None if key_mask is None else key_mask[:, None, None, :]
    return _compat.dispatch(
        query, key, value, backend=group.previous, attn_mask=attn_mask, scale=scale
    )


def _key_mask(attn_mask: Any, key: torch.Tensor, padding: str) -> torch.Tensor | None:
    """Reduce a model's padding mask to bool (batch, tokens), where False hides a key.

    Args:
        attn_mask: the mask of the call; None without padding.
        key: (batch, tokens, heads, head_dim).
        padding: the form of the model's masks, see `Family`.

    Raises:
        ValueError: if the mask is no padding mask of that form.
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
        # The first token is a video token: it sees every key that is not padding.
        return attn_mask[:, 0, 0]
    per_head = len(shape) == 4 and (shape[0], *shape[2:]) == (batch, 1, tokens)
    if attn_mask.dtype.is_floating_point and per_head and padding == "bias":
        return attn_mask[:, 0, 0] == 0
    raise ValueError(
        f"the model passes an attention mask of {attn_mask.dtype} {shape}, which cannot be combined"
        f" with a sparse method; only padding masks over keys can: bool ({batch}, {tokens}) or"
        f" ({batch}, 1, 1, {tokens})"
    )
