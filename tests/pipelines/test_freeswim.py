"""FreeSwimPipeline on tiny pipelines, against a loop written out and the public code's tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffattn import FreeSwimAttn
from diffattn.attached_model import attached_to
from diffattn.dual_path import DualPath
from diffattn.models import SizeRules
from diffattn.pipelines.freeswim import (
    FreeSwimPipeline,
    enlarge,
    legal_frames,
    legal_size,
    target_size,
    with_shift,
)

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens" / "freeswim"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="../shared/goldens is not there")
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


@needs_goldens
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
        "a", height=50, width=100, generator=seeded(), say=lines.append, **SMALL
    )
    want = pipe(
        "a", height=32, width=48, num_frames=5, num_inference_steps=1, generator=seeded(),
        max_sequence_length=16, output_type="np",
    ).frames  # fmt: skip
    np.testing.assert_array_equal(out.base, want)
    assert out.frames.shape == (1, 5, 48, 96, 3)
    assert lines == [
        "48x32 to 96x48 (asked for 100x50), 5 frames",
        "3 steps, 2 of them guided by all tokens; 0.0 MiB (device) keep the guidance in between",
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


def test_sizes() -> None:
    rules = SizeRules(16, frame_stride=4, frame_offset=1)
    assert legal_size((1080, 1920), rules) == (1088, 1920)
    assert legal_size((3, 23), rules) == (16, 16)
    assert legal_size((2160, 3840), SizeRules(32, 4, 1)) == (2176, 3840)
    assert target_size((480, 832), "1440p", None, None) == (1440, 2560)
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
        ({"flow_shift": -1}, "flow_shift is -1, but must be above 0"),
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
    with pytest.raises(ValueError, match="upscales with a WanPipeline, not a object"):
        FreeSwimPipeline(object())
