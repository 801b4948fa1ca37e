"""Attached together with what else diffusers offers: LoRA, caches, casting, offloading, threads."""

import copy
import functools
import gc
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import stock
import tiny_families
import tiny_wan
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, WanPipeline
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig

import diffattn
from diffattn import AgentAttn, GNAAttn, LinFusionAttn, RadialAttn, VMoBAAttn
from diffattn.attach.denoiser import attached_to

SPARSE = RadialAttn(
    decay_factor=0.0, split_threshold=8, block_size=4, dense_layers=0, dense_steps=0
)


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(2, 16, 5, 12, 10, generator=generator),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": torch.randn(2, 5, tiny_wan.TEXT_DIM, generator=generator),
        "return_dict": False,
    }


def forward(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs())[0]


def add_lora(model: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), "trained"
    )


def test_lora_before_and_after_attaching() -> None:
    before = tiny_wan.transformer()
    add_lora(before)
    diffattn.set_attn_processor(before, SPARSE)
    plain = tiny_wan.transformer()
    diffattn.set_attn_processor(plain, SPARSE)
    without = forward(plain)
    add_lora(plain)
    assert torch.equal(forward(before), forward(plain))
    assert not torch.allclose(forward(plain), without)
    plain.disable_adapters()
    assert torch.equal(forward(plain), without)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_wan.transformer().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        attachment = diffattn.set_attn_processor(model, SPARSE)
        model(**inputs())[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert attachment.sparse_calls == 3 * (1 + checkpointing), "blocks run twice"
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_layerwise_casting() -> None:
    outputs = []
    for attach_first in (False, True):
        model = tiny_wan.transformer()
        if attach_first:
            diffattn.set_attn_processor(model, SPARSE)
        model.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
        if not attach_first:
            diffattn.set_attn_processor(model, SPARSE)
        outputs.append(forward(model))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype: torch.dtype) -> None:
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, SPARSE)
    want = forward(model)
    model.to(dtype)
    with torch.no_grad():
        cast = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in inputs().items()}
        out = model(**cast)[0]
    assert out.dtype == dtype
    assert (out - want).norm() < 0.05 * want.norm()


def run_and_count(pipe: Any, steps: int = 8) -> tuple[torch.Tensor, int]:
    attachment = pipe.set_attn_processor(SPARSE)
    out = tiny_wan.run(pipe, steps=steps)
    return out, attachment.sparse_calls


def mag_cache(pipe: Any) -> Any:
    if not hasattr(diffusers, "MagCacheConfig"):
        pytest.skip(f"diffusers {diffusers.__version__} has no MagCache")
    return diffusers.MagCacheConfig(
        num_inference_steps=8, mag_ratios=torch.ones(16), retention_ratio=0.2
    )


