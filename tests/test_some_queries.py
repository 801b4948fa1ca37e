"""Calls with fewer queries than keys, and calls over a part of the sequence."""

import importlib
import warnings
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import stock
import tiny_edit_models as edit
import tiny_families as tiny
import tiny_picture_models as pictures
import torch
from torch._dynamo.testing import CompileCounter

import diffattn
from diffattn import CLEARAttn, GNAAttn, TokenGrid, VMoBAAttn
from diffattn.attach.backend import Group, backend_of
from diffattn.attach.run_clock import RunClock
from diffattn.attach.running_call import Call
from diffattn.attach.some_queries import attend_some
from diffattn.methods.base import Site
from diffattn.models.base import first_queries, last_queries
from diffattn.models.prx import PRX

GNA = GNAAttn(window=(2, 3, 3), dense_steps=0, dense_layers=0)
METHODS = {
    "raster": stock.NEARBY,
    "tiles": stock.IN_TILES,
    "gna": GNA,
    "clear": CLEARAttn(radius=2, frame_radius=2, dense_steps=0, dense_layers=0),
}
# Text, references and video; then which of them have queries.
LAYOUTS = {
    "text without queries": (TokenGrid(3, 5, 7, 9), (slice(9, 114),)),
    "text after": (TokenGrid(3, 5, 7, 0, 9), (slice(0, 105),)),
    "references between": (TokenGrid(1, 6, 9, 5 + 39), (slice(0, 5), slice(44, 98))),
    "video and sound": (TokenGrid(3, 5, 7, 6, 4), (slice(6, 115),)),
    "both ends": (TokenGrid(1, 9, 9, 20, 30), (slice(3, 8), slice(20, 101), slice(110, 131))),
}


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Attention over (batch, tokens, heads, head_dim) in float64."""
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_rows_are_those_of_the_whole_sequence(name: str, layout: str, padded: bool) -> None:
    grid, queries = LAYOUTS[layout]
    method: Any = METHODS[name].for_model("flux", grid.alone)
    query, key, value = (tiny.noise(2, grid.tokens, 2, 16, seed=i) for i in range(3))
    allowed = method.mask(grid).dense()[None, None].expand(2, 1, -1, -1)
    key_mask = None
    if padded:
        key_mask = torch.ones(2, grid.tokens, dtype=torch.bool)
        key_mask[1, 1:4] = False
        allowed = allowed & key_mask[:, None, None]
    rows = torch.cat([torch.arange(part.start, part.stop) for part in queries])
    query = query[:, rows].requires_grad_()
    key.requires_grad_()
    site = Site("flux", 0, 1, grid)
    out = attend_some(method, query, key, value, site, queries, scale=None, key_mask=key_mask)
    want = dense(query, key, value, allowed[:, :, rows])
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    weight = tiny.noise(*out.shape, seed=5)
    got = torch.autograd.grad((out * weight).sum(), (query, key))
    for mine, right in zip(
        got, torch.autograd.grad((want * weight).sum(), (query, key)), strict=True
    ):
        torch.testing.assert_close(mine, right, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["prx", "nucleus-image"])
@pytest.mark.parametrize("method", [stock.IN_TILES, GNA], ids=["tiles", "gna"])
def test_models_in_an_order_of_tiles(name: str, method: Any) -> None:
    case = tiny.CASES[name]
    model, inputs = case.build(), case.inputs()
    resolved = method.for_model(name, case.grids[0].alone)
    with (
        torch.no_grad(),
        stock.masked(model, list(case.sites), case.grid_of, resolved, case.queries),
    ):
        want = model(**inputs).sample
    diffattn.set_attn_processor(model, method)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["prx", "nucleus-image"])
@pytest.mark.parametrize(
    "method", [stock.NEARBY, VMoBAAttn(topk=1, dense_steps=0)], ids=["mask", "vmoba"]
)
def test_compiled_models_equal_those_that_are_not(name: str, method: Any) -> None:
    case = tiny.CASES[name]
    model, inputs = case.build(), case.inputs()
    diffattn.set_attn_processor(model, method)
    with torch.no_grad():
        want = model(**inputs).sample
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs).sample, want, atol=1e-5, rtol=1e-4)


def test_compiled_code_serves_all_sizes_of_pictures_and_texts() -> None:
    case = tiny.CASES["prx"]
    model = case.build()
    diffattn.set_attn_processor(model, stock.NEARBY)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for height, width, text in ((12, 18, 7), (16, 10, 11), (20, 14, 5)):
        inputs = case.inputs() | {
            "hidden_states": tiny.noise(2, 4, height, width),
            "encoder_hidden_states": tiny.noise(2, text, 16),
            "attention_mask": tiny.valid_text(text, text, 4),
        }
        with torch.no_grad():
            got, want = compiled(**inputs).sample, model(**inputs).sample
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


def test_a_method_that_selects_gives_each_query_what_it_would_have_among_all() -> None:
    """VMoBA's choice of a query does not depend on the queries that a call does not have."""
    grid = TokenGrid(1, 12, 12, 7)
    method = VMoBAAttn(topk=2, dense_steps=0).for_model("flux", grid.alone)
    query, key, value = (tiny.noise(1, grid.tokens, 2, 16, seed=i) for i in range(3))
    site = Site("flux", 0, 1, grid)
    whole = method.attend(query, key, value, site)
    query[:, : grid.text_before] = 0
    part = method.attend(query, key, value, site)
    torch.testing.assert_close(part[:, grid.video], whole[:, grid.video])


