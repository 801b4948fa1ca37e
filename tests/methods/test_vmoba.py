"""VMoBAAttn: the public code's outputs, dense attention under its own masks, whole models."""

import contextlib
import copy
import json
import pickle
from collections.abc import Iterator
from typing import Any

import golden_files
import numpy as np
import pytest
import stock
import tiny_families
import tiny_wan
import torch
from tiny_families import CASES, Case
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn
from diffattn import TokenGrid, VMoBAAttn
from diffattn.attach.compiled import traced_method
from diffattn.kernels.reference import reference_attention
from diffattn.methods import Site, from_dict
from diffattn.methods.vmoba.method import PARTITIONS
from diffattn.operator import BACKEND_VARIABLE
from diffattn.selected.attention import dense_mask, selected_attention

GOLDENS = golden_files.GOLDENS / "vmoba"

SPARSE = VMoBAAttn(
    chunk_1d=1, chunk_2d=(2, 2), chunk_3d=(2, 2, 3), topk=2, dense_layers=0, dense_steps=0
)
BY_SHARE = VMoBAAttn(
    preset="training", chunk_1d=1, chunk_2d=(2, 2), chunk_3d=(2, 2, 3), tau=0.4, dense_steps=0
)
DENSE = VMoBAAttn(preset="training", tau=1.0, dense_layers=0, dense_steps=0)


def site(grid: TokenGrid, layer: int = 0) -> Site:
    return Site("wan", layer, 3, grid)


def token_mask(
    method: VMoBAAttn,
    query: torch.Tensor,
    key: torch.Tensor,
    where: Site,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a call attends to: bool (batch, heads, tokens, tokens), in the model's order."""
    partition = method.partition(where.grid, where.layer)
    blocks = partition.key_blocks(query.device)
    bits = method.selection(query, key, where, key_mask=key_mask)
    there = partition.positions(query.device)
    back = there.argsort()
    return dense_mask(blocks, bits)[:, :, back][..., back]


# --- outputs


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("g01_topk_query_head_3d", "3d"),
        ("g02_topk_head_global_2d", "2d"),
        ("g04_thr_query_head_3d", "3d"),
        ("g05_thr_head_global_3d_grads", "3d"),
        ("g07_thr_block_3d", "3d"),
        ("g11_topk_query_head_1d_grads", "1d"),
    ],
)
def test_outputs_and_gradients_are_those_of_the_public_code(name: str, kind: str) -> None:
    golden = np.load(GOLDENS / f"{name}.npz")
    grid = TokenGrid(*golden["grid"].tolist())
    scope = {"query_head": "query", "head_global": "head", "block": "unpublished-block"}
    select = str(golden["select_mode"])
    chosen = {"topk": int(golden["topk"])} if select == "topk" else {"tau": float(golden["tau"])}
    method = VMoBAAttn(
        partitions=(kind,),
        select=select,
        scope=scope[str(golden["scope"])],
        **{f"chunk_{kind}": golden["chunk"].tolist()},
        **chosen,
    )
    q, k, v = (torch.from_numpy(golden[n]).float().requires_grad_() for n in "qkv")
    out = method.attend(q, k, v, site(grid))
    torch.testing.assert_close(out, torch.from_numpy(golden["out"]), atol=2e-6, rtol=0)
    mask = token_mask(method, q, k, site(grid))
    assert mask.float().mean().item() == pytest.approx(float(golden["density"]), abs=1e-6)
    if "dq" in golden:
        found = torch.autograd.grad(out, (q, k, v), torch.from_numpy(golden["dout"]).float())
        for got, n in zip(found, ("dq", "dk", "dv"), strict=True):
            torch.testing.assert_close(got, torch.from_numpy(golden[n]), atol=3e-5, rtol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("method", [SPARSE, BY_SHARE], ids=["topk", "threshold"])
@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(3, 5, 7),
        TokenGrid(4, 3, 5, text_after=1),
        TokenGrid(1, 7, 5, text_before=6),
        TokenGrid(2, 1, 3, 2, 3),
        TokenGrid(1, 1, 1),
    ],
    ids=str,
)
def test_equals_dense_attention_under_the_selection(
    grid: TokenGrid, method: VMoBAAttn, layer: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    generator = torch.Generator().manual_seed(layer)
    tensors = torch.randn(3, 3, grid.tokens, 2, 12, generator=generator)
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    key_mask = torch.rand(3, grid.tokens, generator=generator) < 0.9
    for hidden in (None, key_mask):
        out = method.attend(q, k, v, site(grid, layer), scale=0.4, key_mask=hidden)
        mask = token_mask(method, q, k, site(grid, layer), hidden)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want, _ = reference_attention(*exact, mask, scale=0.4, key_mask=hidden)
        torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)
        weight = torch.randn(out.shape, generator=generator)
        found = torch.autograd.grad(out, (q, k, v), weight)
        truth = torch.autograd.grad(want, exact, weight.double())
        for got, right in zip(found, truth, strict=True):
            torch.testing.assert_close(got.double(), right, atol=3e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="looks for waiting as CUDA reports it")
