"""Every family in a whole pipeline: exact, complete, restored, and on the grid foretold."""

import warnings
from typing import Any

import diffusers
import pytest
import stock
import tiny_families
import tiny_wan
import torch
from tiny_modular import MODULAR, ModularCase
from tiny_pipelines import PIPELINES, PipelineCase, picture, run_wan_animate, wan_animate

from diffattn import DenseAttn, RadialAttn, TokenGrid
from diffattn.models import denoisers, family_of, pipeline_grid, size_rules

STEPS = 2
CASES: dict[str, PipelineCase | ModularCase] = PIPELINES | {
    f"modular {name}": case for name, case in MODULAR.items()
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> PipelineCase | ModularCase:
    return CASES[request.param]


def test_pipelines_are_exact_and_complete(case: PipelineCase | ModularCase) -> None:
    pipe = case.build()
    # Of two experts each step calls one, and both have the same layers.
    model = next(iter(denoisers(pipe).values()))
    want = case.run(pipe)
    calls = STEPS * case.forwards * len(family_of(model).layers(model))

    dense = pipe.set_attn_processor(DenseAttn())
    torch.testing.assert_close(case.run(pipe), want, atol=1e-4, rtol=1e-3)
    assert dense.sparse_calls == calls

    sparse = pipe.set_attn_processor(stock.NEARBY)
    assert not torch.allclose(case.run(pipe), want, atol=1e-3)
    assert sparse.sparse_calls == calls
    assert sparse.dense_calls == 0

    pipe.set_attn_processor(None)
    assert torch.equal(case.run(pipe), want)


def test_pipeline_grid_is_the_grid_of_the_call(case: PipelineCase | ModularCase) -> None:
    pipe = case.build()
    recorder = stock.Recording()
    pipe.set_attn_processor(recorder)
    for factor in (1, 2):
        height, width, frames = case.size
        size = (height, width * factor, frames)
        recorder.calls.clear()
        case.run(pipe, size=size)
        seen = {(s.grid.frames, s.grid.height, s.grid.width) for s, _ in recorder.calls}
        grid = pipeline_grid(pipe, *size)
        assert max(seen) == (grid.frames, grid.height, grid.width)


def test_sizes_between_are_refused(case: PipelineCase | ModularCase) -> None:
    pipe = case.build()
    height, width, frames = case.size
    with pytest.raises(ValueError, match=r"height is .* but this model needs a multiple of"):
        pipeline_grid(pipe, height + 4, width, frames)
    if size_rules(pipe).frame_stride == 1:
        with pytest.raises(ValueError, match="num_frames is 0"):
            pipeline_grid(pipe, height, width, 0)
    elif frames == 1:
        with pytest.raises(ValueError, match="num_frames is 2, but this model makes images"):
            pipeline_grid(pipe, height, width, 2)
    else:
        with pytest.raises(ValueError, match=rf"num_frames is {frames + 2}, .* or"):
            pipeline_grid(pipe, height, width, frames + 2)


def test_three_model_calls_a_step_are_one_step() -> None:
    """LTX-2's guidance: both prompts at once, one block perturbed, sound and video apart."""
    case = PIPELINES["ltx-2"]
    pipe = case.build()
    pipe.transformer = tiny_families.ltx2(perturbed_attn=True)
    guidance = {
        "stg_scale": 1.0,
        "audio_stg_scale": 1.0,
        "spatio_temporal_guidance_blocks": [1],
    }
    want = case.run(pipe, steps=5, **guidance)
    attachment = pipe.set_attn_processor(
        stock.Nearby(dense_layers=1, dense_steps=2, last_dense_steps=1)
    )
    got = case.run(pipe, steps=5, **guidance)
    assert not torch.allclose(got, want, atol=1e-3)
    # The perturbed model has no attention in block 1: of two layers it calls the dense one.
    assert (attachment.sparse_calls, attachment.dense_calls) == (2 * 2, 2 * 3 + 3 * 5)


def test_a_grid_that_changes_in_the_run() -> None:
    """ChronoEdit reasons over all frames at first, then edits with the first and the last."""
    case = PIPELINES["chronoedit"]
    recorder = stock.Recording(dense_layers=0, dense_steps=0)
    pipe = case.build()
    want = case.run(pipe, steps=3, num_temporal_reasoning_steps=1)
    pipe.set_attn_processor(recorder)
    got = case.run(pipe, steps=3, num_temporal_reasoning_steps=1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    frames = [site.grid.frames for site, _ in recorder.calls]
    assert frames == [3] * 4 + [2] * 8


@pytest.mark.parametrize("frames", [9, 15])
def test_wan_animate_makes_a_run_of_every_segment(frames: int) -> None:
    pipe = wan_animate()
    # A latent frame for the character stands before those of the segment.
    grid = TokenGrid(1 + 3, 4, 6)
    runs = (1 if frames == 9 else 2) * STEPS * 2
    sites = list(family_of(pipe.transformer).layers(pipe.transformer))
    dense = run_wan_animate(pipe, frames)
    with stock.masked(pipe.transformer, sites, lambda tokens: grid, stock.NEARBY) as calls:
        want = run_wan_animate(pipe, frames)
    assert len(calls) == runs * len(sites)
    assert (want - dense).abs().max() > 1e-4

    attachment = pipe.set_attn_processor(stock.NEARBY)
    torch.testing.assert_close(run_wan_animate(pipe, frames), want, atol=1e-5, rtol=0)
    assert attachment.sparse_calls == runs * len(sites)
    attachment = pipe.set_attn_processor(stock.Nearby(dense_layers=0, dense_steps=1))
    run_wan_animate(pipe, frames)
    assert attachment.sparse_calls == attachment.dense_calls == runs * len(sites) // 2
    pipe.set_attn_processor(None)
    assert torch.equal(run_wan_animate(pipe, frames), dense)


@pytest.mark.parametrize("ar_step", [0, 2])
def test_diffusion_forcing_steps_copies_of_the_scheduler(ar_step: int) -> None:
    if diffusers.__version__ < "0.37":
        pytest.importorskip("ftfy")  # imported by that release whether needed or not
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=tiny_families.wan_shaped("SkyReelsV2Transformer3DModel"),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )
    case = PIPELINES["skyreels-v2"]

    def run() -> torch.Tensor:
        return case.run(
            pipe, prompt=None, steps=4, base_num_frames=9, ar_step=ar_step, overlap_history=None,
            causal_block_size=1,
        )  # fmt: skip

    want = run()
    pipe.set_attn_processor(DenseAttn())
    torch.testing.assert_close(run(), want, atol=1e-4, rtol=1e-3)
    attachment = pipe.set_attn_processor(RadialAttn(dense_steps=1, dense_layers=0))
    run()
    # Frame by frame, each starts `ar_step` steps after the one before it: the first one counts.
    assert attachment.dense_calls == 1 * 2 * 2
    assert attachment.sparse_calls == (3 + 2 * ar_step) * 2 * 2


def _video_to_video() -> tuple[Any, dict[str, Any]]:
    """A video made out of another by the last three of six steps."""
    pipe = diffusers.WanVideoToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_wan.vae(),
        transformer=tiny_wan.transformer(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )
    return pipe, {"video": [picture(seed=i) for i in range(9)], "height": 64, "width": 96}


def _image_to_image() -> tuple[Any, dict[str, Any]]:
    """An image made out of another by a scheduler that is not told where it begins."""
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        vae=tiny_families.make("AutoencoderKL"),
        text_encoder=None,
        tokenizer=None,
        unet=tiny_families.unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"image": tiny_families.noise(1, 4, 12, 16)}