def _glm(cache: Any, mode: str, **changes: Any) -> dict[str, Any]:
    cache.set_mode(mode)
    return pictures.glm_inputs() | {"kv_caches": cache} | changes


def test_glm_with_condition_images_in_its_cache() -> None:
    model = pictures.glm_image()
    glm = importlib.import_module(type(model).__module__)
    sites = list(tiny.CASES["glm-image"].sites)

    def run() -> torch.Tensor:
        """An image out of an image of 4 x 5 tokens, which has no text."""
        cache = glm.GlmImageKVCache(num_layers=2)
        with torch.no_grad():
            model(**_glm(cache, "write", **pictures.glm_inputs(4, 5, text=0)))
            return model(**_glm(cache, "read")).sample

    grids = {20: TokenGrid(1, 4, 5), 20 + 7 + 54: TokenGrid(1, 6, 9, 20 + 7)}
    with stock.masked(
        model,
        sites,
        grids.__getitem__,
        stock.NEARBY,
        lambda queries, keys: (slice(keys - queries, keys),),
    ) as calls:
        want = run()
    assert calls == [20, 20, 81, 81]
    attachment = diffattn.set_attn_processor(model, stock.NEARBY)
    torch.testing.assert_close(run(), want, atol=1e-5, rtol=1e-4)
    assert (attachment.sparse_calls, attachment.dense_calls) == (4, 0)


KLEIN = TokenGrid(1, 4, 6, 24 + 15)