@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("method", [VMoBAAttn(), VMoBAAttn(preset="training")], ids=str)
def test_a_gpu_selects_as_the_cpu_and_is_not_waited_for(method: VMoBAAttn, layer: int) -> None:
    grid = TokenGrid(5, 12, 13, text_after=7)
    generator = torch.Generator().manual_seed(layer)
    # Multiples of 1/64, as in the goldens: scores are nearly exact in any order of summation.
    tensors = torch.randn(3, 2, grid.tokens, 2, 64, generator=generator).mul(64).round() / 64
    q, k, v = tensors.cuda()
    method = method.for_model("wan", TokenGrid(5, 12, 13))
    want = method.selection(*tensors[:2], site(grid, layer))
    assert torch.equal(method.selection(q, k, site(grid, layer)).cpu(), want)
    mask = token_mask(method, q, k, site(grid, layer))
    exact, _ = reference_attention(q, k, v, mask)
    outs = [method.attend(q, k, v, site(grid, layer))]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # The second call knows how alike neighbours select, and may go tile by tile.
        outs += [method.attend(q, k, v, site(grid, layer)) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for out in outs:
        torch.testing.assert_close(out.double(), exact, atol=2e-5, rtol=1e-4)


def test_a_selection_as_a_mask() -> None:
    grid = TokenGrid(3, 4, 5, text_before=2, text_after=1)
    q, k = torch.randn(2, 2, grid.tokens, 2, 8)
    for layer in range(3):
        bits = BY_SHARE.selection(q, k, site(grid, layer))
        mask = BY_SHARE.selection_mask(bits[1, 0], grid, layer)
        assert torch.equal(mask.dense(), token_mask(BY_SHARE, q, k, site(grid, layer))[1, 0])


def test_layers_take_their_partitions_by_turns() -> None:
    grid = TokenGrid(4, 5, 6)
    method = VMoBAAttn(chunk_1d=2, chunk_2d=(3, 4), chunk_3d=(3, 4, 5))
    chunks = {"1d": (60,), "2d": (4, 3, 4), "3d": (3, 4, 5)}
    for layer in range(7):
        assert method.partition(grid, layer).chunk == chunks[PARTITIONS[layer % 3]]
    other = VMoBAAttn(partitions=("3d", "3d", "1d"), chunk_1d=0.5, chunk_3d=(9, 9, 2))
    assert [other.partition(grid, layer).chunk for layer in range(4)] == [
        (4, 5, 2), (4, 5, 2), (15,), (4, 5, 2),
    ]  # fmt: skip


def test_grouped_queries_share_their_keys() -> None:
    grid = TokenGrid(2, 3, 4)
    q = torch.randn(2, 24, 6, 8)
    k, v = torch.randn(2, 2, 24, 2, 8)
    out = SPARSE.attend(q, k, v, site(grid))
    want = SPARSE.attend(q, *(x.repeat_interleave(3, 2) for x in (k, v)), site(grid))
    assert torch.equal(out, want)
    with pytest.raises(ValueError, match="query has 6 heads and key 4: with grouped queries the"):
        SPARSE.attend(q, *torch.randn(2, 2, 24, 4, 8), site(grid))


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("tokens", [17, 19])
def test_tokens_that_are_not_the_grids_are_refused(layer: int, tokens: int) -> None:
    grid = TokenGrid(2, 2, 4, text_after=2)
    q = torch.randn(1, tokens, 2, 4)
    message = rf"of shape \(1, {tokens}, 2, 4\) has not the 18 tokens of 2x2x4\+2 text"
    with pytest.raises(ValueError, match=message):
        VMoBAAttn(topk=1).attend(q, q, q, site(grid, layer))


def test_there_is_no_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "flex")
    x = torch.randn(1, 24, 1, 8)
    with pytest.raises(NotImplementedError, match="backend 'flex' has no attention over selected"):
        SPARSE.attend(x, x, x, site(TokenGrid(2, 3, 4)))