@pytest.mark.parametrize(
    "config",
    [
        lambda pipe: FirstBlockCacheConfig(threshold=10.0),
        mag_cache,
        lambda pipe: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: pipe.current_timestep,
            spatial_attention_block_identifiers=("blocks",),
        ),
    ],
    ids=["first block", "mag", "pyramid"],
)
def test_step_caches_skip_calls_and_nothing_else(config: Any) -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    _, every_call = run_and_count(pipe)
    pipe = tiny_wan.PIPELINES["t2v"]()
    pipe.transformer.enable_cache(config(pipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, calls = run_and_count(pipe)
    assert 0 < calls < every_call


def test_group_offloading() -> None:
    if diffusers.__version__ < "0.37" and torch.accelerator.current_accelerator() is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no group offloading on a CPU alone")
    want = tiny_wan.transformer()
    diffattn.set_attn_processor(want, SPARSE)
    for attach_first in (False, True):
        model = tiny_wan.transformer()
        if attach_first:
            diffattn.set_attn_processor(model, SPARSE)
        apply_group_offloading(
            model,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
        )
        if not attach_first:
            diffattn.set_attn_processor(model, SPARSE)
        assert torch.equal(forward(model), forward(want))


def test_accelerate_hooks_that_replace_forward() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    want = tiny_wan.transformer()
    diffattn.set_attn_processor(want, SPARSE)
    for attach_first in (False, True):
        model = tiny_wan.transformer()
        if attach_first:
            diffattn.set_attn_processor(model, SPARSE)
        # What model and sequential offloading put on the model and on each of its modules.
        for module in list(model.modules()):
            add_hook_to_module(module, ModelHook())
        if not attach_first:
            diffattn.set_attn_processor(model, SPARSE)
        assert torch.equal(forward(model), forward(want))


def test_two_pipelines_in_wall_clock() -> None:
    jobs = [("t2v", (96, 64, 9)), ("ti2v-5b", (64, 64, 5)), ("t2v", (64, 64, 13))]

    def render(job: tuple[str, tuple[int, int, int]]) -> torch.Tensor:
        pipe = tiny_wan.PIPELINES[job[0]]()
        pipe.set_attn_processor(SPARSE)
        return tiny_wan.run(pipe, *job[1])

    # Built beforehand: seeding is process-wide.
    alone = [render(job) for job in jobs]
    pipes = [tiny_wan.PIPELINES[name]() for name, _ in jobs]
    for pipe in pipes:
        pipe.set_attn_processor(SPARSE)
    with ThreadPoolExecutor(3) as pool:
        together = list(
            pool.map(lambda pair: tiny_wan.run(pair[0], *pair[1][1]), zip(pipes, jobs, strict=True))
        )
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)


def at_once(calls: list[Any], threads: int = 4, rounds: int = 6) -> list[torch.Tensor]:
    """The results of all calls, made by several threads that are in each other's way.

    Returns:
        Results of call 0, of call 1 and so on, `rounds` times.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda call: call(), calls * rounds))
    finally:
        sys.setswitchinterval(interval)


def of_size(model: Any, *latents: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(2, 16, *latents, generator=generator)
    with torch.no_grad():
        return model(**inputs() | {"hidden_states": hidden})[0]


LATENTS = [(5, 12, 10), (3, 10, 12), (5, 10, 12), (7, 8, 14)]


@pytest.mark.parametrize("how", ["eager", "whole", "repeated blocks"])
@pytest.mark.parametrize(
    "method",
    [
        SPARSE,
        stock.IN_TILES,
        VMoBAAttn(topk=1, dense_layers=0, dense_steps=0),
        GNAAttn(dense_layers=1, dense_steps=0),
    ],
    ids=["mask", "permuted once", "content", "by size"],
)
def test_threads_that_share_a_model(method: Any, how: str) -> None:
    """What the calls give one after another, whatever sizes the other threads are at."""
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, method)
    want = [of_size(model, *latents) for latents in LATENTS]
    if how != "eager":
        torch._dynamo.reset()
        # torch 2.13 counts compiled frames for `fullgraph` in one number for all threads.
        options = {"dynamic": True, "backend": "eager"}
        compile_it = model.compile if how == "whole" else model.compile_repeated_blocks
        compile_it(**options)
        want = [of_size(model, *latents) for latents in LATENTS]
    calls = [functools.partial(of_size, model, *latents) for latents in LATENTS]
    for number, got in enumerate(at_once(calls)):
        assert torch.equal(got, want[number % len(want)])


def test_a_compilation_in_another_thread_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says of the whole process that code is compiled, while one thread compiles."""
    model = tiny_wan.transformer()
    attachment = diffattn.set_attn_processor(model, stock.IN_TILES)
    want = [of_size(model, *latents) for latents in LATENTS[:2]]
    counted = attachment.sparse_calls
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True, raising=False)
    between = model.blocks[0].register_forward_pre_hook(call_of_another_thread(model, LATENTS[1]))
    assert torch.equal(of_size(model, *LATENTS[0]), want[0])
    between.remove()
    assert attachment.sparse_calls == 2 * counted


