"""FreeSwim's two paths against the public code's traces and against hooks on the stock models."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import golden_files
import numpy as np
import pytest
import tiny_wan
import torch
from diffusers import WanTransformer3DModel
from tiny_families import CASES, noise

from diffattn import FreeSwimAttn, TokenGrid
from diffattn.attach.denoiser import attached_to
from diffattn.pipelines.freeswim.dual_path import CrossStore, DualPath, store_bytes

GOLDENS = golden_files.GOLDENS / "freeswim"
METHOD = FreeSwimAttn(radius=1, native=(3, 5))


def golden_model(golden: Any) -> WanTransformer3DModel:
    config = {key[4:]: golden[key] for key in golden.files if key.startswith("cfg.")}
    config = {
        key: tuple(map(int, value)) if value.ndim else value.item() for key, value in config.items()
    }
    model = WanTransformer3DModel(**config, cross_attn_norm=True).eval()
    weights = {k[2:]: torch.tensor(golden[k]) for k in golden.files if k.startswith("w.")}
    model.load_state_dict(weights)
    return model


def projected(model: Any, layer: int, stored: np.ndarray) -> torch.Tensor:
    """What the public code keeps, which is before the output projection, after it."""
    return model.blocks[layer].attn2.to_out[0](torch.tensor(stored).flatten(2))


class TestPublicCode:
    def test_one_forward_in_every_mode(self) -> None:
        golden = np.load(GOLDENS / "model_tiny.npz")
        model = golden_model(golden)
        radius = (int(golden["grid.d_h"]), int(golden["grid.d_w"]))
        path = DualPath(model, FreeSwimAttn(radius=radius))
        latent, pos, neg, timestep = (
            torch.tensor(golden[name]) for name in ("latent", "pos", "neg", "timestep")
        )

        def call(guidance: Any, latent: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), path.guided(guidance):
                rows = 2 if path.has_two else 1
                return model(
                    latent.repeat(rows, 1, 1, 1, 1), timestep.repeat(rows), text, return_dict=False
                )[0]

        def check(out: torch.Tensor, name: str) -> None:
            want = torch.tensor(golden[name])
            # Where the public code computes a second row that equals the first, there is none here.
            torch.testing.assert_close(out, want[: len(out)], atol=1e-5, rtol=0)
            if len(out) == 1:
                torch.testing.assert_close(want[0], want[1], atol=1e-5, rtol=0)

        check(call("override", latent, pos), "out.nocache.cond")
        check(call("override", latent, neg), "out.nocache.uncond")
        check(call("store", latent, pos), "out.cache.guide_cond")
        for layer in range(2):
            want = projected(model, layer, golden[f"stored.{layer}"])
            kept = path.store.fetch(layer, torch.device("cpu"))
            torch.testing.assert_close(kept, want, atol=1e-5, rtol=0)
        reuse_latent = torch.tensor(golden["out.cache.reuse_latent"])
        check(call("reuse", reuse_latent, pos), "out.cache.reuse_cond")
        check(call("own", latent, neg), "out.cache.uncond")

    def test_the_processors_of_a_block(self) -> None:
        golden = np.load(GOLDENS / "processors.npz")
        heads, head_dim = int(golden["heads"]), int(golden["head_dim"])
        model = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=40, num_layers=1, rope_max_seq_len=32,
        ).eval()  # fmt: skip
        for name, kind in (("attn1", "self"), ("attn2", "cross")):
            start = f"w.{kind}."
            weights = {
                key.removeprefix(start): torch.tensor(golden[key])
                for key in golden.files
                if key.startswith(start)
            }
            getattr(model.blocks[0], name).load_state_dict(weights)
        radius = (int(golden["d_h"]), int(golden["d_w"]))
        method = FreeSwimAttn(radius=radius)
        grid = TokenGrid(*(int(golden[name]) for name in "THW"))
        assert method.score_scale(grid, head_dim, None) == pytest.approx(float(golden["scale"]))
        path = DualPath(model, method)
        attached = attached_to(model)
        assert attached is not None
        attached._use(grid)
        x, text = torch.tensor(golden["x"]), torch.tensor(golden["ctx"])
        rope = tuple(torch.tensor(golden[f"rope_{name}"]) for name in ("cos", "sin"))
        block = model.blocks[0]

        def check(out: torch.Tensor, name: str) -> None:
            torch.testing.assert_close(out, torch.tensor(golden[name]), atol=3e-5, rtol=0)

        with torch.no_grad(), path.guided("store"):
            check(block.attn1(x, None, None, rope), "out.self.dual")
            check(block.attn1(x, None, None, rope), "out.self.cache_guide_cond")
            check(block.attn2(x, text, None, None), "out.cross.override")
            check(block.attn2(x, text, None, None), "out.cross.cache_guide_cond")
        with torch.no_grad(), path.guided("own"):
            out = block.attn2(x[:1], text, None, None)
            check(out.repeat(2, 1, 1), "out.cross.cache_uncond")
            out = block.attn1(x[:1], None, None, rope)
            check(out.repeat(2, 1, 1), "out.self.cache_reuse_cond")
            check(out.repeat(2, 1, 1), "out.self.cache_uncond")
        path.store.keep(0, projected(model, 0, golden["out.cross.reuse_in"]))
        with torch.no_grad(), path.guided("reuse"):
            out = block.attn2(x[:1], text, None, None)
        check(out.repeat(2, 1, 1), "out.cross.cache_reuse_cond")


@contextlib.contextmanager
def two_paths_by_hooks(model: Any, grid: TokenGrid, method: FreeSwimAttn) -> Iterator[None]:
    """The stock model with one boolean mask per sample, and its cross-attention overridden."""
    stock = torch.nn.functional.scaled_dot_product_attention
    window = method.mask(grid).dense()

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        if query.shape[-2] == key.shape[-2] == grid.tokens:
            half = query.shape[0] // 2
            attn_mask = torch.stack([window] * half + [torch.ones_like(window)] * half)[:, None]
            kwargs["scale"] = method.score_scale(grid, query.shape[-1], None)
        return stock(query, key, value, attn_mask=attn_mask, **kwargs)

    def override(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        second = out[len(out) // 2 :]
        return torch.cat([second, second])

    cross = [module for name, module in model.named_modules() if name.endswith(".attn2")]
    hooks = [module.register_forward_hook(override) for module in cross]
    try:
        with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def wan(batch: int) -> tuple[Any, TokenGrid, dict[str, Any]]:
    grid = TokenGrid(3, 5, 7)
    return (
        tiny_wan.transformer(),
        grid,
        {
            "hidden_states": noise(batch, 16, 3, 10, 14),
            "timestep": torch.arange(100, 100 + batch),
            "encoder_hidden_states": noise(batch, 4, tiny_wan.TEXT_DIM, seed=1),
        },
    )


def ltx(batch: int) -> tuple[Any, TokenGrid, dict[str, Any]]:
    case = CASES["ltx"]
    inputs = case.inputs()
    (grid,) = case.grids
    out = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value[torch.arange(batch) % len(value)]
            if value.is_floating_point():
                shift = torch.arange(batch).view(-1, *[1] * (value.ndim - 1))
                value = value + 0.1 * shift if name != "encoder_attention_mask" else value
        out[name] = value
    return case.build(), grid, out


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.cat([value, value]) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


class TestModels:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("build", [wan, ltx])
    def test_override_store_and_reuse(self, build: Any, batch: int) -> None:
        model, grid, inputs = build(batch)
        with torch.no_grad():
            plain = model(**inputs, return_dict=False)[0]
            with two_paths_by_hooks(model, grid, METHOD):
                want = model(**doubled(inputs), return_dict=False)[0]
            path = DualPath(model, METHOD)
            with path.guided("override"):
                got = model(**doubled(inputs), return_dict=False)[0]
            assert not path.store
            with path.guided("store"):
                stored = model(**doubled(inputs), return_dict=False)[0]
            # At the step they were kept in, the kept outputs give the first half alone.
            with path.guided("reuse"):
                reused = model(**inputs, return_dict=False)[0]
            own = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(stored, want, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(reused, want[:batch], atol=2e-5, rtol=1e-4)
        assert not torch.allclose(want[:batch], want[batch:], atol=1e-4)
        assert not torch.allclose(own, want[:batch], atol=1e-5)
        assert not torch.allclose(own, plain, atol=1e-4)

    @pytest.mark.parametrize("build", [wan, ltx])
    def test_the_memory_is_known_beforehand(self, build: Any) -> None:
        model, grid, inputs = build(2)
        path = DualPath(model, METHOD, "cpu")
        with torch.no_grad(), path.guided("store"):
            model(**doubled(inputs), return_dict=False)
        assert path.store.nbytes == store_bytes(model, grid.tokens, batch=2) > 0
        path.store.clear()
        assert path.store.nbytes == 0

    def test_nothing_is_computed_that_is_thrown_away(self) -> None:
        model, _, inputs = wan(2)
        path = DualPath(model, METHOD)
        rows: list[int] = []
        projections = [getattr(block.attn2, name) for block in model.blocks for name in ("to_q",)]
        projections += [block.attn2.to_out[0] for block in model.blocks]
        for module in projections:
            module.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
        with torch.no_grad():
            for guidance, want in [("store", [2] * 6), ("reuse", []), ("own", [2] * 6)]:
                rows.clear()
                with path.guided(guidance):
                    call = doubled(inputs) if path.has_two else inputs
                    model(**call, return_dict=False)
                assert rows == want

    def test_removal_puts_the_processors_back(self) -> None:
        model, _, inputs = wan(1)
        before = dict(model.attn_processors)
        with torch.no_grad():
            plain = model(**inputs, return_dict=False)[0]
            path = DualPath(model, METHOD)
            with path.guided("store"):
                model(**doubled(inputs), return_dict=False)
            path.remove()
            assert not path.store
            after = model(**inputs, return_dict=False)[0]
        assert model.attn_processors == before
        assert torch.equal(plain, after)

    @pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
    def test_pinned_memory_keeps_what_it_is_given(self) -> None:
        device = torch.accelerator.current_accelerator()
        assert device is not None
        store, output = CrossStore("pinned"), noise(2, 300, 64).to(device)
        store.keep(3, output)
        assert store.nbytes == output.nbytes
        assert torch.equal(store.fetch(3, device), output)

    def test_a_failed_call_gives_up_what_was_kept(self) -> None:
        model, _, inputs = wan(1)
        path = DualPath(model, METHOD)
        with torch.no_grad(), path.guided("store"):
            model(**doubled(inputs), return_dict=False)
        with pytest.raises(KeyboardInterrupt), path.guided("reuse"):
            raise KeyboardInterrupt
        assert not path.store
        assert path.guidance == "own"


class TestBadInput:
    def test_reuse_of_nothing(self) -> None:
        path = DualPath(tiny_wan.transformer(), METHOD)
        with pytest.raises(RuntimeError, match="nothing to reuse: call with guidance 'store'"):
            path.guided("reuse").__enter__()

    def test_another_family(self) -> None:
        with pytest.raises(
            ValueError, match=r"cannot run FreeSwim's two paths.* wan and ltx; Free"
        ):
            DualPath(CASES["hunyuanvideo"].build(), METHOD)

    def test_places(self) -> None:
        model = tiny_wan.transformer()
        place: Any = "disk"
        with pytest.raises(ValueError, match="store is 'disk', but must be one of device, cpu, pi"):
            DualPath(model, METHOD, place)
        if not torch.accelerator.is_available():
            with pytest.raises(ValueError, match="store is 'pinned', but pinned memory is for"):
                DualPath(model, METHOD, "pinned")
        assert attached_to(model) is None
