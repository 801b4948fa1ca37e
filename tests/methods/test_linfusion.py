"""LinFusion: the public code's numbers, what attaching it does to a model, and what is refused."""

import copy
from typing import Any

import golden_files
import numpy as np
import pytest
import tiny_families
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import Attention
from peft import LoraConfig

import diffattn
from diffattn import DenseAttn, LinFusionAttn
from diffattn.kernels.linear import linear_attention
from diffattn.methods import from_dict
from diffattn.methods.linfusion.method import LinFusionWeights

GOLDENS = golden_files.GOLDENS / "linfusion"

UNETS = ["sd1.5", "sdxl"]


def forward(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def own_weights(model: torch.nn.Module) -> dict[str, LinFusionWeights]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LinFusionWeights)}


def trained(model: torch.nn.Module) -> None:
    """Give the method's weights values that matter, other ones at each site."""
    generator = torch.Generator().manual_seed(4)
    for weights in own_weights(model).values():
        for weight in weights.parameters():
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator).to(weight)


def golden(name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key[:3] != "mod"}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in arrays.items()}


class Layer:
    """One attention module with the weights of a golden, and the method in it."""

    def __init__(self, weights: dict[str, torch.Tensor], heads: int, **parameters: Any) -> None:
        width = len(weights["w.to_q.weight"])
        self.method = LinFusionAttn(**parameters)
        self.attn = Attention(width, heads=heads, dim_head=width // heads)
        own = {k[2:]: w for k, w in weights.items() if k[:2] == "w." and "_." not in k}
        self.attn.load_state_dict(own)
        self.maps = self.method.site_weights(self.attn, False)
        self.maps.load_state_dict({k[2:]: w for k, w in weights.items() if "_." in k})
        self.attn.to(weights["x"].dtype)
        self.maps.to(weights["x"].dtype)

    def heads(self, x: torch.Tensor, context: torch.Tensor) -> list[torch.Tensor]:
        q = self.attn.to_q(self.maps.map_q(x))
        k = self.attn.to_k(self.maps.map_k(context))
        return [y.unflatten(2, (self.attn.heads, -1)) for y in (q, k, self.attn.to_v(context))]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        site = diffattn.methods.Site("unet", 0, 1, diffattn.TokenGrid(1, 1, x.shape[1]))
        return self.attn.to_out[0](self.method.attend(*self.heads(x, x), site).flatten(2))


class TestGoldens:
    @pytest.mark.parametrize(("name", "mid_dim"), [("mid_full", None), ("mid_identity", -1)])
    @torch.no_grad()
    def test_module(self, name: str, mid_dim: int | None) -> None:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
            want = golden(f"1_module_{name}", dtype)
            key = "out" if dtype == torch.float32 else "out_float64"
            for reference in (False, True):
                layer = Layer(want, 4, mid_dim=mid_dim, reference_arithmetic=reference)
                out = layer(want["x"])
                torch.testing.assert_close(out, want[key], atol=tolerance, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @torch.no_grad()
    def test_module_in_16_bits(self, dtype: torch.dtype) -> None:
        """The public code's own results there, and those nearer to the truth by default."""
        truth = golden("1_module_mid_full", torch.float64)["out_float64"]
        want = golden("1_module_mid_full", dtype)
        theirs = want[f"out_{str(dtype).removeprefix('torch.')}"]
        scale = truth.abs().max()
        out = Layer(want, 4, reference_arithmetic=True)(want["x"])
        assert (out - theirs).abs().max() < 4 * torch.finfo(dtype).eps * scale
        ours = Layer(want, 4)(want["x"])
        assert (ours - truth).norm() <= 1.05 * (theirs - truth).norm()

    @torch.no_grad()
    def test_other_lengths_but_for_the_public_scale(self) -> None:
        """The public code divides by the number of queries where it is that of keys."""
        want = golden("2_cross_length")
        layer = Layer(want, 4)
        x, context = want["x"], want["enc"]
        torch.testing.assert_close(layer(x), want["out_self"], atol=1e-5, rtol=0)
        out = linear_attention(*layer.heads(x, context)).flatten(2)
        out = layer.attn.to_out[0](out * context.shape[1] / x.shape[1])
        torch.testing.assert_close(out, want["out_cross"], atol=2e-5, rtol=0)

    def test_unet(self) -> None:
        model, inputs, want = golden_unet()
        close = {"atol": 2e-6, "rtol": 0}
        torch.testing.assert_close(forward(model, inputs), want["out_softmax"], **close)
        diffattn.set_attn_processor(model, LinFusionAttn())
        out = forward(model, inputs)
        torch.testing.assert_close(out, want["out_linfusion_zero_last_linear"], **close)
        with np.load(GOLDENS / "3_unet_tiny_io.npz") as file:
            names = file["module_names"].tolist()
        assert sorted(f"{name}.linfusion" for name in names) == sorted(own_weights(model))
        for i, name in enumerate(names):
            state = {k.split(".", 2)[2]: w for k, w in want.items() if k.startswith(f"lf.{i}.")}
            state = {k: w for k, w in state.items() if "_." in k}
            own_weights(model)[f"{name}.linfusion"].load_state_dict(state)
        torch.testing.assert_close(forward(model, inputs), want["out_linfusion"], **close)
        diffattn.set_attn_processor(model, None)
        torch.testing.assert_close(forward(model, inputs), want["out_softmax"], **close)


def golden_unet() -> tuple[torch.nn.Module, dict[str, Any], dict[str, torch.Tensor]]:
    model = tiny_families.unet(
        sample_size=8,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    model.load_state_dict({k[2:]: w for k, w in golden("3_unet_tiny_weights").items()})
    want = golden("3_unet_tiny_io")
    inputs = {name: want[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    return model, inputs, want


class StockLinear:
    """What a U-Net's attn1 becomes, said in a few lines: the test's own processor."""

    def __init__(self, weights: LinFusionWeights) -> None:
        self.weights = weights

    def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        x = hidden_states
        query = attn.to_q(x + self.weights.to_q_(x)).unflatten(2, (attn.heads, -1))
        key = attn.to_k(x + self.weights.to_k_(x)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(x).unflatten(2, (attn.heads, -1))
        query, key = (torch.nn.functional.elu(y) + 1 for y in (query, key))
        pairs = torch.einsum("bqhd,bkhd->bhqk", query, key) / x.shape[1]
        pairs = pairs / (pairs.sum(-1, keepdim=True) + 1e-4)
        out = torch.einsum("bhqk,bkhd->bqhd", pairs, value).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("mid_dim", [None, 3, 0.25, -1])
def test_unets_do_what_a_processor_of_their_own_would(name: str, mid_dim: int | None) -> None:
    case = tiny_families.CASES[name]
    model, inputs = case.build(), case.inputs()
    dense = forward(model, inputs)
    attachment = diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=mid_dim, chunk=5))
    trained(model)
    out = forward(model, inputs)
    assert attachment.sparse_calls == len(case.sites)
    assert len(own_weights(model)) == len(case.sites)
    assert not torch.allclose(out, dense, atol=1e-3)
    weights = own_weights(model)
    diffattn.set_attn_processor(model, None)
    assert torch.equal(forward(model, inputs), dense)
    for site in case.sites:
        module: Any = model.get_submodule(site)
        module.set_processor(StockLinear(weights[f"{site}.linfusion"]))
    torch.testing.assert_close(out, forward(model, inputs), atol=2e-5, rtol=1e-4)


def test_a_fraction_is_of_each_layers_width() -> None:
    model = tiny_families.CASES["sd1.5"].build()
    diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=1 / 4))
    widths = {
        (w.to_k_[3].out_features, w.to_k_[0].out_features) for w in own_weights(model).values()
    }
    assert widths == {(8, 2), (16, 4)}


def test_motion_modules_keep_their_attention() -> None:
    case = tiny_families.CASES["animatediff"]
    model = case.build()
    diffattn.set_attn_processor(model, LinFusionAttn())
    names = [name.removesuffix(".linfusion") for name in own_weights(model)]
    assert sorted(names) == sorted(case.sites)
    assert not any("motion_modules" in name for name in names)


def test_untrained_it_is_linear_attention_over_the_models_projections() -> None:
    case = tiny_families.CASES["sd1.5"]
    model, inputs = case.build(), case.inputs()
    state = torch.random.get_rng_state()
    diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=4))
    assert torch.equal(torch.random.get_rng_state(), state), "other random numbers would follow"
    for weights in own_weights(model).values():
        x = torch.randn(2, 3, weights.to_q_[0].in_features)
        assert torch.equal(weights.map_q(x), x)
        assert torch.equal(weights.map_k(x), x)
        assert weights.text_gate is None
        assert weights.to_q_[0].out_features == 4
        assert all(weight.requires_grad for weight in weights.parameters())
    first = forward(model, inputs)
    trained(model)
    assert not torch.allclose(forward(model, inputs), first, atol=1e-3)