def _klein() -> tuple[Any, Any]:
    """Flux.2 as Flux2KleinKVPipeline sets it up, and a function that runs two steps of it."""
    model = edit.flux2()
    module: Any = importlib.import_module(type(model).__module__)
    if not hasattr(module, "Flux2KVAttnProcessor"):
        pytest.skip(f"diffusers {diffusers.__version__} has no Flux.2 Klein KV")
    for block in model.transformer_blocks:
        block.attn.set_processor(module.Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(module.Flux2KVParallelSelfAttnProcessor())
    references, target = tiny.noise(2, 39, 16, seed=1), tiny.noise(2, 24, 16)
    ids = edit.ids((10, 6, 4), (20, 3, 5), (0, 4, 6), more=(0.0,)).expand(2, -1, -1)
    both = {
        "encoder_hidden_states": tiny.noise(2, 5, 16, seed=2),
        "timestep": torch.tensor([0.9, 0.4]),
        "txt_ids": torch.zeros(2, 5, 4),
        "guidance": torch.tensor([3.5, 3.5]),
        "return_dict": False,
    }

    def run(call: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            first, cache = call(
                hidden_states=torch.cat([references, target], dim=1),
                img_ids=ids,
                kv_cache_mode="extract",
                num_ref_tokens=39,
                **both,
            )
            (second,) = call(
                hidden_states=target,
                img_ids=ids[:, 39:],
                kv_cache_mode="cached",
                kv_cache=cache,
                **both,
            )
        return [first, second]

    return model, run


@pytest.mark.parametrize("method", [stock.NEARBY, stock.IN_TILES], ids=["raster", "tiles"])
def test_klein_with_references_in_its_cache(method: Any) -> None:
    model, run = _klein()
    allowed = method.mask(KLEIN.beside(before=5)).dense()
    allowed = torch.cat([allowed[:5], allowed[44:]])

    def attention(plain: Any, site: str, q: Any, k: Any, v: Any, mask: Any, **rest: Any) -> Any:
        among_themselves = q.shape[-2] == k.shape[-2] == 39
        return plain(q, k, v, attn_mask=None if among_themselves else allowed, **rest)

    dense = run(model)
    sites = list(tiny.CASES["flux.2"].sites)
    with stock.attending_by(attention, model, sites, some_queries=True):
        want = run(model)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(want, dense, strict=True))
    attachment = diffattn.set_attn_processor(model, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = run(model)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    # The first step has a call of the references among themselves at each site.
    assert attachment.sparse_calls == 2 * len(sites)
    assert attachment.dense_calls == len(sites)
    torch._dynamo.reset()
    for mine, right in zip(run(torch.compile(model, backend="eager")), want, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    diffattn.set_attn_processor(model, None)
    assert all(torch.equal(a, b) for a, b in zip(run(model), dense, strict=True))


def _one_site(grid: TokenGrid, queries: Any) -> tuple[Any, Any]:
    """The backend of an attached site whose family has `queries`, in a call over `grid`."""
    family = replace(PRX, queries=queries)
    group = Group(stock.NEARBY, family, "prx", (0, 0), 0, 1, None, -1)
    group.use(Call(RunClock(), grid))
    return group, backend_of(group)


def test_keys_of_fewer_heads_are_shared() -> None:
    grid = TokenGrid(1, 6, 9)
    _, backend = _one_site(grid, last_queries)
    query = tiny.noise(2, 54, 6, 16)
    key, value = (tiny.noise(2, 60, 2, 16, seed=i) for i in (1, 2))
    out = backend(query, key, value, enable_gqa=True)
    allowed = stock.NEARBY.mask(grid.beside(before=6)).dense()[6:]
    repeated = [x.repeat_interleave(3, dim=2) for x in (key, value)]
    torch.testing.assert_close(out.double(), dense(query, *repeated, allowed), atol=2e-6, rtol=1e-5)


def test_calls_that_fit_no_sequence_stay_dense() -> None:
    grid = TokenGrid(1, 6, 9)
    group, backend = _one_site(grid, last_queries)
    for queries, keys in ((20, 20), (20, 60), (60, 54)):
        query = tiny.noise(1, queries, 2, 16)
        key, value = (tiny.noise(1, keys, 2, 16, seed=i) for i in (1, 2))
        everything = torch.ones(queries, keys, dtype=torch.bool)
        torch.testing.assert_close(
            backend(query, key, value).double(),
            dense(query, key, value, everything),
            atol=2e-6,
            rtol=1e-5,
        )
    assert (group.sparse_calls, group.dense_calls) == (0, 3)


def test_positions_at_the_ends() -> None:
    assert last_queries(TokenGrid(1, 6, 9), 54, 61) == (slice(7, 61),)
    assert last_queries(TokenGrid(1, 6, 9, 5, 4), 58, 70) == (slice(12, 70),)
    assert last_queries(TokenGrid(1, 6, 9, 5, 4), 57, 70) is None
    assert first_queries(TokenGrid(1, 6, 9), 54, 61) == (slice(0, 54),)
    assert first_queries(TokenGrid(1, 6, 9, 5), 58, 61) is None
