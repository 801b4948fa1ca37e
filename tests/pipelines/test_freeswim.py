"""FreeSwimPipeline on tiny pipelines, against a loop written out and the public code's tables."""

import inspect
import math
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import golden_files
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload

import diffattn
from diffattn import FreeSwimAttn, GNAAttn
from diffattn.attach.denoiser import attached_to
from diffattn.models import SizeRules
from diffattn.pipelines.freeswim.dual_path import DualPath
from diffattn.pipelines.freeswim.models import Wan
from diffattn.pipelines.freeswim.pipeline import (
    FreeSwimPipeline,
    enlarge,
    legal_frames,
    legal_size,
    target_size,
    with_shift,
)

GOLDENS = golden_files.GOLDENS / "freeswim"
SMALL: dict[str, Any] = {
    "base_height": 32,
    "base_width": 48,
    "num_frames": 5,
    "base_steps": 1,
    "num_inference_steps": 5,
    "max_sequence_length": 16,
}


@pytest.fixture
def pipe(tiny_wan: Path) -> Any:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny_wan)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unipc(shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def clip(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("shift", [3, 5, 9])
def test_the_noise_schedule_is_the_public_codes(shift: int) -> None:
    golden = np.load(GOLDENS / "schedule_unipc_flow_50.npz")
    scheduler = with_shift(unipc(1.0), shift)
    scheduler.set_timesteps(50)
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), golden[f"timesteps_{shift}"])
    np.testing.assert_allclose(scheduler.sigmas.numpy(), golden[f"sigmas_{shift}"], atol=1e-6)
    assert scheduler.config.flow_shift == shift


@pytest.mark.parametrize("cache_steps", [None, 1, 2, 3])
def test_the_loop_is_the_one_of_the_specification(pipe: Any, cache_steps: int | None) -> None:
    pipe.scheduler = unipc(3.0)
    prompts = ["a red circle", "two"]
    out = FreeSwimPipeline(pipe)(
        prompts, video=clip(), strength=0.7, cache_steps=cache_steps, negative_prompt="bad",
        generator=seeded(), **SMALL,
    )  # fmt: skip

    # Section 3, call by call; int(5 * 0.7) = 3 steps.
    with torch.no_grad():
        frames = np.stack([enlarge(clip().astype(np.float32) / 255, (64, 96), "bilinear")] * 2)
        pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) * 2 - 1
        mean, std = (
            torch.tensor(pipe.vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1)
            for name in ("mean", "std")
        )
        latents = torch.cat([pipe.vae.encode(p[None]).latent_dist.mode() for p in pixels])
        latents = (latents - mean) / std
        scheduler = unipc(9.0)
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(2)
        sigma = scheduler.sigmas[2]
        latents = (1 - sigma) * latents + sigma * torch.randn(latents.shape, generator=seeded())
        positive, negative = pipe.encode_prompt(
            prompts, ["bad", "bad"], True, max_sequence_length=16, device=torch.device("cpu")
        )
        path = DualPath(pipe.transformer, FreeSwimAttn(native=(2, 3)))
        for step, timestep in enumerate(scheduler.timesteps[2:]):
            two = latents.repeat(2, 1, 1, 1, 1)
            guide = cache_steps is None or step % cache_steps == 0
            with path.guided("store" if guide else "reuse"):
                rows = two if guide else latents
                cond = pipe.transformer(rows, timestep.expand(len(rows)), positive)[0][:2]
            if cache_steps is None:
                with path.guided("override"):
                    uncond = pipe.transformer(two, timestep.expand(4), negative)[0][:2]
            else:
                uncond = pipe.transformer(latents, timestep.expand(2), negative)[0]
            latents = scheduler.step(uncond + 5 * (cond - uncond), timestep, latents)[0]
        path.remove()
        want = pipe.vae.decode(latents * std + mean)[0] / 2 + 0.5
    want = want.clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()
    np.testing.assert_allclose(out.frames, want, atol=2e-5)
    assert out.frames.shape == (2, 5, 64, 96, 3)
    assert out.steps == 3
    assert out.guide_steps == {None: 3, 1: 3, 2: 2, 3: 1}[cache_steps]
    # 2 layers x 2 prompts x 48 tokens x 32 channels of 4 bytes.
    assert out.store_bytes == (2 * 2 * 48 * 32 * 4 if cache_steps in (2, 3) else 0)
    assert attached_to(pipe.transformer) is None