def test_half_precision_selects_by_float32_scores() -> None:
    grid = TokenGrid(3, 4, 5)
    q, k, v = torch.randn(3, 2, 60, 2, 16).bfloat16()
    want = BY_SHARE.selection(q.float(), k.float(), site(grid, 2))
    assert torch.equal(BY_SHARE.selection(q, k, site(grid, 2)), want)
    out = BY_SHARE.attend(q, k, v, site(grid, 2))
    assert out.dtype == torch.bfloat16
    mask = token_mask(BY_SHARE, q, k, site(grid, 2))
    exact, _ = reference_attention(q, k, v, mask)
    torch.testing.assert_close(out.double(), exact, atol=0.03, rtol=0.03)


# --- whole models


def forward(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@contextlib.contextmanager
def selecting(model: torch.nn.Module, case: Case, method: VMoBAAttn) -> Iterator[list[int]]:
    """The stock model with a method's masks in PyTorch's attention under its sites."""
    layers = diffattn.models.family_of(model).layers(model)
    calls: list[int] = []

    def attention(plain: Any, name: str, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        calls.append(layers[name])
        where = site(case.grid_of(q.shape[-2]), layers[name])
        key_mask = None if mask is None else mask[:, 0, 0]
        seen = token_mask(method, q.transpose(1, 2), k.transpose(1, 2), where, key_mask)
        return plain(q, k, v, attn_mask=seen if mask is None else mask & seen, **kwargs)

    with stock.attending_by(attention, model, case.sites):
        yield calls


@pytest.mark.parametrize("method", [SPARSE, BY_SHARE], ids=["topk", "threshold"])
@pytest.mark.parametrize("name", ["skyreels-v2", "hunyuanvideo", "cogvideox-5b", "flux", "mochi"])
def test_models_are_the_stock_ones_under_the_masks(name: str, method: VMoBAAttn) -> None:
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    dense = forward(model, inputs)
    video = case.grids[0]
    fitted = method.for_model(name, video)
    with selecting(model, case, fitted) as calls:
        want = forward(model, inputs)
    assert len(set(calls)) > 1
    assert not torch.allclose(want, dense, atol=1e-3), "the mask should matter"
    attachment = diffattn.set_attn_processor(model, method)
    torch.testing.assert_close(forward(model, inputs), want, atol=1e-5, rtol=1e-4)
    assert attachment.sparse_calls == len(case.sites)
    diffattn.set_attn_processor(model, None)
    assert torch.equal(forward(model, inputs), dense)


def wan_inputs(frames: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(2, 16, frames, 12, 10, generator=generator),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": torch.randn(2, 5, tiny_wan.TEXT_DIM, generator=generator),
    }


def test_layers_of_a_model_are_grouped_by_what_they_do() -> None:
    model = tiny_families.CASES["skyreels-v2"].build()
    names = list(diffattn.models.family_of(model).layers(model))
    method = VMoBAAttn(partitions=("2d",), dense_layers=1, dense_steps=0)
    attachment = diffattn.set_attn_processor(model, method)
    assert [group.layer for group in attachment.models["model"].groups] == [0, 1][: len(names)]
    attachment = diffattn.set_attn_processor(model, SPARSE)
    kinds = [group.kind[1] for group in attachment.models["model"].groups]
    assert kinds == list(range(min(3, len(names))))


def test_copies_and_pickles_are_the_same_method() -> None:
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, SPARSE)
    want = forward(model, wan_inputs())
    assert torch.equal(forward(copy.deepcopy(model), wan_inputs()), want)
    written = json.loads(json.dumps(SPARSE.to_dict()))
    for again in (pickle.loads(pickle.dumps(SPARSE)), from_dict(written), eval(repr(SPARSE))):
        assert again == SPARSE
        assert not again._partitions_known, "what is derived stays behind"
        diffattn.set_attn_processor(model, again)
        assert torch.equal(forward(model, wan_inputs()), want)


def test_checkpointed_training_has_the_gradients_of_eager() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_wan.transformer().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        diffattn.set_attn_processor(model, BY_SHARE)
        model(**wan_inputs(), return_dict=False)[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("attn1.to_k" in name and grad.any() for name, grad in gradients[0].items())
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, msg=name)


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, BY_SHARE)
    want = forward(model, wan_inputs())
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    with torch.no_grad():
        out = model(**wan_inputs(), return_dict=False)[0]
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 3, "blocks of three kinds are three blocks to the compiler"