def test_none_leaves_no_trace() -> None:
    case = tiny_families.CASES["sdxl"]
    model, inputs = case.build(), case.inputs()
    want, keys = forward(model, inputs), list(model.state_dict())
    processors = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    diffattn.set_attn_processor(model, LinFusionAttn())
    forward(model, inputs)
    diffattn.set_attn_processor(model, None)
    assert list(model.state_dict()) == keys
    assert all(model.get_submodule(n).processor is p for n, p in processors.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(forward(model, inputs), want)


def test_dense_layers_and_steps_use_the_projections_as_they_are() -> None:
    case = tiny_families.CASES["sd1.5"]
    model, inputs = case.build(), case.inputs()
    want = forward(model, inputs)
    attachment = diffattn.set_attn_processor(model, LinFusionAttn(dense_layers=99))
    trained(model)
    torch.testing.assert_close(forward(model, inputs), want, atol=1e-6, rtol=0)
    assert (attachment.sparse_calls, attachment.dense_calls) == (0, len(case.sites))
    with pytest.warns(UserWarning, match="linfusion keeps 2 .* without a pipeline"):
        diffattn.set_attn_processor(model, LinFusionAttn(dense_steps=2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_each_sites_own(checkpointing: bool) -> None:
    case = tiny_families.CASES["sd1.5"]
    model, inputs = case.build().double(), case.inputs()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=4, chunk=50))
    trained(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    model(**inputs).sample.square().mean().backward()
    own = [p for w in own_weights(model).values() for p in w.parameters()]
    assert len(own) == 12 * len(case.sites)
    direction, step = [p.grad / p.grad.norm() for p in own], 1e-5
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            for weight, along in zip(own, direction, strict=True):
                weight += sign * step * along
            losses.append(model(**inputs).sample.square().mean().item())
            for weight, along in zip(own, direction, strict=True):
                weight -= sign * step * along
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(sum(p.grad.norm().item() for p in own), rel=1e-4)


class TestTogether:
    """With what else is done to a model."""

    def test_lora_before_and_after(self) -> None:
        case = tiny_families.CASES["sd1.5"]
        inputs, outputs = case.inputs(), []
        for first in (True, False):
            model = case.build()
            for lora in (first, not first):
                if lora:
                    torch.manual_seed(5)
                    model.add_adapter(
                        LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
                    )
                else:
                    diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=4))
                    trained(model)
            outputs.append(forward(model, inputs))
            model.disable_adapters()
            outputs.append(forward(model, inputs))
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[3])
        assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)

    def test_offloading_hooks(self) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module

        def group_offload(model: torch.nn.Module) -> None:
            apply_group_offloading(
                model,
                onload_device=torch.device("cpu"),
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
            )

        def accelerate(model: torch.nn.Module) -> None:
            for module in list(model.modules()):
                add_hook_to_module(module, ModelHook())

        def casting(model: Any) -> None:
            model.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
            )

        case = tiny_families.CASES["sd1.5"]
        plain, inputs = case.build(), case.inputs()
        diffattn.set_attn_processor(plain, LinFusionAttn())
        want = forward(plain, inputs)
        for change in (group_offload, accelerate, casting):
            outputs = []
            for attach_first in (True, False):
                model = case.build()
                for attach in (attach_first, not attach_first):
                    if attach:
                        diffattn.set_attn_processor(model, LinFusionAttn())
                    else:
                        change(model)
                outputs.append(forward(model, inputs))
            assert torch.equal(*outputs), change.__name__
            if change is not casting:
                assert torch.equal(outputs[0], want), change.__name__

    def test_a_copy_is_apart_from_the_original(self) -> None:
        case = tiny_families.CASES["sd1.5"]
        model, inputs = case.build(), case.inputs()
        attachment = diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=4))
        trained(model)
        want = forward(model, inputs)
        copied = copy.deepcopy(model)
        assert torch.equal(forward(copied, inputs), want)
        assert attachment.sparse_calls == len(case.sites), "the copy counts its own calls"
        for weights in own_weights(copied).values():
            weights.to_q_[3].weight.data.zero_()
        diffattn.set_attn_processor(model, None)
        assert not torch.allclose(forward(copied, inputs), want, atol=1e-4)
        diffattn.set_attn_processor(copied, None)
        assert torch.equal(forward(copied, inputs), forward(model, inputs))

    def test_compiled_in_one_graph(self) -> None:
        case = tiny_families.CASES["sd1.5"]
        model, inputs = case.build(), case.inputs()
        diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=4))
        trained(model)
        want = forward(model, inputs)
        torch._dynamo.reset()
        for block in model.modules():
            if type(block).__name__ == "BasicTransformerBlock":
                block.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(forward(model, inputs), want, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision(self, dtype: torch.dtype) -> None:
        case = tiny_families.CASES["sd1.5"]
        model, inputs = case.build(), case.inputs()
        diffattn.set_attn_processor(model, LinFusionAttn())
        want = forward(model, inputs)
        model.to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        out = forward(model, inputs)
        assert out.dtype == dtype
        assert (out - want).norm() < 0.05 * want.norm()
        later = case.build().to(dtype)
        diffattn.set_attn_processor(later, LinFusionAttn())
        assert {w.dtype for o in own_weights(later).values() for w in o.parameters()} == {dtype}
        assert torch.equal(forward(later, inputs), out)

    def test_processors_made_anew_are_reported_and_attached_again(self) -> None:
        """As load_ip_adapter makes them for self-attention: of the class that was there."""
        case = tiny_families.CASES["sd1.5"]
        model, inputs = case.build(), case.inputs()
        dense = forward(model, inputs)
        diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=4))
        trained(model)
        want = forward(model, inputs)
        for site in case.sites:
            module: Any = model.get_submodule(site)
            module.set_processor(type(module.processor)())
        with pytest.warns(UserWarning, match=r"7 of 7 .* are no longer attached: it was given a"):
            torch.testing.assert_close(forward(model, inputs), dense, atol=1e-6, rtol=0)
        diffattn.set_attn_processor(model, LinFusionAttn(mid_dim=4))
        trained(model)
        torch.testing.assert_close(forward(model, inputs), want, atol=1e-6, rtol=0)

    def test_other_methods_in_other_layers(self) -> None:
        case = tiny_families.CASES["sd1.5"]
        model, inputs = case.build(), case.inputs()
        diffattn.set_attn_processor(model, {"down_blocks.*": LinFusionAttn(), "*": DenseAttn()})
        assert all(name.startswith("down_blocks.") for name in own_weights(model))
        assert forward(model, inputs).isfinite().all()