@pytest.mark.parametrize("build", [_video_to_video, _image_to_image])
def test_the_last_steps_of_a_run_that_leaves_out_the_first(build: Any) -> None:
    pipe, inputs = build()
    pipe.set_progress_bar_config(disable=True)
    prompts = {
        f"{prefix}prompt_embeds": tiny_families.noise(1, 7, 16, seed=len(prefix))
        for prefix in ("", "negative_")
    }
    attachment = pipe.set_attn_processor(
        stock.Nearby(dense_layers=0, dense_steps=1, last_dense_steps=0.34)
    )
    pipe(**inputs, **prompts, strength=0.5, num_inference_steps=6, output_type="latent")
    # Of six steps three are made: the first, the last (a third of them), and one between.
    assert attachment.dense_calls == 2 * attachment.sparse_calls > 0
    assert next(iter(attachment.models.values())).owner.clock.num_steps == 3


@pytest.mark.parametrize("build", [_video_to_video, _image_to_image])
@pytest.mark.parametrize(
    ("strength", "steps", "schedule", "kinds"),
    [
        (0.1, 10, {"dense_steps": 0, "last_dense_steps": 1}, "d"),
        (0.2, 10, {"dense_steps": 0, "last_dense_steps": 2}, "dd"),
        (0.2, 10, {"dense_steps": 0.15}, "ss"),
        (0.3, 10, {"dense_steps": 1, "last_dense_steps": 0.34}, "dsd"),
        (1.0, 4, {"dense_steps": 0.25, "last_dense_steps": 0.25}, "dssd"),
    ],
)
def test_the_first_step_is_judged_by_the_length_of_the_run(
    build: Any, strength: float, steps: int, schedule: dict[str, Any], kinds: str
) -> None:
    pipe, inputs = build()
    pipe.set_progress_bar_config(disable=True)
    prompts = {
        f"{prefix}prompt_embeds": tiny_families.noise(1, 7, 16, seed=len(prefix))
        for prefix in ("", "negative_")
    }
    attachment = pipe.set_attn_processor(stock.Nearby(dense_layers=0, **schedule))
    (model,) = attachment.models.values()
    seen = []
    module = next(iter(model.sites.values())).module
    hook = module.register_forward_pre_hook(lambda *_: seen.append("ds"[model.groups[0].sparse]))
    for _ in range(2):
        seen.clear()
        pipe(
            **inputs,
            **prompts,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
        )
        assert "".join(seen) == kinds
    hook.remove()