def test_base_generation_is_the_pipelines_own(pipe: Any) -> None:
    lines: list[str] = []
    out = FreeSwimPipeline(pipe)(
        "a", height=50, width=75, generator=seeded(), say=lines.append, **SMALL
    )
    want = pipe(
        "a", height=32, width=48, num_frames=5, num_inference_steps=1, generator=seeded(),
        max_sequence_length=16, output_type="np",
    ).frames  # fmt: skip
    np.testing.assert_array_equal(out.base, want)
    assert out.frames.shape == (1, 5, 48, 80, 3)
    assert lines == [
        "48x32 to 80x48 (asked for 75x50), 5 frames",
        "3 steps, 2 of them guided by all tokens; 0.0 MiB (device) keep the guidance in between",
    ]


def test_other_proportions_are_told(pipe: Any) -> None:
    lines: list[str] = []
    small = SMALL | {"strength": 0.1, "say": lines.append}
    for size in ({"width": 96}, {"height": 64, "width": 100}, {"height": 96, "width": 96}):
        FreeSwimPipeline(pipe)("a", video=clip(), **size, **small)
    assert [line.partition(";")[2] for line in lines[::2]] == [
        "",
        "",
        " the picture is stretched, from 1.50 times as wide as high to 1.00: give one of height and"
        " width to keep it",
    ]


def test_no_step_returns_the_enlarged_video(pipe: Any) -> None:
    out = FreeSwimPipeline(pipe)("a", video=clip(), strength=0.1, **SMALL)
    want = enlarge(clip().astype(np.float32) / 255, (64, 96), "bilinear")
    np.testing.assert_array_equal(out.frames[0], want)
    assert (out.steps, out.guide_steps, out.store_bytes) == (0, 0, 0)


def test_guidance_of_one_calls_the_model_once_a_step(pipe: Any) -> None:
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: calls.append(len(k["hidden_states"])), with_kwargs=True
    )
    FreeSwimPipeline(pipe)("a", video=clip(), guidance_scale=1.0, **SMALL)
    assert calls == [2, 1, 2]
    calls.clear()
    # As large as the window: every token sees all others anyway.
    FreeSwimPipeline(pipe)("a", video=clip(), height=32, width=48, guidance_scale=1.0, **SMALL)
    assert calls == [1, 1, 1]


def test_an_interrupted_run_leaves_the_model_as_it_was(pipe: Any) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = dict(pipe.transformer.attn_processors)
    hook = pipe.transformer.blocks[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        FreeSwimPipeline(pipe)("a", video=clip(), **SMALL)
    hook.remove()
    assert pipe.transformer.attn_processors == before
    assert attached_to(pipe.transformer) is None


def test_a_second_expert_has_guidance_of_its_own(tiny_wan: Path, pipe: Any) -> None:
    from diffusers import WanPipeline

    parts = dict(pipe.components) | {"scheduler": unipc(3.0)}
    second = WanPipeline.from_pretrained(tiny_wan).transformer
    both = WanPipeline(**(parts | {"transformer_2": second}), boundary_ratio=0.9)
    both.set_progress_bar_config(disable=True)
    calls: list[tuple[int, int]] = []
    for number, model in enumerate((both.transformer, second)):
        model.register_forward_pre_hook(
            lambda m, a, k, n=number: calls.append((n, len(k["hidden_states"]))), with_kwargs=True
        )
    FreeSwimPipeline(both)(
        "a", video=clip(), strength=1.0, cache_steps=4, guidance_scale=1.0, **SMALL
    )
    # Timesteps 999, 972, 930, 857, 692 at a shift of 9.
    assert calls == [(0, 2), (0, 1), (0, 1), (1, 2), (1, 2)]


def test_a_timestep_per_token_is_the_same_as_one(pipe: Any) -> None:
    # As Wan 2.2's 5B is called, whose model keeps tokens of an image clean.
    from diffusers import WanPipeline

    each = WanPipeline(**pipe.components, expand_timesteps=True)
    each.set_progress_bar_config(disable=True)
    shapes: set[tuple[int, ...]] = set()
    want = FreeSwimPipeline(pipe)("a", video=clip(), generator=seeded(), **SMALL).frames
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: shapes.add(tuple(k["timestep"].shape)), with_kwargs=True
    )
    got = FreeSwimPipeline(each)("a", video=clip(), generator=seeded(), **SMALL).frames
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert shapes == {(1, 48), (2, 48)}


