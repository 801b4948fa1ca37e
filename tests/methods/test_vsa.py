"""VSA: goldens, the definition in float64, text and references, the gate inside of models."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import tiny_wan
import torch
from content_goldens import Golden, read
from golden_files import matching
from hypothesis import given, settings
from hypothesis import strategies as st

import diffattn
from diffattn import Reference, TokenGrid, VSAAttn
from diffattn.methods.base import Site
from diffattn.methods.vsa.gate import VSAGate
from diffattn.methods.vsa.tiling import BLOCK, tiling_of
from diffattn.routing.rules import kept_blocks, top
from diffattn.spans import spans_of

EXACT = {"atol": 2e-6, "rtol": 1e-5}


def site(grid: TokenGrid) -> Site:
    return Site("wan", 5, 10, grid)


def with_golden(path: Path) -> tuple[Golden, VSAAttn, TokenGrid]:
    golden = read(path)
    tile: Any = tuple(golden.tile.tolist())
    return golden, VSAAttn(keep=1 - golden.sparsity, tile=tile), TokenGrid(*golden.grid.tolist())


def truth(
    method: VSAAttn,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    grid: TokenGrid,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float64 attention over what the method selected, plus the gated attention of tile means."""
    chosen = method.selection(q, k, site(grid), key_mask=key_mask)
    scale = q.shape[-1] ** -0.5
    outs = []
    for sample in range(q.shape[0]):
        there = torch.ones(grid.tokens, dtype=torch.bool)
        if key_mask is not None:
            there = key_mask[sample]
        of_heads = []
        for head in range(q.shape[2]):
            mask = method.selection_mask(chosen[sample, head], grid)
            tile_of = mask.block_of  # type: ignore[attr-defined]
            query, key, value = (x[sample, :, head].double() for x in (q, k, v))
            seen = mask.dense() & there
            out = (query @ key.T * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ value
            if gate is not None:
                one_hot = torch.nn.functional.one_hot(tile_of).double() * there[:, None]
                count = one_hot.sum(0)
                means = [one_hot.T @ x / count.clamp(min=1)[:, None] for x in (query, key, value)]
                scores = (means[0] @ means[1].T * scale).masked_fill(count == 0, -torch.inf)
                coarse = scores.softmax(-1) @ means[2]
                out = out + gate[sample, :, head].double() * coarse[tile_of]
            of_heads.append(out)
        outs.append(torch.stack(of_heads, 1))
    return torch.stack(outs)


V_GOLDENS = pytest.mark.parametrize(
    "path", matching("block-topk/v*.npz", 4), ids=lambda path: path.stem
)


@V_GOLDENS
def test_public_tiles_and_selection(path: Path) -> None:
    golden, method, grid = with_golden(path)
    tiling = method.tiling(grid)
    assert tiling.lengths == tuple(golden.tile_lengths.tolist())
    real = tiling.token[tiling.token < grid.tokens]
    assert torch.equal(real, golden.positions.long())
    tiles = len(tiling.lengths)
    assert kept_blocks(1 - golden.sparsity, tiles) == golden.topk
    selected = method.selection(golden.q.float(), golden.k.float(), site(grid))
    assert torch.equal(selected, golden.selected_public)


@V_GOLDENS
def test_public_outputs_and_gradients(path: Path) -> None:
    golden, method, grid = with_golden(path)
    leaves = [golden.values[name].float().requires_grad_() for name in "qkv"]
    # Without a gate the public operator adds the coarse branch as it is: a gate of ones.
    is_gated = golden.gate.numel() > 0
    gate = golden.gate.float() if is_gated else torch.ones_like(leaves[0])
    gate.requires_grad_()
    fine = method.attend_gated(*leaves, None, grid)
    torch.testing.assert_close(fine, golden.out_fine, **EXACT)
    out = method.attend_gated(*leaves, gate, grid)
    torch.testing.assert_close(out, golden.out, **EXACT)
    found = torch.autograd.grad(out, (*leaves, gate), golden.grad_out.float())
    for name, grad in zip(("dq", "dk", "dv", "dgate"), found, strict=True):
        if name in golden.values:
            torch.testing.assert_close(grad, golden.values[name], atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("path", matching("block-topk/p*.npz", 2), ids=lambda path: path.stem)
def test_public_tiles_and_masks_with_other_tokens(path: Path) -> None:
    golden = read(path)
    segments = golden.segments.tolist()
    tile: Any = tuple(golden.tile.tolist())
    grid = TokenGrid(*golden.grid.tolist(), text_before=sum(segments))
    tiling = tiling_of(grid.tokens, spans_of(grid, 64), tile, segments=segments)
    assert tiling.lengths == tuple(golden.tile_lengths.tolist())
    assert tiling.span_tiles == (golden.video_tiles,)
    assert int((tiling.owner < 0).sum()) == golden.prefix_tiles
    real = tiling.token[tiling.token < grid.tokens]
    assert torch.equal(real, golden.positions.long())
    others = tiling.owner < 0
    for percent in (0, 50, 90):
        method = VSAAttn(keep=1 - percent / 100, tile=tile)
        always = method._pairs_always(tiling)
        exempt = method.choose(golden.scores, tiling) | always
        assert torch.equal(exempt, golden.values[f"mask_exempt_{percent}"])
        # The other public rule, by the part that the method is made of.
        count = kept_blocks(1 - percent / 100, golden.video_tiles) + golden.prefix_tiles
        compete = top(golden.scores, count) | others[:, None]
        assert torch.equal(compete, golden.values[f"mask_compete_{percent}"])


@pytest.mark.parametrize(
    ("sizes", "tile", "before", "after"),
    [
        ((3, 5, 7), (4, 4, 4), 5, 9),
        ((5, 9, 10), (4, 4, 8), 0, 70),
        ((5, 9, 17), (4, 8, 8), 300, 1),
        ((4, 8, 8), (4, 4, 4), 0, 0),
        ((1, 1, 1), (4, 8, 8), 0, 0),
        ((1, 13, 11), (4, 4, 4), 3, 0),
    ],
)
def test_equals_the_definition(
    sizes: tuple[int, int, int], tile: Any, before: int, after: int
) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(*sizes, before, after)
    method = VSAAttn(keep=0.3, tile=tile, neighbours=1 if after else None)
    q, k, v, gate = (x.requires_grad_() for x in torch.randn(4, 2, grid.tokens, 2, 8))
    out = method.attend_gated(q, k, v, gate, grid)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, gate)]
    want = truth(method, *leaves, grid)
    torch.testing.assert_close(out.double(), want, **EXACT)
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v, gate), along)
    expected = torch.autograd.grad(want, leaves, along.double())
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, atol=5e-6, rtol=1e-4)


