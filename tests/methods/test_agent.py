"""AgentAttn against the public code's outputs, its definition in float64, and whole models."""

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import golden_files
import numpy as np
import pytest
import stock
import tiny_families
import torch
from diffusers.models.attention import BasicTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import CASES, noise
from tiny_pipelines import PIPELINES
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn
from diffattn import AgentAttn, TokenGrid
from diffattn.methods import Site, from_dict
from diffattn.methods.agent.merging import cell_offsets, match, sources_and_destinations

GOLDENS = golden_files.GOLDENS / "agent"
EXACT = {"atol": 1e-5, "rtol": 1e-4}
ALWAYS = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """float64 weights (batch, heads, queries, keys) of (batch, tokens, heads, head_dim)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return scores.softmax(-1)


def apply(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double())


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: TokenGrid,
    cell: tuple[int, int, int],
    k_scale2: float,
    k_shortcut: float,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Section 5.2 of the specification, token by token."""
    dim = q.shape[-1]
    usual, sharp = dim**-0.5, dim ** (-0.5 * k_scale2)
    text = grid.is_text(torch.arange(grid.tokens))
    boxes: dict[tuple[int, ...], list[int]] = {}
    for token in (~text).nonzero().flatten().tolist():
        place = (int(x) for x in grid.coordinates(torch.tensor(token)))
        boxes.setdefault(tuple(a // b for a, b in zip(place, cell, strict=True)), []).append(token)
    means, exists = [], []
    for members in boxes.values():
        counts = seen[:, members].double()[..., None, None]
        total = counts.sum(1)
        means.append((q[:, members].double() * counts).sum(1) / total.clamp(min=1))
        exists.append(total[:, 0, 0] > 0)
    agents, there = torch.stack(means, 1), torch.stack(exists, 1)
    gathered = apply(softmax_attention(agents, k, usual, seen), v)
    keys = torch.cat([agents * (sharp / usual), k[:, text].double()], 1)
    weights = softmax_attention(q, keys, usual, torch.cat([there, seen[:, text]], 1))
    out = apply(weights, torch.cat([gathered, v[:, text].double()], 1)) + k_shortcut * v.double()
    out[:, text] = apply(softmax_attention(q[:, text], k, usual, seen), v)
    return out


grids = st.builds(
    TokenGrid,
    frames=st.integers(1, 4),
    height=st.integers(1, 7),
    width=st.integers(3, 7),
    text_before=st.sampled_from([0, 1, 5]),
    text_after=st.sampled_from([0, 1, 3]),
)


@given(
    grid=grids,
    cell=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(3, 5)),
    batch=st.integers(1, 3),
    padded=st.booleans(),
    k_scale2=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_boxes_are_the_definition_on_any_grid(
    grid: TokenGrid,
    cell: tuple[int, int, int],
    batch: int,
    padded: bool,
    k_scale2: float,
    seed: int,
) -> None:
    q, k, v = (noise(batch, grid.tokens, 2, 6, seed=seed + i) for i in range(3))
    seen = torch.ones(batch, grid.tokens, dtype=torch.bool)
    if padded:
        seen = noise(batch, grid.tokens, seed=seed + 3) > -0.5
        seen[:, grid.video.start] = True
    method = AgentAttn(cell=cell, k_scale2=k_scale2, k_shortcut=0.2)
    site = Site("wan", 0, 1, grid)
    out = method.attend(q, k, v, site, key_mask=seen if padded else None)
    if method.agents(q, site) is None:
        want = apply(softmax_attention(q, k, 6**-0.5, seen), v)
    else:
        want = by_definition(q, k, v, grid, cell, k_scale2, 0.2, seen)
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=1e-5)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return apply(softmax_attention(q, k, q.shape[-1] ** -0.5), v)


def test_as_many_agents_as_tokens_are_dense_attention() -> None:
    grid = TokenGrid(3, 5, 7, text_after=1)
    q, k, v = (noise(3, grid.tokens, 2, 8, seed=i) for i in range(3))
    method = AgentAttn(cell=(1, 1, 1), k_scale2=1, k_shortcut=0)
    out = method.attend(q, k, v, Site("wan", 0, 1, grid))
    torch.testing.assert_close(out.double(), dense(q, k, v), **EXACT)


def test_agents_that_are_the_queries_give_dense_attention_when_asked_sharply() -> None:
    from diffattn.methods.agent.agents import Agents, ask_agents, gather_values

    q, k, v = (noise(2, 37, 2, 16, seed=i) for i in range(3))
    q = 4 * torch.nn.functional.normalize(q, dim=-1)
    agents = Agents(q.float())
    gathered = gather_values(agents, k, v, 0.25)
    out = ask_agents(q, agents, gathered, 0.25, sharpness=100.0)
    torch.testing.assert_close(out.double(), dense(q, k, v), **EXACT)


def test_weights_sum_to_one_and_the_shortcut() -> None:
    grid = TokenGrid(3, 6, 7, text_before=5)
    q, k = (noise(2, grid.tokens, 2, 8, seed=i) for i in range(2))
    one = torch.ones(2, grid.tokens, 2, 8)
    out = AgentAttn(cell=(2, 3, 4), k_shortcut=0.25).attend(q, k, one, Site("wan", 0, 1, grid))
    torch.testing.assert_close(out[:, grid.video], torch.full_like(out[:, grid.video], 1.25))
    torch.testing.assert_close(out[:, :5], one[:, :5])
    v = noise(2, grid.tokens, 2, 8, seed=2)
    out = AgentAttn(cell=(2, 3, 4), k_shortcut=0).attend(q, k, v, Site("wan", 0, 1, grid))
    assert (out.amax(1) <= v.amax(1) + 1e-6).all()
    assert (out.amin(1) >= v.amin(1) - 1e-6).all()


def test_order_of_keys_and_of_tokens_in_a_box_is_no_matter() -> None:
    grid, method = TokenGrid(2, 4, 6), AgentAttn(cell=(2, 4, 3))
    q, k, v = (noise(1, grid.tokens, 2, 8, seed=i) for i in range(3))
    out = method.attend(q, k, v, Site("wan", 0, 1, grid))
    # Swaps the frames, which are together in every box.
    swapped = torch.arange(48).roll(24)
    moved = method.attend(q[:, swapped], k[:, swapped], v[:, swapped], Site("wan", 0, 1, grid))
    torch.testing.assert_close(moved, out[:, swapped], **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_dense_attention_in_it(dtype: torch.dtype) -> None:
    grid, method = TokenGrid(3, 7, 11), AgentAttn(cell=(2, 3, 4))
    q, k, v = (noise(2, grid.tokens, 2, 32, seed=i).to(dtype) for i in range(3))
    seen = torch.ones(2, grid.tokens, dtype=torch.bool)
    want = by_definition(q, k, v, grid, (2, 3, 4), 0.3, 0.075, seen)
    out = method.attend(q, k, v, Site("wan", 0, 1, grid))
    assert out.dtype == dtype
    error = (out.double() - want).abs().max()
    assert error < 4 * torch.finfo(dtype).eps


def test_gradients_are_those_of_the_definition() -> None:
    grid, cell = TokenGrid(2, 5, 3, text_after=2), (2, 2, 3)
    inputs = [noise(1, grid.tokens, 1, 4, seed=i).double().requires_grad_() for i in range(3)]
    seen = torch.ones(1, grid.tokens, dtype=torch.bool)
    out = AgentAttn(cell=cell).attend(*inputs, Site("wan", 0, 1, grid))
    grad = noise(*out.shape, seed=5).double()
    got = torch.autograd.grad(out, inputs, grad)
    want = torch.autograd.grad(by_definition(*inputs, grid, cell, 0.3, 0.075, seen), inputs, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# --- goldens


def split_heads(x: np.ndarray, heads: int) -> torch.Tensor:
    return torch.from_numpy(x).unflatten(2, (heads, -1))


@pytest.mark.parametrize(
    "name", ["default_d8", "fp32_flag", "k0_short", "no_agent", "too_many_agents_fallback"]
)
def test_core_is_that_of_the_public_code(name: str) -> None:
    from diffattn.methods.agent.agents import Agents
    from diffattn.methods.agent.method import asking, sharpness
    from diffattn.spans import division_of

    golden = np.load(GOLDENS / f"core_{name}.npz")
    q, k, v = (split_heads(golden[x], int(golden["heads"])) for x in "qkv")
    grid = TokenGrid(1, 1, q.shape[1])
    method = AgentAttn(k_scale2=golden["k_scale2"].item(), k_shortcut=golden["k_shortcut"].item())
    if "agent" in golden and 2 * golden["agent"].shape[1] < q.shape[1]:
        agents = Agents(split_heads(golden["agent"], int(golden["heads"])))
        division = division_of(grid, method.spans(grid))
        ask = asking(agents, q, k, v, division, q.shape[-1] ** -0.5, None)
        out = ask(sharpness(q.shape[-1], method.k_scale2)) + method.k_shortcut * v
    else:
        out = method.attend(q, k, v, Site("unet", 0, 1, grid))
    np.testing.assert_allclose(out.flatten(2).numpy(), golden["out"], atol=3e-6)


@pytest.mark.parametrize(
    "name",
    ["16x16_s2_off", "16x16_s4_rand", "7x10_s4_norand", "8x8_s2_norand", "8x8_s2_rand"],
)
def test_merging_is_that_of_the_public_code(name: str) -> None:
    golden = np.load(GOLDENS / f"merge_{name}.npz")
    height, width, stride = int(golden["H"]), int(golden["W"]), (int(golden["sy"]),) * 2
    parts = sources_and_destinations(height, width, stride, torch.from_numpy(golden["offsets"]))
    for part, want in zip(parts, ("src_token", "dst_token"), strict=True):
        assert sorted(part.tolist()) == sorted(golden[want].tolist())
    x, y = torch.from_numpy(golden["x"]), torch.from_numpy(golden["y"])
    merging = match(x, *parts, golden["ratio"].item(), golden["agent_ratio"].item())
    for z, suffix in ((x, ""), (y, "_y")):
        merged = merging.merge(z)
        assert merged.shape == golden[f"feature{suffix}"].shape
        got = merging.unmerge(merged).numpy()
        np.testing.assert_allclose(got, golden[f"unmerged{suffix}"], atol=2e-6)
        assert (merging.agent_of is not None) == bool(golden["agent_enabled"])
        if merging.agent_of is not None:
            agents = merging.agent_means(merged[:, :, None])[:, :, 0].numpy()
            want = golden[f"agent{suffix}"]
            assert agents.shape == want.shape
            # Their order is nobody's business.
            for ours, theirs in zip(agents, want, strict=True):
                apart = np.abs(ours[:, None] - theirs[None]).max(-1)
                assert apart.min(0).max() < 3e-6
                assert apart.min(1).max() < 3e-6


@pytest.mark.parametrize(
    ("name", "late"), [("phase1", False), ("defaults", False), ("defaults", True)]
)
def test_whole_block_is_that_of_the_public_code(name: str, late: bool) -> None:
    golden = np.load(GOLDENS / f"block_{name}.npz")
    block = BasicTransformerBlock(
        32, 4, 8, cross_attention_dim=24, activation_fn="gelu", ff_inner_dim=32
    ).eval()
    names = {"ff.0": "ff.net.0.proj", "ff.2": "ff.net.2"}
    weights = {}
    for key in golden.files:
        if key.startswith("w.block."):
            key_of_ours = key.removeprefix("w.block.")
            for theirs, ours in names.items():
                key_of_ours = key_of_ours.replace(theirs, ours)
            weights[key_of_ours] = torch.from_numpy(golden[key])
    block.load_state_dict(weights)
    model: Any = tiny_families.unet(block_out_channels=(32, 32))
    model.down_blocks[0].attentions[0].transformer_blocks[0] = block
    tokens = torch.from_numpy(golden["latent"]).flatten(2).transpose(1, 2)
    text = torch.from_numpy(golden["context"])
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(
        lambda m, args, kwargs: ((tokens,), kwargs | {"encoder_hidden_states": text}),
        with_kwargs=True,
    )
    block.register_forward_hook(lambda m, args, output: seen.append(output))
    size = (int(golden["arg.sy"]), int(golden["arg.sx"]))
    method = AgentAttn(
        **{x: golden[f"arg.{x}"].item() for x in ("ratio", "agent_ratio")},
        **{x: golden[f"arg.{x}"].item() for x in ("k_scale2", "k_shortcut")},
        **({"late_stride": size} if late else {"stride": size}),
        dense_layers=99 if late else 0,
        dense_steps=0,
        last_dense_steps=0,
        seed=None,
    )
    inputs = {"timestep": 7, "encoder_hidden_states": noise(2, 7, 16)}
    with torch.no_grad():
        model(noise(2, 4, 16, 16), **inputs)
        diffattn.set_attn_processor(model, method)
        model(noise(2, 4, 16, 16), **inputs)
        diffattn.set_attn_processor(model, None)
        model(noise(2, 4, 16, 16), **inputs)
    for out, want in zip(seen, ("out_unpatched", "out", "out_unpatched"), strict=True):
        np.testing.assert_allclose(out.numpy(), golden[want], atol=5e-6)


# --- whole models

DITS = [name for name, case in CASES.items() if not case.entry]
UNETS = ["sd1.5", "sdxl", "animatediff"]


def forward(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@contextlib.contextmanager
def through_agents(
    model: torch.nn.Module, case: tiny_families.Case, cell: tuple[int, int, int]
) -> Iterator[list[int]]:
    """The stock model with the definition in the place of PyTorch's attention at its sites."""
    calls: list[int] = []

    def attention(plain: Any, site: str, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        tokens = k.shape[-2]
        calls.append(tokens)
        seen = torch.ones(q.shape[0], tokens, dtype=torch.bool)
        if mask is not None:
            # A mask of pairs has a row of a video token where no text stands beyond.
            rows = mask.reshape(mask.shape[0], -1)
            text_first = case.text is not None and case.text[0] == "before"
            row = rows[:, -tokens:] if text_first else rows[:, :tokens]
            seen = seen & (row if row.dtype == torch.bool else row == 0)
        given = (slice(0, tokens),)
        if case.queries is not None and q.shape[-2] != tokens:
            (part,) = given = case.queries(q.shape[-2], tokens)
            q = torch.nn.functional.pad(q, (0, 0, part.start, tokens - part.stop))
        heads_last = (x.transpose(1, 2) for x in (q, k, v))
        out = by_definition(*heads_last, case.grid_of(tokens), cell, 0.3, 0.075, seen)
        return out.transpose(1, 2)[:, :, given[0]].to(q.dtype)

    queries = case.queries is not None
    with stock.attending_by(attention, model, case.sites, some_queries=queries):
        yield calls


@pytest.mark.parametrize("name", DITS)
def test_every_transformer_is_the_stock_model_with_agents(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    before = forward(model, inputs)
    with through_agents(model, case, (2, 3, 4)) as calls:
        want = forward(model, inputs)
    assert len(calls) >= len(case.sites)
    assert not torch.allclose(want, before, atol=1e-3), "agents should matter"
    attachment = diffattn.set_attn_processor(model, AgentAttn(cell=(2, 3, 4), **ALWAYS))
    torch.testing.assert_close(forward(model, inputs), want, **EXACT)
    assert attachment.sparse_calls == len(case.sites)
    # Half as many agents as tokens save nothing.
    diffattn.set_attn_processor(model, AgentAttn(cell=(1, 1, 2), **ALWAYS))
    torch.testing.assert_close(forward(model, inputs), before, **EXACT)
    diffattn.set_attn_processor(model, None)
    assert torch.equal(forward(model, inputs), before)


def merged_tokens(model: torch.nn.Module, case: tiny_families.Case, layer: str) -> dict[str, int]:
    """How many tokens a layer of each block is given in a forward, by the block's name."""
    counts: dict[str, int] = {}
    hooks = []
    for site in case.sites:
        block = site.rpartition(".")[0]

        def count(module: Any, args: Any, kwargs: Any, block: str = block) -> None:
            counts[block] = (args[0] if args else kwargs["hidden_states"]).shape[1]

        module = model.get_submodule(f"{block}.{layer}")
        hooks.append(module.register_forward_pre_hook(count, with_kwargs=True))
    forward(model, case.inputs())
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize(
    ("name", "max_downsample", "tokens"),
    [
        # 40 % of 12 x 16 tokens, or of 6 x 8, are merged away.
        ("sd1.5", None, {192: 116, 48: 48}),
        ("sd1.5", 2, {192: 116, 48: 29}),
        ("sdxl", None, {48: 29}),
        ("sdxl", 1, {48: 48}),
        ("animatediff", None, {192: 116, 48: 48}),
    ],
)
def test_which_blocks_of_a_unet_are_touched(
    name: str, max_downsample: int | None, tokens: dict[int, int]
) -> None:
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    whole, before = merged_tokens(model, case, "attn1.to_k"), forward(model, inputs)
    method = AgentAttn(max_downsample=max_downsample, **ALWAYS)
    attachment = diffattn.set_attn_processor(model, method)
    want = {block: tokens[count] for block, count in whole.items()}
    assert merged_tokens(model, case, "attn1.to_k") == want
    assert merged_tokens(model, case, "attn2.to_q") == whole
    out = forward(model, inputs)
    assert attachment.sparse_calls == 3 * len(case.sites)
    assert torch.allclose(out, before, atol=1e-5) == (want == whole)
    diffattn.set_attn_processor(model, None)
    assert torch.equal(forward(model, inputs), before)


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_that_merges_nothing_is_the_stock_model(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    hooks = {n: _hooks(m) for n, m in model.named_modules()}
    before = forward(model, inputs)
    diffattn.set_attn_processor(model, AgentAttn(ratio=0, agent_ratio=0, **ALWAYS))
    torch.testing.assert_close(forward(model, inputs), before, **EXACT)
    diffattn.set_attn_processor(model, None)
    assert hooks == {n: _hooks(m) for n, m in model.named_modules()}
    assert torch.equal(forward(model, inputs), before)


def _hooks(module: torch.nn.Module) -> tuple[int, int]:
    return len(module._forward_pre_hooks), len(module._forward_hooks)


def test_guidance_in_two_calls_or_in_one_is_the_same() -> None:
    case = CASES["sd1.5"]
    model, inputs = case.build(), case.inputs()
    diffattn.set_attn_processor(model, AgentAttn(**ALWAYS))
    both = forward(model, inputs)
    for i in range(2):
        one = {name: x[i : i + 1] for name, x in inputs.items()}
        torch.testing.assert_close(forward(model, one), both[i : i + 1], **EXACT)


def test_seeds_choose_the_partition() -> None:
    case = CASES["sd1.5"]
    model, inputs = case.build(), case.inputs()
    outs = []
    for seed in (0, 0, 1, None):
        diffattn.set_attn_processor(model, AgentAttn(seed=seed, **ALWAYS))
        torch.manual_seed(len(outs))
        outs.append(forward(model, inputs))
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])
    assert not torch.allclose(outs[0], outs[3])
    first = cell_offsets(12, 16, (4, 4), (0, 0, 0))
    assert not torch.equal(first, cell_offsets(12, 16, (4, 4), (0, 1, 0)))
    assert not torch.equal(first, cell_offsets(12, 16, (4, 4), (0, 0, 1)))
    assert not cell_offsets(12, 16, (4, 4), None).any()


def test_other_layers_have_merged_tokens_too_if_asked() -> None:
    case = CASES["sd1.5"]
    model, inputs = case.build(), case.inputs()
    outs = []
    for cross, mlp in ((False, False), (True, False), (False, True)):
        method = AgentAttn(merge_crossattn=cross, merge_mlp=mlp, **ALWAYS)
        diffattn.set_attn_processor(model, method)
        assert set(merged_tokens(model, case, "attn2.to_q").values()) == {116 if cross else 192, 48}
        assert set(merged_tokens(model, case, "ff").values()) == {116 if mlp else 192, 48}
        outs.append(forward(model, inputs))
    assert not torch.allclose(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])
    model.down_blocks[0].attentions[0].transformer_blocks[0].set_chunk_feed_forward(48, dim=1)
    with pytest.raises(
        ValueError, match=r"merge_mlp is True, but down_blocks.* gives its layers 96 of its 384"
    ):
        forward(model, inputs)


def test_only_blocks_with_the_method_merge() -> None:
    case = CASES["sd1.5"]
    model = case.build()
    diffattn.set_attn_processor(model, {"down_blocks.0": AgentAttn(**ALWAYS)})
    counts = merged_tokens(model, case, "attn1.to_k")
    assert [block for block, count in counts.items() if count == 116] == [
        "down_blocks.0.attentions.0.transformer_blocks.0"
    ]


def test_blocks_may_merge_in_different_ways() -> None:
    case = CASES["sd1.5"]
    model = case.build()
    methods = {"down_blocks": AgentAttn(ratio=0.25, **ALWAYS), "*": AgentAttn(ratio=0.5, **ALWAYS)}
    diffattn.set_attn_processor(model, methods)
    counts = merged_tokens(model, case, "attn1.to_k")
    assert {count for block, count in counts.items() if "down" in block} == {144, 48}
    assert {count for block, count in counts.items() if "up" in block} == {96, 48}


def test_checkpoints_and_copies_of_a_unet_merge_alike() -> None:
    case = CASES["sd1.5"]
    gradients = []
    for checkpoint in (False, True):
        model = case.build()
        diffattn.set_attn_processor(model, AgentAttn(**ALWAYS))
        model = copy.deepcopy(model)
        if checkpoint:
            model.enable_gradient_checkpointing()
            model.train()
        model(**case.inputs(), return_dict=False)[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, atol=1e-6, rtol=1e-4, msg=name)


def test_agents_leave_after_two_fifths_of_the_steps() -> None:
    case = PIPELINES["sd1.5"]
    pipe = case.build()
    attachment = diffattn.set_attn_processor(pipe, AgentAttn())
    attached = attachment.models["unet"]
    seen: list[tuple[bool, int]] = []
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]

    def look(module: Any, args: Any) -> None:
        merging = attached.groups[0].merging
        assert merging is not None
        seen.append((merging.agent_of is not None, args[0].shape[1]))

    block.attn1.to_k.register_forward_pre_hook(look)
    case.run(pipe, steps=5)
    assert seen == [(True, 116)] * 2 + [(False, 116)] * 3
    sites = attachment.sites
    assert (attachment.sparse_calls, attachment.dense_calls) == (2 * sites, 3 * sites)
    diffattn.set_attn_processor(pipe, None)


def test_what_merging_cannot_represent() -> None:
    case = CASES["sd1.5"]
    model, inputs = case.build(), case.inputs()
    diffattn.set_attn_processor(model, AgentAttn(**ALWAYS))
    with pytest.raises(
        ValueError, match=r"passes an attention mask to down_blocks.*attn1, but merg"
    ):
        forward(model, inputs | {"attention_mask": torch.ones(2, 192)})
    # Nothing is left of the call that failed.
    diffattn.set_attn_processor(model, AgentAttn(stride=(13, 2), **ALWAYS))
    with pytest.raises(
        ValueError, match=r"grid of 12 x 16 tokens is smaller than the stride of 13"
    ):
        forward(model, inputs)
    diffattn.set_attn_processor(model, None)
    assert torch.isfinite(forward(model, inputs)).all()


# --- parameters


def test_numbers_for_each_block_are_those_of_methods_for_each_block() -> None:
    case = CASES["hunyuanvideo"]
    model, inputs = case.build(), case.inputs()
    common: dict[str, Any] = {"cell": (2, 3, 4), **ALWAYS}
    k_scale2, k_shortcut = (0.1, 0.5, 1.0, 0.0), (0.3, 0.0, -0.1, 0.05)
    methods = {
        site: AgentAttn(k_scale2=k_scale2[i], k_shortcut=k_shortcut[i], **common)
        for i, site in enumerate(case.sites)
    }
    diffattn.set_attn_processor(model, methods)
    want = forward(model, inputs)
    method = AgentAttn(k_scale2=k_scale2, k_shortcut=k_shortcut, **common)
    diffattn.set_attn_processor(model, from_dict(json.loads(json.dumps(method.to_dict()))))
    assert not any("agent" in name for name in model.state_dict())
    torch.testing.assert_close(forward(model, inputs), want, **EXACT)
    moved = copy.deepcopy(model).to(torch.bfloat16)
    attached = diffattn.set_attn_processor(case.build().to(torch.bfloat16), method)
    site = next(iter(attached.models["model"].sites.values()))
    assert {x.dtype for x in site.module.agent.buffers()} == {torch.float32}
    half = {n: x.bfloat16() if x.is_floating_point() else x for n, x in inputs.items()}
    torch.testing.assert_close(forward(moved, half).float(), want, atol=0.1, rtol=0.1)


def test_numbers_for_another_count_of_blocks_are_refused() -> None:
    model = CASES["hunyuanvideo"].build()
    with pytest.raises(ValueError, match=r"k_shortcut has 3 numbers, but Huny.* has 4 blocks"):
        diffattn.set_attn_processor(model, AgentAttn(k_shortcut=(0.1, 0.2, 0.3)))
    assert diffattn.attach.attached_to(model) is None


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"k_scale2": "x"}, r"k_scale2 is 'x', but must be a finite number, or one for each block"),
        ({"k_scale2": ()}, r"k_scale2 is \(\), but must be a finite number"),
        ({"k_shortcut": (0.1, float("nan"))}, r"k_shortcut is \(0.1, nan\), but must be a finite"),
        ({"cell": (3, 5)}, r"cell is \(3, 5\), but must be frames, rows and columns"),
        ({"cell": (3, 0, 4)}, r"cell is \(3, 0, 4\), but .* three integers of at least 1"),
        ({"stride": 4}, r"stride is 4, but must be rows and columns of tokens: two integers"),
        ({"late_stride": (2, True)}, r"late_stride is \(2, True\), but must be rows and columns"),
        ({"ratio": 1.5}, r"ratio is 1.5, but must be a share of the tokens, 0 to 1"),
        ({"agent_ratio": None}, r"agent_ratio is None, but must be a share of the tokens"),
        ({"max_downsample": 0}, r"max_downsample is 0, but must be an integer of at least 1"),
        ({"merge_mlp": 1}, r"merge_mlp is 1, but must be true or false"),
        ({"seed": -1}, r"seed is -1, but must be an integer of at least 0"),
        ({"last_dense_steps": 2.0}, r"last_dense_steps is 2.0, but a fraction of the run"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AgentAttn(**parameters)


def test_defaults_have_agents_everywhere() -> None:
    """Those of the public code have none on any even grid."""
    for height, width in ((64, 64), (48, 80), (32, 32), (64, 96), (9, 7)):
        x = noise(1, height * width, 8)
        method = AgentAttn()
        offsets = cell_offsets(height, width, method.stride, (0,))
        parts = sources_and_destinations(height, width, method.stride, offsets)
        merging = match(x, *parts, method.ratio, method.agent_ratio)
        assert 0 < 2 * merging.agents < merging.tokens
        if (height, width) == (64, 64):
            assert (merging.tokens, merging.agents) == (2458, 256)
    for family, grid, count in (
        ("wan", TokenGrid(21, 30, 52), 546),
        ("flux", TokenGrid(1, 64, 64), 256),
    ):
        method = AgentAttn().for_model(family)
        query = noise(1, grid.tokens, 1, 2)
        agents = method.agents(query, Site(family, 0, 1, grid))
        assert agents is not None
        assert agents.count == count


def test_merging_needs_no_table_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(3, 11 * 13, 8)
    parts = sources_and_destinations(11, 13, (2, 3), cell_offsets(11, 13, (2, 3), (5,)))
    whole = match(x, *parts, 0.3, 0.8)
    monkeypatch.setattr("diffattn.methods.agent.merging._SCORES", 7 * len(parts[1]))
    split = match(x, *parts, 0.3, 0.8)
    assert torch.equal(split.owner, whole.owner)
    assert whole.agent_of is not None
    assert split.agent_of is not None
    assert torch.equal(split.agent_of, whole.agent_of)


def test_compiled_blocks_of_a_transformer_are_one_graph() -> None:
    case = CASES["skyreels-v2"]
    model, inputs = case.build(), case.inputs()
    diffattn.set_attn_processor(model, AgentAttn(cell=(2, 3, 4), **ALWAYS))
    want = forward(model, inputs)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(forward(model, inputs), want, **EXACT)
    assert counter.frame_count == 1


def test_compiled_attention_of_a_unet_merges_alike() -> None:
    case = CASES["sd1.5"]
    model, inputs = case.build(), case.inputs()
    diffattn.set_attn_processor(model, AgentAttn(**ALWAYS))
    want = forward(model, inputs)
    torch._dynamo.reset()
    model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(forward(model, inputs), want, **EXACT)


@given(grid=grids, cell=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)))
@settings(max_examples=30, deadline=None)
def test_planned_work_is_what_attention_multiplies(
    grid: TokenGrid, cell: tuple[int, int, int]
) -> None:
    plain, flops = torch.nn.functional.scaled_dot_product_attention, []

    def counted(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        flops.append(4 * query.shape[-2] * key.shape[-2] * query.shape[1] * query.shape[-1])
        return plain(query, key, value, **kwargs)

    q, k, v = (noise(1, grid.tokens, 2, 8, seed=i) for i in range(3))
    method = AgentAttn(cell=cell)
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", counted):
        method.attend(q, k, v, Site("wan", 0, 1, grid))
    planned = diffattn.plan(grid, method, heads=2, head_dim=8)
    assert planned.sparse_flops == sum(flops)


def test_plan_of_wan() -> None:
    """480p: 546 agents for 32,760 tokens, which makes attention 30 times cheaper."""
    plan = diffattn.plan("Wan-AI/Wan2.1-T2V-14B", AgentAttn(), height=480, width=832, num_frames=81)
    assert plan.density is None
    assert plan.attention_speedup == pytest.approx(30, rel=1e-3)
    assert plan.dense_steps == 0.6 * plan.steps


def test_a_bare_model_has_no_steps_to_be_without_agents_in() -> None:
    model = CASES["skyreels-v2"].build()
    with pytest.warns(UserWarning, match=r"every call is sparse. .* or pass last_dense_steps=0 to"):
        diffattn.set_attn_processor(model, AgentAttn())