class TestRefusals:
    def test_other_lengths_of_keys(self) -> None:
        """As attn1 has them where it attends to a reference image, or is cross-attention."""
        case = tiny_families.CASES["sd1.5"]
        model = case.build()
        diffattn.set_attn_processor(model, LinFusionAttn())
        attn = model.get_submodule(case.sites[0])
        x = torch.randn(1, 6, attn.to_q.in_features)
        with pytest.raises(ValueError, match=r"6 queries and 12 keys, .* for self-attention alone"):
            attn(x, encoder_hidden_states=torch.cat([x, x], 1))

    def test_masks_over_pairs(self) -> None:
        case = tiny_families.CASES["sd1.5"]
        model, inputs = case.build(), case.inputs()
        diffattn.set_attn_processor(model, LinFusionAttn())
        with pytest.raises(ValueError, match=r"attention mask of torch.float32 .* only padding"):
            forward(model, inputs | {"attention_mask": torch.ones(2, 192)})

    def test_masks_in_reference_arithmetic(self) -> None:
        method = LinFusionAttn(reference_arithmetic=True)
        x = torch.zeros(1, 4, 1, 8)
        site = diffattn.methods.Site("unet", 0, 1, diffattn.TokenGrid(1, 2, 2))
        with pytest.raises(ValueError, match="a mask over keys, which the public code ignores"):
            method.attend(x, x, x, site, key_mask=torch.ones(1, 4, dtype=torch.bool))

    def test_fused_projections(self) -> None:
        model = tiny_families.CASES["flux"].build()
        diffattn.set_attn_processor(model, LinFusionAttn())
        model.transformer_blocks[0].attn.fuse_projections()
        with pytest.raises(RuntimeError, match=r"made one projection of the three: call unfuse"):
            forward(model, tiny_families.CASES["flux"].inputs())

    @pytest.mark.parametrize("name", ["ltx", "mochi", "sd3", "flux.2", "qwen-image"])
    def test_families_without_it(self, name: str) -> None:
        case = tiny_families.CASES[name]
        model = case.build()
        with pytest.raises(ValueError, match=rf"attached to {type(model).__name__}: .* unet, wan"):
            diffattn.set_attn_processor(model, LinFusionAttn())
        assert not own_weights(model)
        assert diffattn.attach.attached_to(model) is None

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"mid_dim": 0}, "mid_dim is 0, but must be an integer from 1 to 65536, a fraction of"),
            ({"mid_dim": -2}, "mid_dim is -2, but must be .*, -1 for no network, or None"),
            ({"mid_dim": 1.0}, "mid_dim is 1.0, but must be .* between 0 and 1"),
            ({"mid_dim": True}, "mid_dim is True, but must be an integer"),
            ({"mid_dim": "full"}, "mid_dim is 'full', but must be an integer"),
            ({"eps": 0}, "eps is 0, but must be a number above 0"),
            ({"eps": "x"}, "eps is 'x', but must be a number above 0"),
            ({"eps": float("inf")}, "eps is inf, but must be a number above 0"),
            ({"chunk": 0}, "chunk is 0, but must be an integer of at least 1"),
            ({"reference_arithmetic": 1}, "reference_arithmetic is 1, but must be true or false"),
        ],
    )
    def test_bad_parameters(self, parameters: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            LinFusionAttn(**parameters)


def test_parameters_are_written_and_read_back() -> None:
    method = LinFusionAttn(mid_dim=40, eps=1e-3, chunk=7, reference_arithmetic=True)
    assert from_dict(method.to_dict()) == method == eval(repr(method)) == copy.deepcopy(method)