@given(
    st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 80), st.integers(0, 80), st.booleans(),
    st.sampled_from([(4, 4, 4), (4, 4, 8), (4, 8, 8)]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_equals_the_definition_on_any_grid(
    sizes: tuple[int, int, int], before: int, after: int, masked: bool, tile: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    grid = TokenGrid(*sizes, before, after)
    method = VSAAttn(keep=0.4, tile=tile)
    q, k, v, gate = torch.randn(4, 1, grid.tokens, 1, 4, dtype=torch.float64)
    key_mask = None
    if masked:
        key_mask = torch.rand(1, grid.tokens) < 0.3
        key_mask[0, 0] = True
        k[0, ~key_mask[0]] = torch.nan
        v[0, ~key_mask[0]] = torch.nan
    out = method.attend_gated(q, k, v, gate, grid, key_mask=key_mask)
    want = truth(method, q, k.nan_to_num(0), v.nan_to_num(0), gate, grid, key_mask)
    # Queries of padding, and those whose tiles hold nothing but padding, are nobody's concern.
    seen = want.isfinite().all(-1)[..., 0]
    if key_mask is not None:
        seen &= key_mask
    torch.testing.assert_close(out[seen], want[seen], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("distance", [0, 1, 2])
def test_neighbours_are_seen_beside_the_share(distance: int) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(5, 9, 13, text_before=70)
    q, k = torch.randn(2, 2, grid.tokens, 2, 8)
    plain = VSAAttn(keep=0.2).selection(q, k, site(grid))
    method = VSAAttn(keep=0.2, neighbours=distance)
    number = torch.arange(plain.shape[-1])
    near = (number[:, None] - number).abs() <= distance
    near &= (number >= 2) & (number >= 2)[:, None]  # the text's two tiles come first
    got = method.selection(q, k, site(grid))
    assert torch.equal(got, plain | near)
    assert (got.sum() > plain.sum()).item()
    density = method.work(grid, 0, 2, 8).density
    assert density is not None
    assert density > VSAAttn(keep=0.2).work(grid, 0, 2, 8).density  # type: ignore[operator]


def test_no_tile_of_another_reference_is_a_neighbour() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 8, 8, 64, references=(Reference(0, 1, 8, 8),))
    q, k = torch.randn(2, 1, grid.tokens, 1, 8)
    chosen = [
        VSAAttn(keep=0.01, references="local", neighbours=n).selection(q, k, site(grid))[0, 0]
        for n in (None, 1)
    ]
    owner = VSAAttn(references="local").tiling(grid).owner
    added = chosen[1] & ~chosen[0]
    assert added.any()
    assert not added[owner[:, None] != owner].any()


def test_large_activations_have_exact_gradients() -> None:
    """A public kernel folded the scale into keys of 16 bits, which was wrong from 16 x on."""
    torch.manual_seed(0)
    grid = TokenGrid(5, 6, 9)
    method = VSAAttn(keep=0.5)
    q, k = (16 * torch.randn(2, 1, grid.tokens, 1, 16)).unbind()
    v, gate = torch.randn(2, 1, grid.tokens, 1, 16).unbind()
    leaves = [x.clone().requires_grad_() for x in (q, k, v, gate)]
    exact = [x.double().requires_grad_() for x in (q, k, v, gate)]
    out, want = method.attend_gated(*leaves, grid), truth(method, *exact, grid)
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, along)
    expected = torch.autograd.grad(want, exact, along.double())
    for got, right in zip(found, expected, strict=True):
        assert (got - right).norm() < 1e-4 * right.norm()


def test_a_gate_of_zeros_learns_and_nothing_else_gets_a_gradient_from_it() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 8, 8)
    method = VSAAttn(keep=0.5)
    leaves = [x.requires_grad_() for x in torch.randn(3, 1, grid.tokens, 2, 8)]
    gate = torch.zeros_like(leaves[0], requires_grad=True)
    plain, gated = (method.attend_gated(*leaves, g, grid) for g in (None, gate))
    assert torch.equal(plain, gated)
    along = torch.randn_like(plain)
    without = torch.autograd.grad(plain, leaves, along)
    *with_it, of_gate = torch.autograd.grad(gated, (*leaves, gate), along)
    for one, other in zip(without, with_it, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert of_gate.abs().max() > 0.01


def test_tokens_that_are_equal_within_tiles_make_the_coarse_branch_exact() -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 8, 8)
    method = VSAAttn(keep=1)
    tile_of = method.tiling(grid).tile_of_token
    q, k, v = (x[:, tile_of] for x in torch.randn(3, 1, 4, 2, 8))
    dense = method.attend_gated(q, k, v, None, grid)
    torch.testing.assert_close(dense, diffattn.attention(q, k, v))
    both = method.attend_gated(q, k, v, torch.ones_like(q), grid)
    torch.testing.assert_close(both, 2 * dense, **EXACT)