def test_compiled_attention_trains() -> None:
    torch._dynamo.reset()
    grid = TokenGrid(3, 4, 5, text_after=3)
    model = tiny_families.CASES["hunyuanvideo"].build()
    attachment = diffattn.set_attn_processor(model, BY_SHARE)
    (group, *_) = attachment.models["model"].groups
    leaves = torch.randn(3, 2, grid.tokens, 2, 8)
    key_mask = torch.rand(2, grid.tokens) < 0.8
    weight = torch.randn(2, grid.tokens, 2, 8)

    def traced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return traced_method(q, k, v, grid, group.serial, scale=0.4, key_mask=key_mask)

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return BY_SHARE.attend(q, k, v, site(grid), scale=0.4, key_mask=key_mask)

    results = []
    for call in (eager, traced, torch.compile(traced, fullgraph=True, backend="aot_eager")):
        copies = [x.clone().requires_grad_() for x in leaves]
        out = call(*copies)
        results.append([out, *torch.autograd.grad(out, copies, weight)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want)
    torch.library.opcheck(
        torch.ops.diffattn.method_attention.default,
        (*copies, key_mask, [3, 4, 5, 0, 3], group.serial, 0.4),
    )


def test_dense_steps_and_layers() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = diffattn.set_attn_processor(pipe, VMoBAAttn(dense_layers=1))
    tiny_wan.run(pipe, steps=8)
    sites = attachment.sites
    calls = attachment.sparse_calls + attachment.dense_calls
    # A quarter of 8 steps, and one of the layers in the others.
    assert attachment.dense_calls == calls / 8 * (2 + 6 / sites)
    assert "vmoba attention; 1 of" in str(attachment.describe(TokenGrid(2, 4, 4), 8))


# --- settings


@pytest.mark.parametrize(
    ("grid", "chunks", "blocks"),
    [
        (TokenGrid(21, 30, 52), (3, (5, 13), (7, 5, 13)), (7, 24, 72)),
        (TokenGrid(21, 45, 80), (3, (9, 10), (7, 15, 20)), (7, 40, 36)),
        (TokenGrid(24, 36, 64), (3, (6, 8), (8, 12, 8)), (8, 48, 72)),
        (TokenGrid(36, 30, 52), (3, (5, 13), (12, 10, 13)), (12, 24, 36)),
        (TokenGrid(20, 36, 64), (2, (6, 8), None), (10, 48, 72)),
        (TokenGrid(16, 12, 12), (2, None, None), (8, 48, 72)),
        (TokenGrid(1, 64, 64), (1 / 8, None, None), (8, 48, 64)),
        (TokenGrid(1, 1, 1), (1, (1, 1), (1, 1, 1)), (1, 1, 1)),
    ],
    ids=str,
)
def test_chunks_are_the_papers_or_make_as_many_blocks(
    grid: TokenGrid, chunks: tuple[Any, ...], blocks: tuple[int, ...]
) -> None:
    method = VMoBAAttn().for_model("wan", grid)
    for kind, want in zip(PARTITIONS, chunks, strict=True):
        assert want is None or getattr(method, f"chunk_{kind}") == want
    assert tuple(len(method.partition(grid, layer).lengths()) for layer in range(3)) == blocks


@pytest.mark.parametrize(
    ("grid", "topk"),
    [(TokenGrid(21, 30, 52), (3, 6, 18)), (TokenGrid(21, 45, 80), (3, 10, 9))],
)
def test_presets_are_the_papers(grid: TokenGrid, topk: tuple[int, int, int]) -> None:
    free = VMoBAAttn().for_model("wan", grid)
    assert (free.select, free.scope, free.topk, free.tau) == ("topk", "query", topk, None)
    trained = VMoBAAttn(preset="training").for_model("wan", grid)
    assert (trained.select, trained.scope, trained.topk) == ("threshold", "head", None)
    assert trained.tau == 0.25
    assert trained.dense_steps == free.dense_steps == 0.25
    assert trained.dense_layers == free.dense_layers == 0
    # The densities of its tables 1 and 2.
    for method, density in ((free, 0.31), (trained, 0.19)):
        found = [method.expected_density(grid, layer) for layer in range(3)]
        assert sum(found) / 3 == pytest.approx(density, abs=0.006)
    assert VMoBAAttn(preset="training", tau=0.5, dense_steps=3).for_model("wan", grid).tau == 0.5


def test_expected_density_is_what_is_selected() -> None:
    grid = TokenGrid(8, 8, 8, text_after=16)
    q, k = torch.randn(2, 1, grid.tokens, 2, 16)
    for method, tolerance in ((VMoBAAttn(topk=3), 1e-6), (VMoBAAttn(preset="training"), 0.04)):
        for layer in range(3):
            mask = token_mask(method, q, k, site(grid, layer)).float().mean().item()
            assert method.expected_density(grid, layer) == pytest.approx(mask, abs=tolerance)
    assert DENSE.expected_density(grid, 0) == 1


def test_chunks_larger_than_the_grid_are_all_of_it() -> None:
    grid = TokenGrid(3, 4, 5)
    method = VMoBAAttn(chunk_1d=9, chunk_2d=(9, 2), chunk_3d=(9, 9, 9), topk=(5, 6, 7))
    assert [method.partition(grid, layer).chunk for layer in range(3)] == [
        (60,), (3, 4, 2), (3, 4, 5),
    ]  # fmt: skip
    q, k, v = torch.randn(3, 1, 60, 1, 8)
    want, _ = reference_attention(q, k, v, None)
    for layer in range(3):
        out = method.attend(q, k, v, site(grid, layer))
        torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"preset": "fast"}, "preset is 'fast', but must be one of training-free, training"),
        ({"partitions": ()}, r"partitions is \(\), but must be some of 1d, 2d, 3d"),
        ({"partitions": ("1d", "4d")}, r"partitions is \('1d', '4d'\), but must be some of 1d, 2d"),
        ({"partitions": 3}, "partitions is 3, but must be some of 1d, 2d, 3d"),
        ({"partitions": {"1d"}}, r"partitions is {'1d'}, but must be some of 1d, 2d, 3d"),
        ({"chunk_1d": 0}, "chunk_1d is 0, but must be a number of frames above 0"),
        ({"chunk_1d": float("inf")}, "chunk_1d is inf, but must be a number of frames"),
        ({"chunk_1d": True}, "chunk_1d is True, but must be a number of frames"),
        (
            {"chunk_2d": (3, 4, 5)},
            r"chunk_2d is \(3, 4, 5\), but must be rows and columns of tokens: two int",
        ),
        ({"chunk_2d": (3, 0)}, r"chunk_2d is \(3, 0\), .* integers of at least 1"),
        (
            {"chunk_3d": 4},
            "chunk_3d is 4, but must be frames, rows and columns of tokens: three integers",
        ),
        ({"select": "best"}, "select is 'best', but must be one of topk, threshold"),
        ({"scope": "all"}, "scope is 'all', but must be one of query, head, unpublished-block, un"),
        ({"topk": 0}, "topk is 0, but must be an integer of at least 1, or three of them"),
        ({"topk": (3, 4)}, r"topk is \(3, 4\), but must be an integer of at least 1, or three"),
        ({"topk": 2.5}, "topk is 2.5, but must be an integer"),
        ({"preset": "training", "tau": 0}, "tau is 0, but must be a number above 0 and at most 1"),
        ({"preset": "training", "tau": 1.1}, "tau is 1.1, but must be a number above 0 and at mo"),
        ({"preset": "training", "tau": True}, "tau is True, but must be a number above 0"),
        ({"preset": "training", "tau": float("nan")}, "tau is nan, but must be a number above 0"),
        (
            {"tau": 0.3},
            r"tau is 0.3, but has no effect with select='topk' \(preset 'training-free'\); leave it"
            r" out or use select='threshold'",
        ),
        (
            {"preset": "training", "topk": 3},
            r"topk is 3, but has no effect with select='threshold' .* or use select='topk'",
        ),
        ({"scope": "unpublished-block"}, "scope is 'unpublished-block', which is for thresholds"),
        ({"centre_keys": 1}, "centre_keys is 1, but must be true or false"),
        ({"granularity": "block"}, "granularity is 'block', but must be one of query, tile"),
        ({"granularity": "tile", "tile": 0}, "tile is 0, but must be an integer of at least 1"),
        ({"tile": 32}, "tile is 32, but has no effect with granularity='query'; leave it out"),
    ],
    ids=str,
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VMoBAAttn(**parameters)


