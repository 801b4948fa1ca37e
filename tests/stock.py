"""What tests of model families need: small methods, and the same mask done without diffattn."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import torch
from tiny_case import Case

import diffattn
from diffattn import AttentionMask, Method, PredicateMask, TokenGrid
from diffattn.methods import DenseAttn, Site, StaticMaskMethod
from diffattn.orders import TileOrder


@dataclass(frozen=True, kw_only=True)
class Nearby(StaticMaskMethod):
    """Tokens see those of the same and the neighbouring places: wrong axes would be seen."""

    type: ClassVar[str] = "nearby"
    paper: ClassVar[str] = ""

    def for_model(self, family: str, grid: TokenGrid | None = None) -> "Nearby":
        return self

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        def near(query: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> torch.Tensor:
            apart = [(q - k).abs() for q, k in zip(query, key, strict=True)]
            return (apart[0] <= 1) & (apart[1] <= 1) & (apart[2] <= 2)

        return PredicateMask(
            grid, lambda query, key: near(grid.coordinates(query), grid.coordinates(key))
        )

    def block_size_on(self, grid: TokenGrid) -> int:
        return 16


NEARBY = Nearby(dense_layers=0, dense_steps=0)


@dataclass(frozen=True, kw_only=True)
class NearbyInTiles(Nearby):
    """The same token pairs, in blocks that are boxes of tokens."""

    type: ClassVar[str] = "nearby-in-tiles"
    tile: tuple[int, int, int] = (2, 2, 4)

    def order_on(self, grid: TokenGrid) -> TileOrder:
        return TileOrder(grid, self.tile)


IN_TILES = NearbyInTiles(dense_layers=0, dense_steps=0)


@dataclass(frozen=True, kw_only=True)
class Recording(DenseAttn):
    """Dense attention that keeps the queries of its calls and where they came from."""

    calls: list[tuple[Site, torch.Tensor]] = field(default_factory=list, compare=False)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> "Recording":
        return self

    def attend(self, query: torch.Tensor, key: Any, value: Any, site: Site, **kwargs: Any) -> Any:
        self.calls.append((site, query.detach().clone()))
        return super().attend(query, key, value, site, **kwargs)


@contextlib.contextmanager
def attending_by(
    attention: Callable[..., torch.Tensor],
    model: torch.nn.Module,
    sites: Iterable[str],
    *,
    some_queries: bool = False,
) -> Iterator[None]:
    """The stock model with another self-attention in the place of PyTorch's under some modules.

    Args:
        attention: takes PyTorch's attention, the name of the site, and what PyTorch's is called
            with: query, key, value `(batch, heads, tokens, head_dim)`, the mask or None, the rest.
        sites: names of these modules.
        some_queries: whether calls with more keys than queries are self-attention, too.
    """
    stock = torch.nn.functional.scaled_dot_product_attention
    inside: list[str] = []

    def called(
        query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **kwargs: Any
    ) -> Any:
        cross = query.shape[-2] != key.shape[-2] and not some_queries
        if inside and not cross and not kwargs.get("is_causal"):
            return attention(stock, inside[-1], query, key, value, attn_mask, **kwargs)
        return stock(query, key, value, attn_mask, *rest, **kwargs)

    with contextlib.ExitStack() as hooks:
        for name in sites:
            module = model.get_submodule(name)
            for hook in (
                module.register_forward_pre_hook(lambda m, a, n=name: inside.append(n)),
                module.register_forward_hook(lambda m, a, o: (inside.pop(), None)[1]),
            ):
                hooks.callback(hook.remove)
        hooks.enter_context(
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", called)
        )
        yield


def recorded(
    model: torch.nn.Module, sites: Iterable[str], run: Callable[[], object]
) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """Queries, keys and values, (batch, tokens, heads, channels), of each site's calls in a run."""
    calls: dict[str, list[tuple[torch.Tensor, ...]]] = {}

    def attention(stock: Any, site: str, *qkv: Any, **kwargs: Any) -> torch.Tensor:
        *tensors, attn_mask = qkv
        assert attn_mask is None
        calls.setdefault(site, []).append(tuple(x.transpose(1, 2).clone() for x in tensors))
        return stock(*qkv, **kwargs)

    with attending_by(attention, model, sites):
        run()
    return calls


@contextlib.contextmanager
def masked(
    model: torch.nn.Module,
    sites: list[str],
    grid_of: Callable[[int], TokenGrid],
    method: Method,
    queries: Callable[[int, int], tuple[slice, ...]] | None = None,
) -> Iterator[list[int]]:
    """The stock model with a method's boolean mask in PyTorch's attention under some modules.

    Args:
        sites: names of these modules.
        grid_of: the grid of a call over so many tokens.
        queries: the positions of the queries of a call with so many queries and keys, where there
            are more keys; None if such a call is cross-attention.

    Yields:
        The number of tokens of each masked call so far.
    """
    masks: dict[int, torch.Tensor] = {}
    calls: list[int] = []

    def attention(plain: Any, site: str, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        tokens = k.shape[-2]
        calls.append(tokens)
        if tokens not in masks:
            masks[tokens] = method.mask(grid_of(tokens)).dense()
        seen = masks[tokens]
        if queries is not None and q.shape[-2] != tokens:
            seen = torch.cat([seen[part] for part in queries(q.shape[-2], tokens)])
        if mask is not None:
            boolean = mask.dtype == torch.bool
            seen = mask & seen if boolean else mask.masked_fill(~seen, -torch.inf)
        return plain(q, k, v, attn_mask=seen, **kwargs)

    with attending_by(attention, model, sites, some_queries=queries is not None):
        yield calls


def check_attached(case: Case, method: StaticMaskMethod) -> None:
    """A model with a method attached gives what the stock model gives with the method's mask."""
    model, inputs = case.build(), case.inputs()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    dense = forward()
    with masked(model, list(case.sites), case.grid_of, method, case.queries):
        want = forward()
    assert not torch.allclose(want, dense, atol=1e-4), "the mask should matter"
    attachment = diffattn.set_attn_processor(model, method)
    assert attachment is not None
    torch.testing.assert_close(forward(), want, atol=1e-5, rtol=1e-4)
    assert attachment.sparse_calls == len(case.sites)