@pytest.mark.parametrize("text", [(20, 3), (0, 77), (0, 0)])
def test_other_tokens_see_everything_and_are_seen(text: tuple[int, int]) -> None:
    grid = TokenGrid(5, 9, 9, *text)
    q, k = torch.randn(2, 1, grid.tokens, 1, 8)
    method = VSAAttn(keep=0.1)
    mask = method.selection_mask(method.selection(q, k, site(grid))[0, 0], grid).dense()
    is_text = grid.is_text(torch.arange(grid.tokens))
    assert mask[is_text].all()
    assert mask[:, is_text].all()
    assert not mask[~is_text][:, ~is_text].all()


@pytest.mark.parametrize("references", ["exact", "visible", "local"])
def test_references_select_as_the_policy_says(references: str) -> None:
    torch.manual_seed(0)
    picture = Reference(10, 1, 16, 16)
    clip = Reference(10 + 256 + 512 + 6, 4, 8, 8, times=(0.0, 1.0, 2.0, 3.0))
    grid = TokenGrid(8, 8, 8, 10 + 256, 6 + 256 + 9, references=(picture, clip))
    method = VSAAttn(keep=0.5, references=references)
    q, k, v, gate = torch.randn(4, 1, grid.tokens, 1, 8)
    mask = method.selection_mask(method.selection(q, k, site(grid))[0, 0], grid).dense()
    target = torch.arange(grid.video.start, grid.video.stop)
    inside = [torch.arange(r.start, r.stop) for r in grid.references]
    assert mask[target][:, target].float().mean() == 0.5
    for number, tokens in enumerate(inside):
        other = inside[1 - number]
        assert mask[tokens][:, tokens].all() == (references == "exact")
        assert mask[tokens][:, other].all() == (references != "local")
        assert mask[target][:, tokens].all() == (references != "local")
        if references == "local":
            # Each region by itself gives the share.
            assert (mask[target][:, tokens].float().mean(1) == 0.5).all()
    assert mask[:10].all()
    assert mask[:, :10].all()
    out = method.attend_gated(q, k, v, gate, grid)
    want = truth(method, q, k, v, gate, grid)
    torch.testing.assert_close(out.double(), want, **EXACT)
    assert method.work(grid, 0, 1, 8).density == pytest.approx(float(mask.float().mean()))