def _ip_adapter(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of an IP-Adapter for an embedding of 8 channels."""
    image_proj = {
        "proj.weight": tiny_families.noise(4 * 16, 8),
        "proj.bias": torch.zeros(4 * 16),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    layers = {}
    for i, name in enumerate(cross):
        channels = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("k", "v"):
            # Numbers of self-attention are left out.
            key = f"{2 * i + 1}.to_{part}_ip.weight"
            layers[key] = 0.1 * tiny_families.noise(channels, 16, seed=i)
    return {"image_proj": image_proj, "ip_adapter": layers}


def test_an_ip_adapter_loaded_later_is_reported_and_works() -> None:
    case = PIPELINES["sd1.5"]
    image = {"ip_adapter_image_embeds": [tiny_families.noise(2, 1, 8)]}
    pipe = case.build()
    pipe.set_attn_processor(stock.NEARBY)

    def load(pipe: Any) -> None:
        pipe.load_ip_adapter(
            _ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
        )

    load(pipe)
    with pytest.warns(UserWarning, match=r"7 of 7 .* given a \w+ by load_ip_adapter .*attn1\)"):
        case.run(pipe, **image)

    stock_pipe = case.build()
    load(stock_pipe)
    attachment = pipe.set_attn_processor(DenseAttn())
    want = case.run(stock_pipe, **image)
    torch.testing.assert_close(case.run(pipe, **image), want, atol=1e-4, rtol=1e-3)
    assert attachment.sparse_calls == STEPS * 7


def test_xformers_that_is_not_installed_leaves_the_attachment() -> None:
    if diffusers.utils.is_xformers_available():
        pytest.skip("xformers is installed")
    case = PIPELINES["sd1.5"]
    pipe = case.build()
    attachment = pipe.set_attn_processor(stock.NEARBY)
    with pytest.raises(ModuleNotFoundError, match="xformers"):
        pipe.enable_xformers_memory_efficient_attention()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        case.run(pipe)
    assert attachment.sparse_calls == STEPS * 7


def test_free_noise_leaves_the_attachment() -> None:
    """It exchanges motion modules, and wraps what spatial attention is in."""
    case = PIPELINES["animatediff"]

    def build() -> Any:
        pipe = case.build()
        pipe.register_modules(
            motion_adapter=diffusers.MotionAdapter(
                block_out_channels=(8, 16),
                motion_layers_per_block=1,
                motion_norm_num_groups=4,
                motion_num_attention_heads=2,
            )
        )
        # FreeNoise has each frame's prompt encoded.
        prompts = [tiny_families.noise(2, 7, 16, seed=seed) for seed in (0, 9)]
        pipe.encode_prompt = lambda *args, **kwargs: prompts
        return pipe

    def run(pipe: Any) -> torch.Tensor:
        no_prompts = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"))
        size = (96, 128, 4)
        return case.run(pipe, size=size, prompt="", negative_prompt="", **no_prompts)

    plain, split = build(), build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for pipe in (plain, split):
            before = pipe.set_attn_processor(stock.NEARBY)
            pipe.enable_free_noise(context_length=2, context_stride=1)
            run(pipe)
            assert before.sparse_calls == STEPS * 4
        split.enable_free_noise_split_inference(spatial_split_size=2, temporal_split_size=2)
        want = run(plain)
        torch.testing.assert_close(run(split), want, atol=1e-4, rtol=1e-3)
        # Two prompts of four frames, two at a time.
        assert before.sparse_calls == STEPS * 4 * (1 + 4)
        again = split.set_attn_processor(stock.NEARBY)
        torch.testing.assert_close(run(split), want, atol=1e-4, rtol=1e-3)
        assert again.sparse_calls == STEPS * 4 * 4