def call_of_another_thread(model: Any, latents: tuple[int, ...]) -> Any:
    """A hook that waits for a call of `model` at another size, in a thread of its own."""

    def wait(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                pool.submit(of_size, model, *latents).result()

    return wait


def test_threads_that_share_a_model_with_weights_of_its_sites() -> None:
    model = tiny_wan.transformer()
    attachment = diffattn.set_attn_processor(model, LinFusionAttn())
    want = [of_size(model, *latents) for latents in LATENTS]
    counted = attachment.sparse_calls
    calls = [functools.partial(of_size, model, *latents) for latents in LATENTS]
    for number, got in enumerate(at_once(calls)):
        assert torch.equal(got, want[number % len(want)])
    assert attachment.sparse_calls == counted * 7, "no call is lost from the count"


def test_threads_that_share_a_unet() -> None:
    case = tiny_families.CASES["sd1.5"]
    model = case.build()
    diffattn.set_attn_processor(model, stock.NEARBY)

    def call(height: int, width: int) -> torch.Tensor:
        with torch.no_grad():
            given = case.inputs() | {"sample": tiny_families.noise(2, 4, height, width)}
            return model(**given).sample

    calls = [functools.partial(call, *size) for size in [(12, 16), (16, 12), (8, 20)]]
    want = [each() for each in calls]
    for number, got in enumerate(at_once(calls)):
        assert torch.equal(got, want[number % len(want)])


def test_threads_that_would_mix_up_merged_tokens_are_refused() -> None:
    case = tiny_families.CASES["sd1.5"]
    model = case.build()
    diffattn.set_attn_processor(model, AgentAttn(dense_layers=0, dense_steps=0))
    with torch.no_grad():
        want = model(**case.inputs()).sample
        inside, failed = threading.Event(), threading.Event()

        def wait(*_: Any) -> None:
            inside.set()
            assert failed.wait(60)

        hook = model.mid_block.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(torch.no_grad()(lambda: model(**case.inputs()).sample))
            assert inside.wait(60)
            message = (
                "another thread is in a call of this UNet2D.*, but token merging keeps tensors"
            )
            try:
                with pytest.raises(RuntimeError, match=message):
                    model(**case.inputs())
            finally:
                failed.set()
            assert torch.equal(other.result(), want)
        hook.remove()
        assert torch.equal(model(**case.inputs()).sample, want)


def shared(pipe: Any, scheduler: Any) -> Any:
    """Another pipeline on the same denoisers, with a scheduler of its own."""
    settings = {k: v for k, v in pipe.config.items() if k in ("boundary_ratio", "expand_timesteps")}
    return type(pipe)(**pipe.components | {"scheduler": scheduler} | settings)


SCHEDULED = RadialAttn(
    dense_layers=0, dense_steps=2, last_dense_steps=1, block_size=4, split_threshold=8
)


@pytest.mark.parametrize("attached_alive", [True, False])
@pytest.mark.parametrize("kind", ["t2v", "two experts", "ti2v-5b"])
def test_pipelines_with_a_scheduler_of_their_own_follow_their_own_schedule(
    kind: str, attached_alive: bool
) -> None:
    pipe = tiny_wan.PIPELINES[kind]()
    attachment = pipe.set_attn_processor(SCHEDULED)
    want = tiny_wan.run(pipe, steps=4)
    counted = attachment.sparse_calls, attachment.dense_calls
    assert counted == (1 * 2 * 3, 3 * 2 * 3)
    stock_scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    others = [shared(pipe, stock_scheduler), shared(pipe, copy.deepcopy(pipe.scheduler))]
    others.append(WanPipeline.from_pipe(pipe))
    others[-1].scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if not attached_alive:
        del pipe
        gc.collect()
    for times, other in enumerate([*others, *others], 2):
        assert torch.equal(tiny_wan.run(other, steps=4), want)
        assert attachment.sparse_calls == times * counted[0]
        assert attachment.dense_calls == times * counted[1]
    attachment.remove()
    for other in others:
        assert not {"step", "set_timesteps"} & set(vars(other.scheduler))


def test_a_scheduler_that_two_attachments_follow() -> None:
    one = tiny_wan.PIPELINES["t2v"]()
    two = shared(one, one.scheduler)
    two.transformer = tiny_wan.transformer()
    first = one.set_attn_processor(SCHEDULED)
    want = tiny_wan.run(one, steps=4)
    second = two.set_attn_processor(SCHEDULED)
    assert torch.equal(tiny_wan.run(two, steps=4), want)
    assert torch.equal(tiny_wan.run(one, steps=4), want)
    assert (first.sparse_calls, first.dense_calls) == (12, 36)
    assert (second.sparse_calls, second.dense_calls) == (6, 18)
    two.set_attn_processor(None)
    assert torch.equal(tiny_wan.run(one, steps=4), want)
    one.set_attn_processor(None)
    assert not {"step", "set_timesteps"} & set(vars(one.scheduler))


@pytest.mark.parametrize("copied", [True, False])
def test_threads_whose_pipelines_share_a_model_are_each_at_their_own_step(copied: bool) -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    pipe.set_attn_processor(SCHEDULED)
    jobs = [((96, 64, 9), 4), ((64, 64, 5), 6), ((64, 96, 9), 5)]
    want = [tiny_wan.run(pipe, *size, steps=steps) for size, steps in jobs]

    def render(size: tuple[int, int, int], steps: int) -> torch.Tensor:
        new = type(pipe.scheduler).from_config(pipe.scheduler.config)
        return tiny_wan.run(
            shared(pipe, copy.deepcopy(pipe.scheduler) if copied else new), *size, steps=steps
        )

    calls = [functools.partial(render, *job) for job in jobs]
    for number, got in enumerate(at_once(calls, threads=3, rounds=3)):
        assert torch.equal(got, want[number % len(want)])


def test_compiled_code_that_two_threads_need_in_different_steps_is_refused() -> None:
    torch._dynamo.reset()
    pipe = tiny_wan.PIPELINES["t2v"]()
    pipe.set_attn_processor(SCHEDULED)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    want = tiny_wan.run(pipe, steps=4)
    other = shared(pipe, copy.deepcopy(pipe.scheduler))
    inside, failed = threading.Event(), threading.Event()
    calls = []

    def wait(*_: Any) -> None:
        calls.append(None)
        if len(calls) == 2 * 2 + 1:  # the first call of the third step, which is sparse
            inside.set()
            assert failed.wait(60)

    hook = pipe.transformer.condition_embedder.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(tiny_wan.run, pipe, steps=4)
        assert inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match="compiled code is in one kind of step"):
                tiny_wan.run(other, steps=4)
        finally:
            failed.set()
        assert torch.equal(running.result(), want)
    hook.remove()
    assert torch.equal(tiny_wan.run(other, steps=4), want)


