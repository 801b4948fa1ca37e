"""LinFusion in transformers: where positions and text stand (Wan, CogVideoX, Hunyuan, Flux)."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny_families
import torch
from linear_oracle import linear_truth, matrices, rotations
from tiny_families import Case

import diffattn
from diffattn import LinFusionAttn, TokenGrid
from diffattn.kernels.reference import reference_attention
from diffattn.methods import Site
from diffattn.methods.linfusion.method import LinFusionWeights, _rotation

EXACT = {"atol": 1e-5, "rtol": 1e-4}
NAMES = ["hunyuanvideo", "hunyuanvideo-i2v", "cogvideox-2b", "cogvideox-5b", "cogvideox-1.5"]

LIKE_FLUX = [
    "flux", "flux-kontext", "longcat-image-edit", "ovis-image", "bria", "bria-fibo", "chroma",
]  # fmt: skip

CASES = {name: tiny_families.CASES[name] for name in [*NAMES, *LIKE_FLUX]} | {
    "wan": Case(
        build=lambda: tiny_families.wan_shaped("WanTransformer3DModel"),
        inputs=tiny_families.CASES["skyreels-v2"].inputs,
        grids=(TokenGrid(3, 4, 6),),
        sites=("blocks.0.attn1", "blocks.1.attn1"),
        pixel=lambda t, h, w: (0, 1, t, 2 * h + 1, 2 * w),
    )
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def forward(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def own_weights(model: torch.nn.Module) -> dict[str, LinFusionWeights]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LinFusionWeights)}


def trained(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for weights in own_weights(model).values():
        for weight in weights.parameters():
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator).to(weight)


@dataclass(frozen=True, kw_only=True)
class Recording(LinFusionAttn):
    """Keeps what it is asked and what it answers."""

    calls: list[tuple[Any, ...]] = field(default_factory=list, compare=False)

    def attend(self, query: Any, key: Any, value: Any, site: Site, **options: Any) -> torch.Tensor:
        out = super().attend(query, key, value, site, **options)
        self.calls.append((query, key, value, site, options, out))
        return out


def truth(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: TokenGrid,
    rotation: torch.Tensor | None, gate: torch.Tensor | None, scale: float | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Text by softmax over everything; video by both over its own kind and over text, joined."""
    video = grid.video
    if gate is None:
        return linear_truth(query, key, value, key_mask=key_mask, rotation=rotation)
    valid = torch.ones(key.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
    out, _ = reference_attention(query, key, value, valid[:, None, None], scale=scale)
    place = torch.arange(grid.tokens)
    is_video = (place >= video.start) & (place < video.stop)
    for_text = (valid & ~is_video)[:, None, None]
    text, lse = reference_attention(query[:, video], key, value, for_text, scale=scale)
    linear = linear_truth(
        query[:, video], key[:, video], value[:, video],
        key_mask=valid[:, video], rotation=rotation,
    )  # fmt: skip
    counted = valid[:, video].sum(1)[:, None, None] * gate.double().exp()[None, :, None]
    share = (lse.exp() / (lse.exp() + counted)).transpose(1, 2)[..., None]
    out = out.clone()
    out[:, video] = share * text + (1 - share) * linear
    return out


def test_every_call_is_what_is_said_of_it(case: Case) -> None:
    """Also that the method finds how the model rotates, and what the layer made before that."""
    model, inputs = case.build(), case.inputs()
    recorder = Recording(chunk=10)
    attachment = diffattn.set_attn_processor(model, recorder)
    trained(model)
    normalised: list[torch.Tensor] = []
    for name in case.sites:
        norm = model.get_submodule(name).norm_q
        norm.register_forward_hook(lambda *call: normalised.append(call[2]))
    forward(model, inputs)
    assert len(recorder.calls) == len(case.sites) == attachment.sparse_calls
    rotated = 0
    for made, weights, (query, key, value, site, options, out) in zip(
        normalised, own_weights(model).values(), recorder.calls, strict=True
    ):
        rotation = _rotation(site, query, recorder._division(site.grid))
        gate = weights.text_gate
        assert (gate is None) == (case.text is None)
        want = truth(query, key, value, site.grid, rotation, gate, options["scale"],
                     options["key_mask"])  # fmt: skip
        torch.testing.assert_close(out.double(), want, **EXACT)
        plain = query[:, site.grid.video]
        if rotation is not None:
            rotated += 1
            plain = torch.einsum("tde,bthd->bthe", matrices(rotation).float(), plain)
        made = made.unflatten(2, query.shape[2:]) if made.ndim == 3 else made
        if made.shape[1] > site.grid.video_tokens:
            # References too, and in single-stream blocks text; other text is before the first.
            start = site.grid.video.start - (query.shape[1] - made.shape[1])
            made = made[:, start : start + site.grid.video_tokens]
        torch.testing.assert_close(plain, made, **EXACT)
    assert rotated == (0 if case is CASES["cogvideox-2b"] else len(case.sites))


def test_projections_are_of_adapted_inputs(case: Case) -> None:
    """Text of its own stream, which other projections are for, is left alone."""
    model, inputs = case.build(), case.inputs()
    diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=3))
    trained(model)
    site: Any = model.get_submodule(case.sites[-1])
    seen: dict[str, torch.Tensor] = {}
    for name in ("to_q", "to_k", "to_v"):
        hook = lambda _, args, name=name: seen.update({name: args[0]})  # noqa: E731
        getattr(site, name).register_forward_pre_hook(hook)
    forward(model, inputs)
    weights, x = site.linfusion, seen["to_v"]
    torch.testing.assert_close(seen["to_q"], x + weights.to_q_(x))
    torch.testing.assert_close(seen["to_k"], x + weights.to_k_(x))
    assert (seen["to_q"] - seen["to_k"]).abs().max() > 0.1