def test_heads_and_samples_are_apart_and_queries_may_share_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(4, 6, 8, 0, 5)
    q, gate = torch.randn(2, 2, grid.tokens, 4, 8)
    k, v = torch.randn(2, 2, grid.tokens, 2, 8)
    method = VSAAttn(keep=0.4)
    out = method.attend_gated(q, k, v, gate, grid)
    for sample in range(2):
        for head in range(4):
            part = slice(head // 2, head // 2 + 1)
            own = slice(head, head + 1)
            alone = method.attend_gated(
                *(q[sample : sample + 1, :, own], k[sample : sample + 1, :, part]),
                *(v[sample : sample + 1, :, part], gate[sample : sample + 1, :, own]),
                grid,
            )
            torch.testing.assert_close(out[sample : sample + 1, :, own], alone, **EXACT)
    monkeypatch.setattr("diffattn.methods.vsa.method._BYTES_AT_ONCE", 1)
    torch.testing.assert_close(method.attend_gated(q, k, v, gate, grid), out)


def test_a_share_of_one_is_dense_bit_for_bit() -> None:
    grid = TokenGrid(3, 6, 7, text_after=7)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 8)
    out = VSAAttn(keep=1).attend(q, k, v, site(grid))
    assert torch.equal(out, diffattn.attention(q, k, v))


def test_the_plan_counts_the_places_that_fill_up_short_tiles() -> None:
    def flops(frames: int, tile: tuple[int, int, int] = (4, 4, 4)) -> float:
        grid = TokenGrid(frames, 28, 52)
        return VSAAttn(keep=0.2, tile=tile).work(grid, 0, 1, 8).flops / grid.tokens**2

    # A 21st frame makes a layer of tiles that are a quarter full.
    assert flops(21) > 1.2 * flops(20)
    tiling = VSAAttn().tiling(TokenGrid(21, 30, 52))
    assert tiling.places / tiling.tokens == pytest.approx(1.22, abs=0.005)
    # Short tiles of 4 x 8 x 8 take as many blocks as they need, and no more.
    wide = VSAAttn(tile=(4, 8, 8)).tiling(TokenGrid(1, 8, 8))
    assert wide.places == BLOCK


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": 0}, "keep is 0, but must be a number above 0 and at most 1"),
        ({"tile": (8, 8, 8)}, r"tile is \(8, 8, 8\), but must be one of \(4, 4, 4\), \(4, 4, 8\),"),
        ({"tile": 64}, r"tile is 64, but must be one of \(4, 4, 4\)"),
        ({"neighbours": -1}, "neighbours is -1, but must be an integer of at least 0"),
        ({"coarse": 1}, "coarse is 1, but must be true or false"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VSAAttn(**parameters)


def test_values_for_models() -> None:
    assert VSAAttn(coarse=True).for_model("wan2.1").keep == 0.2
    assert VSAAttn(coarse=True).for_model("minimax-h3").keep == 0.1
    assert VSAAttn(keep=0.3).for_model("minimax-h3").keep == 0.3
    assert VSAAttn(coarse=True).for_model("wan2.1").dense_steps == 0
    assert VSAAttn().for_model("wan2.1").dense_steps == 0.2


# The gate inside of models.


def wan_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 5, 12, 16, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 4, tiny_wan.TEXT_DIM, generator=generator),
        "return_dict": False,
    }


def gates(model: torch.nn.Module) -> list[VSAGate]:
    return [module for module in model.modules() if isinstance(module, VSAGate)]


def trained(model: torch.nn.Module, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for gate in gates(model):
        for weight in gate.parameters():
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator).to(weight)