def test_a_loop_with_a_scheduler_that_nobody_knows_is_told_so() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = pipe.set_attn_processor(SCHEDULED)
    tiny_wan.run(pipe, steps=4)
    counted = attachment.sparse_calls
    with pytest.warns(UserWarning, match="called after the last step of a denoising run, by no"):
        forward(pipe.transformer)
    assert attachment.sparse_calls == counted + 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(pipe.transformer)
    pipe.scheduler.set_timesteps(4)  # a loop of the user's with the pipeline's own scheduler
    forward(pipe.transformer)
    assert attachment.sparse_calls == counted + 6


def test_a_denoiser_put_in_later_is_reported() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = pipe.set_attn_processor(SPARSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")  # still the same
        pipe.scheduler.set_timesteps(2)
    pipe.transformer = tiny_wan.transformer()
    message = "the pipeline's transformer was exchanged after set_attn_processor: the new WanTrans"
    with pytest.warns(UserWarning, match=message):
        tiny_wan.run(pipe)
    assert attachment.sparse_calls + attachment.dense_calls == 0


def test_saving_is_unaffected(tmp_path: Path) -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    want = tiny_wan.run(pipe)
    pipe.save_pretrained(tmp_path / "before")
    pipe.set_attn_processor(SPARSE)
    tiny_wan.run(pipe)
    pipe.save_pretrained(tmp_path / "attached")
    for file in (tmp_path / "before").rglob("*"):
        other = tmp_path / "attached" / file.relative_to(tmp_path / "before")
        assert file.is_dir() or file.read_bytes() == other.read_bytes(), file
    loaded = WanPipeline.from_pretrained(tmp_path / "attached", text_encoder=None, tokenizer=None)
    torch.testing.assert_close(tiny_wan.run(loaded), want)  # loading gives stock attention back


def test_from_pipe_shares_the_attachment() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = pipe.set_attn_processor(SPARSE)
    other = WanPipeline(**pipe.components)
    tiny_wan.run(other)
    assert attachment.sparse_calls == 2 * 2 * 3


def test_a_copied_model_is_attached_apart_from_the_original() -> None:
    model = tiny_wan.transformer()
    attachment = diffattn.set_attn_processor(model, SPARSE)
    want = forward(model)
    calls = attachment.sparse_calls
    copied = copy.deepcopy(model)
    # Another shape of as many tokens: the copy must not take it for the original's.
    turned = inputs() | {"hidden_states": inputs()["hidden_states"].transpose(3, 4).contiguous()}
    fresh = tiny_wan.transformer()
    diffattn.set_attn_processor(fresh, SPARSE)
    with torch.no_grad():
        assert torch.equal(copied(**turned)[0], fresh(**turned)[0])
    assert torch.equal(forward(model), want)
    assert attachment.sparse_calls == 2 * calls, "the copy counts its own calls"

    diffattn.set_attn_processor(model, None)
    untouched = forward(model)
    assert not torch.equal(untouched, want)
    assert torch.equal(forward(copied), want), "detaching the original leaves the copy attached"
    diffattn.set_attn_processor(copied, None)
    assert torch.equal(forward(copied), untouched)


def test_a_copied_unet_is_attached_apart_from_the_original() -> None:
    case = tiny_families.CASES["sd1.5"]
    model = case.build()
    diffattn.set_attn_processor(model, stock.NEARBY)
    with torch.no_grad():
        model(**case.inputs())
        copied = copy.deepcopy(model)
        other = case.inputs() | {"sample": tiny_families.noise(2, 4, 16, 12)}
        got = copied(**other).sample
        fresh = case.build()
        diffattn.set_attn_processor(fresh, stock.NEARBY)
        assert torch.equal(got, fresh(**other).sample)


def test_a_copied_pipeline_is_attached_apart_from_the_original() -> None:
    pipe = tiny_wan.PIPELINES["two experts"]()
    method = RadialAttn(dense_steps=1, dense_layers=1, block_size=4, split_threshold=8)
    attachment = pipe.set_attn_processor(method)
    want = tiny_wan.run(pipe, steps=4)
    counted = (attachment.sparse_calls, attachment.dense_calls)
    copied = copy.deepcopy(pipe)
    assert torch.equal(tiny_wan.run(copied, steps=4), want)
    assert (attachment.sparse_calls, attachment.dense_calls) == counted
    theirs = attached_to(copied.transformer).owner
    assert theirs is attached_to(copied.transformer_2).owner
    assert theirs.models.keys() == attachment.models.keys()
    assert (theirs.sparse_calls, theirs.dense_calls) == counted
    pipe.set_attn_processor(None)
    assert torch.equal(tiny_wan.run(copied, steps=4), want)
    copied.set_attn_processor(None)
    assert not {"step", "set_timesteps"} & set(vars(copied.scheduler))
    assert torch.equal(tiny_wan.run(copied, steps=4), tiny_wan.run(pipe, steps=4))


def test_a_denoiser_copied_out_of_its_pipeline_leaves_the_steps_behind() -> None:
    pipe = tiny_wan.PIPELINES["two experts"]()
    pipe.set_attn_processor(RadialAttn(dense_steps=0.5, dense_layers=0))
    with pytest.warns(UserWarning, match="without a pipeline there are no steps to count"):
        copied = copy.deepcopy(pipe.transformer)
    owner = attached_to(copied).owner
    assert list(owner.models) == ["transformer"], "the other expert is not copied along"
    forward(copied)
    assert (owner.sparse_calls, owner.dense_calls) == (3, 0)