def test_sizes() -> None:
    rules = SizeRules(16, frame_stride=4, frame_offset=1)
    assert legal_size((1080, 1920), rules) == (1088, 1920)
    assert legal_size((3, 23), rules) == (16, 16)
    assert legal_size((2160, 3840), SizeRules(32, 4, 1)) == (2176, 3840)
    assert target_size((480, 832), "1440p", None, None) == (1440, 2560)
    assert target_size((832, 480), "1440p", None, None) == (2560, 1440)
    assert target_size((480, 832), None, None, None) == (960, 1664)
    assert target_size((480, 832), None, 960, None) == (960, 1664)
    assert target_size((480, 832), None, None, 416) == (240, 416)
    assert len(legal_frames(clip(12, 2, 2), rules)) == 9
    assert len(legal_frames(clip(1, 2, 2), rules)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0}, "strength is 0, but must be above 0 and up to 1"),
        ({"strength": 1.5}, "strength is 1.5, but must be above 0"),
        ({"cache_steps": 0}, "cache_steps is 0, but must be at least 1"),
        ({"base_steps": 0}, "base_steps is 0, but must be at least 1"),
        ({"interpolation": "x"}, "interpolation is 'x', but must be one of nearest, bilinear, bi"),
        ({"flow_shift": -1}, "flow_shift is -1, but must be a number above 0"),
        ({"flow_shift": math.inf}, "flow_shift is inf, but must be a number above 0"),
        ({"preset": "8k"}, "preset is '8k', but must be one of 1080p, 1440p, 2160p"),
        ({"preset": "1080p", "height": 4}, "give a preset, or height and width, not both"),
        ({"height": 0}, "height is 0, but must be at least 1"),
        ({"store": "disk"}, "store is 'disk', but must be one of device, cpu, pinned"),
        ({"base_height": 30}, "height is 30, but this model needs a multiple of 16"),
        ({"num_frames": 4}, "num_frames is 4, but this model needs 4 "),
        ({"video": clip()[0]}, r"video has shape \(32, 48, 3\), but must be frames x height"),
        ({"video": clip() * 1.0}, "video must be uint8, or floats from 0 to 1"),
        ({"prompt": []}, "there is no prompt"),
    ],
)
def test_bad_arguments_are_named(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    prompt = arguments.pop("prompt", "a")
    with pytest.raises(ValueError, match=message):
        FreeSwimPipeline(pipe)(prompt, **(SMALL | arguments))


def test_another_pipeline_is_refused() -> None:
    message = "upscales with a WanPipeline or an LTXPipeline, not with a object; as a mask alone"
    with pytest.raises(ValueError, match=message):
        FreeSwimPipeline(object())


@pytest.mark.parametrize("frames", [1, 5, 8])
def test_no_frame_is_left_out_by_an_encoder_that_takes_fours(
    tiny_wan_every_frame: Path, frames: int
) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny_wan_every_frame)
    pipe.set_progress_bar_config(disable=True)
    pixels = torch.from_numpy(clip(9, 16, 16)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        got = Wan(pipe).encode(pixels[:, :, :frames])
        # The encoder is causal: whatever makes the fours complete leaves what is before as it is.
        want = pipe.vae.encode(pixels).latent_dist.mode()[:, :, :frames]
    assert got.shape[2] == frames
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    small = SMALL | {"num_frames": frames, "num_inference_steps": 2}
    base = clip(frames)
    out = FreeSwimPipeline(pipe)("a", video=base, generator=seeded(), **small)
    assert out.frames.shape == (1, frames, 64, 96, 3)
    base[-1] = 255 - base[-1]
    other = FreeSwimPipeline(pipe)("a", video=base, generator=seeded(), **small)
    assert not np.allclose(out.frames[0, -1], other.frames[0, -1], atol=1e-3)


def test_guidance_waits_on_the_cpu_as_well_as_on_the_device(pipe: Any) -> None:
    a, b = (
        FreeSwimPipeline(pipe)("a", video=clip(), store=store, generator=seeded(), **SMALL).frames
        for store in ("device", "cpu")
    )
    np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pinned memory is possible here")
def test_pinned_memory_without_an_accelerator_is_refused_before_the_base_video(pipe: Any) -> None:
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the base video was begun"))
    with pytest.raises(ValueError, match="store is 'pinned', but pinned memory is for copies to"):
        FreeSwimPipeline(pipe)("a", store="pinned", **SMALL)


@pytest.mark.parametrize("name", ["pipe", "ltx"])
def test_models_that_wait_in_main_memory_come_when_they_are_needed(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, options = request.getfixturevalue(name), {"pipe": SMALL, "ltx": LTX}[name]
    want = FreeSwimPipeline(pipe)("a", generator=seeded(), **options).frames
    pipe.enable_model_cpu_offload(device="cpu")
    parts = {id(getattr(pipe, p)): p for p in ("text_encoder", "transformer", "vae")}
    fetched: list[str] = []
    fetch = CpuOffload.pre_forward

    def noted(hook: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        fetched.append(parts[id(module)])
        return fetch(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", noted)
    got = FreeSwimPipeline(pipe)("a", generator=seeded(), **options).frames
    np.testing.assert_allclose(got, want, atol=1e-5)
    stages = [part for part, _ in groupby(fetched)]
    first = ["text_encoder", "transformer", "vae"]
    assert stages == [*first, "text_encoder", "vae", "transformer", "vae"]


def test_the_base_video_is_made_with_the_method_that_is_attached(pipe: Any) -> None:
    attachment = diffattn.set_attn_processor(pipe, GNAAttn(window=2, dense_steps=0))
    assert attachment is not None
    out = FreeSwimPipeline(pipe)("a", generator=seeded(), **SMALL)
    assert attachment.sparse_calls > 0
    assert attached_to(pipe.transformer) is None
    dense = FreeSwimPipeline(pipe)("a", generator=seeded(), **SMALL)
    assert not np.allclose(out.base, dense.base, atol=1e-4)


LTX: dict[str, Any] = {
    "base_height": 64,
    "base_width": 96,
    "num_frames": 9,
    "base_steps": 2,
    "num_inference_steps": 5,
    "max_sequence_length": 16,
}


@pytest.fixture
def ltx(tiny_ltx: Path) -> Any:
    from diffusers import LTXPipeline

    pipe = LTXPipeline.from_pretrained(tiny_ltx)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("cache_steps", [None, 2])
def test_ltx_with_several_prompts_on_a_users_video(ltx: Any, cache_steps: int | None) -> None:
    # Prompts of unequal lengths, so that the mask of the text matters.
    prompts, avoid = ["a red circle", "two", "a b"], "bad"
    video = clip(12, 64, 96)
    out = FreeSwimPipeline(ltx)(
        prompts, video=video, strength=0.7, cache_steps=cache_steps, negative_prompt=avoid,
        guidance_scale=4.0, frame_rate=12, generator=seeded(), **LTX,
    )  # fmt: skip

    with torch.no_grad():
        frames = np.stack([enlarge(video[:9].astype(np.float32) / 255, (128, 192), "bilinear")] * 3)
        pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) * 2 - 1
        latents = torch.cat([ltx.vae.encode(p[None]).latent_dist.mode() for p in pixels])
        statistics = ltx.vae.latents_mean, ltx.vae.latents_std, ltx.vae.config.scaling_factor
        latents = ltx._normalize_latents(latents, *statistics)
        # Shifted by 9 whatever the number of tokens, and stretched to the scheduler's end of 0.1.
        sigmas = torch.linspace(1, 0.2, 5, dtype=torch.float64)
        sigmas = 9 * sigmas / (1 + 8 * sigmas)
        sigmas = 1 - (1 - sigmas) / (1 - sigmas[-1]) * 0.9
        sigmas = torch.cat([sigmas, torch.zeros(1)]).float()[2:]
        noise = torch.randn(latents.shape, generator=seeded())
        latents = ltx._pack_latents((1 - sigmas[0]) * latents + sigmas[0] * noise)
        text = ltx.encode_prompt(prompts, [avoid] * 3, True, max_sequence_length=16)
        grid = {"num_frames": 2, "height": 4, "width": 6}

        def call(rows: torch.Tensor, sigma: torch.Tensor, embeds: Any, mask: Any) -> torch.Tensor:
            times = len(rows) // 3
            return ltx.transformer(
                rows, embeds.repeat(times, 1, 1), (1000 * sigma).expand(len(rows)),
                mask.repeat(times, 1), **grid, rope_interpolation_scale=(8 / 12, 32, 32),
            )[0][:3]  # fmt: skip

        path = DualPath(ltx.transformer, FreeSwimAttn(native=(2, 3)))
        for step, (sigma, after) in enumerate(pairwise(sigmas)):
            guide = cache_steps is None or step % cache_steps == 0
            with path.guided("store" if guide else "reuse"):
                cond = call(latents.repeat(2, 1, 1) if guide else latents, sigma, *text[:2])
            with path.guided("override" if cache_steps is None else "own"):
                rows = latents.repeat(2, 1, 1) if cache_steps is None else latents
                uncond = call(rows, sigma, *text[2:])
            latents = latents + (after - sigma) * (uncond + 4 * (cond - uncond))
        path.remove()
        latents = ltx._denormalize_latents(ltx._unpack_latents(latents, 2, 4, 6), *statistics)
        want = ltx.vae.decode(latents, torch.zeros(3))[0] / 2 + 0.5
    want = want.clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()
    assert out.frames.shape == (3, 9, 128, 192, 3)
    np.testing.assert_allclose(out.frames, want, atol=2e-5)
    assert not np.allclose(out.frames[0], out.frames[1], atol=1e-3), "the prompt should matter"
    # 2 layers x 3 prompts x 48 tokens x 32 channels of 4 bytes.
    assert out.store_bytes == (0 if cache_steps is None else 2 * 3 * 48 * 32 * 4)
    assert attached_to(ltx.transformer) is None


def test_ltx_makes_the_base_video_itself(ltx: Any) -> None:
    lines: list[str] = []
    out = FreeSwimPipeline(ltx)(
        "a", height=100, width=150, generator=seeded(), frame_rate=8, say=lines.append, **LTX
    )
    want = ltx(
        "a", height=64, width=96, num_frames=9, num_inference_steps=2, generator=seeded(),
        frame_rate=8, max_sequence_length=16, output_type="np",
    ).frames  # fmt: skip
    np.testing.assert_array_equal(out.base, want)
    assert out.frames.shape == (1, 9, 96, 160, 3)
    assert lines[0] == "96x64 to 160x96 (asked for 150x100), 9 frames"


@pytest.mark.parametrize("name", ["pipe", "ltx"])
def test_what_is_left_out_is_the_pipelines_own(name: str, request: pytest.FixtureRequest) -> None:
    pipe, calls = request.getfixturevalue(name), []
    # As published: the tiny model has positions for a small video only.
    pipe.transformer.register_to_config(rope_max_seq_len=1024)

    class Told(type(pipe)):
        def __call__(self, **arguments: Any) -> Any:
            calls.append(arguments)
            raise KeyboardInterrupt

    Told.__name__ = type(pipe).__name__
    Told.__call__.__signature__ = inspect.signature(type(pipe).__call__)
    told = Told(**pipe.components)
    with pytest.raises(KeyboardInterrupt):
        FreeSwimPipeline(told)("a")
    (arguments,) = calls
    # From the model cards: Wan 2.1 at 480p, and LTX-Video.
    want = {"pipe": (480, 832, 81, 5.0, 512), "ltx": (512, 704, 161, 3.0, 128)}[name]
    names = ("height", "width", "num_frames", "guidance_scale", "max_sequence_length")
    assert tuple(arguments[n] for n in names) == want
    assert arguments.get("frame_rate") == (25 if name == "ltx" else None)


def test_frame_rates_out_of_place(pipe: Any, ltx: Any) -> None:
    with pytest.raises(ValueError, match="frame_rate is 12, but WanPipeline is not told how many"):
        FreeSwimPipeline(pipe)("a", frame_rate=12, **SMALL)
    with pytest.raises(ValueError, match="frame_rate is 0, but must be a number above 0"):
        FreeSwimPipeline(ltx)("a", frame_rate=0, **LTX)


def test_the_end_of_ltx_noise_needs_two_steps(ltx: Any) -> None:
    with pytest.raises(ValueError, match="num_inference_steps is 1, but must be at least 2"):
        FreeSwimPipeline(ltx)("a", **(LTX | {"num_inference_steps": 1}))