FAMILIES = [
    "hunyuanvideo", "cogvideox-2b", "ltx-2", "mochi", "allegro-padded", "flux", "sdxl", "framepack",
    "flux-kontext", "qwen-image-edit", "minimax-h3-references",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_all_tiles_are_the_models_own_attention(name: str) -> None:
    case = tiny_families.CASES[name]
    model, inputs = case.build(), {**case.inputs(), "return_dict": False}
    with torch.no_grad():
        want = model(**inputs)[0]
        attachment = diffattn.set_attn_processor(model, VSAAttn(keep=0.999, coarse=True))
        assert attachment is not None
        assert len(gates(model)) == len(case.sites)
        torch.testing.assert_close(model(**inputs)[0], want, atol=1e-5, rtol=1e-4)
        assert attachment.sparse_calls == len(case.sites)
        trained(model)
        assert not torch.allclose(model(**inputs)[0], want, atol=1e-3)
        diffattn.set_attn_processor(model, None)
        assert torch.equal(model(**inputs)[0], want)


@pytest.mark.parametrize("name", ["flux.2", "kandinsky-5"])
def test_models_without_a_projection_to_queries_have_no_gate(name: str) -> None:
    model = tiny_families.CASES[name].build()
    with pytest.raises(ValueError, match=r"no projection to_q.*use VSAAttn\(coarse=False\)"):
        diffattn.set_attn_processor(model, VSAAttn(coarse=True))
    assert diffattn.set_attn_processor(model, VSAAttn(dense_steps=0)) is not None


@pytest.mark.parametrize(
    "name", ["wan", "hunyuanvideo", "flux", "minimax-h3-key-frames", "minimax-h3-references"]
)
def test_the_gate_is_of_what_is_projected_to_queries(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "wan":
        model, inputs = tiny_wan.transformer(), wan_inputs()
    else:
        case = tiny_families.CASES[name]
        model, inputs = case.build(), {**case.inputs(), "return_dict": False}
    calls: list[tuple[Any, ...]] = []
    original = VSAAttn.attend_gated

    def record(self: VSAAttn, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(self, *args, **kwargs)
        calls.append((*args, kwargs["key_mask"], out))
        return out

    monkeypatch.setattr(VSAAttn, "attend_gated", record)
    projected: list[torch.Tensor] = []
    attachment = diffattn.set_attn_processor(model, VSAAttn(keep=0.3, coarse=True))
    assert attachment is not None
    trained(model)
    for module in model.modules():
        if any(isinstance(child, VSAGate) for child in module.children()):
            module.to_q.register_forward_hook(lambda m, args, out: projected.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == len(projected) == len(gates(model)) > 1
    method = VSAAttn(keep=0.3)
    for gate, x, (q, k, v, found, grid, key_mask, out) in zip(
        gates(model), projected, calls, strict=True
    ):
        layer = gate.to_gate_compress
        want = torch.zeros(q.shape).flatten(2)
        # Text that has a stream and projections of its own has no gate.
        of_x = slice(None) if x.shape[1] == q.shape[1] else grid.pictures
        want[:, of_x] = torch.nn.functional.linear(x, layer.weight, layer.bias)
        want = want.unflatten(-1, q.shape[2:])
        torch.testing.assert_close(found, want)
        assert found.abs().max() > 0.01
        exact = truth(method, q, k, v, found, grid, key_mask)
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-4)


def test_a_new_gate_changes_nothing_and_is_not_computed() -> None:
    model, inputs = tiny_wan.transformer(), wan_inputs()
    with torch.no_grad():
        stock = model(**inputs)[0]
        diffattn.set_attn_processor(model, VSAAttn(keep=0.3, dense_steps=0))
        want = model(**inputs)[0]
        before = torch.get_rng_state()
        diffattn.set_attn_processor(model, VSAAttn(keep=0.3, coarse=True))
        assert torch.equal(torch.get_rng_state(), before)
        computed: list[int] = []
        for gate in gates(model):
            gate.to_gate_compress.register_forward_hook(lambda *_: computed.append(1))
        assert torch.equal(model(**inputs)[0], want)
        assert not computed
        trained(model)
        assert not torch.allclose(model(**inputs)[0], want, atol=1e-4)
        assert len(computed) == tiny_wan.LAYERS
        for gate in gates(model):
            for weight in gate.parameters():
                weight.zero_()
        assert torch.equal(model(**inputs)[0], want)
        diffattn.set_attn_processor(model, None)
        assert torch.equal(model(**inputs)[0], stock)
    assert not gates(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_new_gate_gets_gradients(checkpointing: bool) -> None:
    model, inputs = tiny_wan.transformer(), wan_inputs()
    diffattn.set_attn_processor(model, VSAAttn(keep=0.3, coarse=True))
    model.requires_grad_(False)
    for gate in gates(model):
        gate.requires_grad_(True)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()
        inputs["hidden_states"].requires_grad_()
    model(**inputs)[0].square().sum().backward()
    for gate in gates(model):
        for weight in gate.parameters():
            assert weight.grad is not None
            assert weight.grad.abs().max() > 0


def test_autocast_keeps_half_precision_and_trains() -> None:
    model, inputs = tiny_wan.transformer(), wan_inputs()
    diffattn.set_attn_processor(model, VSAAttn(keep=1, coarse=True))
    trained(model)
    wide = model(**inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**inputs)[0]
    assert (low - wide).abs().mean() < 0.1 * wide.abs().mean()
    low.square().sum().backward()
    assert all(weight.grad.isfinite().all() for g in gates(model) for weight in g.parameters())
    grid = TokenGrid(4, 8, 8)
    q, k, v, gate = torch.randn(4, 1, grid.tokens, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert VSAAttn().attend_gated(q, k, v, gate, grid).dtype == torch.bfloat16


def test_fused_projections_and_copies_keep_their_gates() -> None:
    model, inputs = tiny_wan.transformer(), wan_inputs()
    diffattn.set_attn_processor(model, VSAAttn(keep=0.3, coarse=True))
    trained(model)
    with torch.no_grad():
        want = model(**inputs)[0]
        copied = copy.deepcopy(model)
        model.fuse_qkv_projections()
        torch.testing.assert_close(model(**inputs)[0], want, **EXACT)
        for gate in gates(model):
            gate.requires_grad_(False)
            for weight in gate.parameters():
                weight.zero_()
        torch.testing.assert_close(copied(**inputs)[0], want, **EXACT)


def test_threads_have_gates_of_their_own() -> None:
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, VSAAttn(keep=0.3, coarse=True))
    trained(model)
    several = [wan_inputs() | {"hidden_states": torch.randn(1, 16, 4 + n, 8, 8)} for n in range(3)]
    with torch.no_grad():
        want = [model(**inputs)[0] for inputs in several]
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[number] = model(**several[number])[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(want):
        torch.testing.assert_close(found[number], expected, **EXACT)


def test_compiled_models_keep_their_gates() -> None:
    model, inputs = tiny_wan.transformer(), wan_inputs()
    diffattn.set_attn_processor(model, VSAAttn(keep=0.3, coarse=True))
    trained(model)
    with torch.no_grad():
        want = model(**inputs)[0]
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs)[0], want, **EXACT)
        assert not torch.allclose(compiled(**inputs)[0], 0 * want)
        trained(model, seed=5)
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], **EXACT)


def test_a_gate_of_other_tokens_is_refused() -> None:
    from diffattn.methods.vsa.gate import _Observed, _running, gate_of_call

    module = torch.nn.Module()
    module.to_q = torch.nn.Linear(4, 16)
    gate = VSAGate(module)
    observed = _Observed(module, gate)
    token = _running.set(observed)
    try:
        with pytest.raises(RuntimeError, match="has not called that projection"):
            gate_of_call(torch.zeros(1, 6, 2, 8), TokenGrid(1, 2, 3))
        observed.to_q(torch.randn(1, 6, 4))
        with pytest.raises(
            NotImplementedError,
            match="gate of vsa is of 6 tokens and 16 channels, but attention of 12 tokens and 1 x",
        ):
            gate_of_call(torch.zeros(1, 12, 1, 8), TokenGrid(1, 2, 6))
        # Text that the model projects by other layers has a gate of 0.
        found = gate_of_call(torch.zeros(1, 9, 2, 8), TokenGrid(1, 2, 3, 1, 2))
        assert found is not None
        assert not found[:, [0, 7, 8]].any()
    finally:
        _running.reset(token)


def test_a_module_without_queries_is_refused() -> None:
    with pytest.raises(ValueError, match="Module has no projection to_q, whose inputs the gate"):
        VSAGate(torch.nn.Module())