def test_none_leaves_no_trace(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    want, keys = forward(model, inputs), list(model.state_dict())
    diffattn.set_attn_processor(model, LinFusionAttn())
    trained(model)
    assert not torch.allclose(forward(model, inputs), want, atol=1e-3)
    diffattn.set_attn_processor(model, LinFusionAttn(dense_layers=99))
    torch.testing.assert_close(forward(model, inputs), want, **EXACT)
    diffattn.set_attn_processor(model, None)
    assert list(model.state_dict()) == keys
    assert torch.equal(forward(model, inputs), want)


def test_gradients_through_checkpoints(case: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, inputs = case.build(), case.inputs()
        diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=3))
        trained(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        model(**inputs, return_dict=False)[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    own = [name for name in gradients[0] if ".linfusion." in name]
    assert len(own) == len(case.sites) * (12 if case.text is None else 13)
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, atol=1e-6, rtol=1e-3, msg=name)
    assert all(gradients[0][name].any() for name in own)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("text", [1, 5])
def test_text_padding_and_gradients_of_a_call(before: bool, text: int) -> None:
    grid = TokenGrid(2, 3, 5, text if before else 0, 0 if before else text)
    weights = LinFusionWeights(tiny_families.cogvideox().transformer_blocks[0].attn1, 4, True)
    weights.text_gate.data = torch.tensor([-1.0, 2.0])
    angles = rotations(30, 32)
    tables = tuple(table.repeat_interleave(2, 1) for table in angles)
    site = Site("cogvideox", 0, 1, grid, weights=weights, rotary=tables)
    qkv = [torch.randn(3, grid.tokens, 2, 32).requires_grad_() for _ in range(3)]
    leaves = [*qkv, weights.text_gate]
    mask = torch.ones(3, grid.tokens, dtype=torch.bool)
    first = 0 if before else 30
    mask[1, first + 1 : first + text] = False
    mask[2, first : first + text] = False
    for key_mask in (None, mask):
        out = LinFusionAttn().attend(*qkv, site, scale=0.3, key_mask=key_mask)
        want = truth(*qkv, grid, angles, weights.text_gate, 0.3, key_mask)
        torch.testing.assert_close(out.double(), want, **EXACT)
        along = torch.randn_like(out)
        found = torch.autograd.grad(out, leaves, along)
        expected = torch.autograd.grad(want, leaves, along.double())
        for got, grad in zip(found, expected, strict=True):
            torch.testing.assert_close(got, grad, atol=2e-5, rtol=1e-3)


def test_a_part_of_the_positions_is_refused() -> None:
    tables = (torch.ones(6, 8), torch.zeros(6, 8))
    site = Site("wan", 0, 1, TokenGrid(1, 3, 4), rotary=tables)
    x = torch.zeros(1, 12, 2, 8)
    with pytest.raises(NotImplementedError, match=r"is of 6 tokens, but it is over 12, of"):
        LinFusionAttn().attend(x, x, x, site)


def test_a_part_of_the_heads_is_refused() -> None:
    weights = LinFusionWeights(tiny_families.cogvideox().transformer_blocks[0].attn1, 4, True)
    site = Site("cogvideox", 0, 1, TokenGrid(1, 3, 4, 2), weights=weights)
    x = torch.zeros(1, 14, 1, 8)
    with pytest.raises(NotImplementedError, match="this call has 1 of 2 heads: linfusion cannot"):
        LinFusionAttn().attend(x, x, x, site)


def test_the_public_arithmetic_is_for_unets() -> None:
    model = CASES["wan"].build()
    with pytest.raises(ValueError, match=r"reference_arithmetic is True, but .* WanTransformer3DM"):
        diffattn.set_attn_processor(model, LinFusionAttn(reference_arithmetic=True))


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_copied_and_compiled(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=3))
    trained(model)
    want = forward(model, inputs)
    copied = copy.deepcopy(model)
    diffattn.set_attn_processor(model, None)
    assert torch.equal(forward(copied, inputs), want)
    torch._dynamo.reset()
    blocks = copied.blocks if name == "wan" else copied.single_transformer_blocks
    for block in blocks:
        # Where there is text, compiled code breaks for its layouts.
        block.compile(backend="eager", fullgraph=name == "wan")
    torch.testing.assert_close(forward(copied, inputs), want, **EXACT)