def test_a_method_writes_itself_out() -> None:
    method = VMoBAAttn(
        chunk_1d=0.5, chunk_2d=[3, 4], chunk_3d=[1, 2, 3], topk=[2, 3, 4], partitions="2d"
    )
    assert method.partitions == ("2d",)
    assert (method.chunk_2d, method.chunk_3d, method.topk) == ((3, 4), (1, 2, 3), (2, 3, 4))
    assert from_dict(method.to_dict()) == method
    assert from_dict({"type": "vmoba"}) == VMoBAAttn()


def test_selected_attention_is_the_public_entry() -> None:
    grid = TokenGrid(2, 3, 4, text_before=1)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 8)
    partition = SPARSE.partition(grid, 1)
    q, k, v = (partition.to_blocks(x) for x in (q, k, v))
    blocks = partition.key_blocks(q.device)
    bits = SPARSE.selection(*(partition.from_blocks(x) for x in (q, k)), site(grid, 1))
    found = selected_attention(q, k, v, blocks, bits)
    want, _ = reference_attention(q, k, v, dense_mask(blocks, bits))
    torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-5)
    assert stock.NEARBY.heads_apart
    assert not VMoBAAttn(scope="unpublished-all").heads_apart
    assert not VMoBAAttn(preset="training", scope="unpublished-block").heads_apart
