"""Recipes against the pipelines themselves: the same latents, text and calls, bit for bit."""

import inspect
import math
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny_complete
import tiny_families as tiny
import tiny_pipelines
import tiny_wan
import torch
from tiny_complete import COMPLETE

from diffattn.lora.recipes import RECIPES, noising, recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.models import denoisers

PROMPT, NEGATIVE = "a red fox", "grey"
SIZE = (2, 6, 10)

# What pipelines pass on for attention processors: nothing, in a plain call.
IDLE = {"attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs"}


def recorded(model: torch.nn.Module, calls: list[tuple[dict[str, Any], torch.Tensor]]) -> Any:
    """Note what a denoiser is given, by name, and what it returns."""
    signature = inspect.signature(model.forward)

    def note(module, args, kwargs, output):
        given = signature.bind(*args, **kwargs).arguments
        calls.append(({k: v for k, v in given.items() if v is not None}, output[0]))

    return model.register_forward_hook(note, with_kwargs=True)


def assert_same(found: Any, expected: Any, name: str) -> None:
    """Equal bit for bit, whatever the tensors are nested in."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, name
        # A U-Net's pipeline tells it one timestep for the whole batch.
        assert torch.equal(found, expected.expand(found.shape)), name
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key in expected:
            assert_same(found[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected), name
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{name}[{i}]")
    else:
        assert found == expected, name


@dataclass
class PipelineRun:
    """What happened in a call of a case's pipeline."""

    pipe: Any
    calls: dict[str, list[tuple[dict[str, Any], torch.Tensor]]]
    latents: torch.Tensor
    """What the pipeline denoised, as `output_type="latent"` returns it."""
    decoded: torch.Tensor
    """What it gave its VAE of that."""


@pytest.fixture(scope="module", params=sorted(COMPLETE))
def case(request):
    return COMPLETE[request.param]


@pytest.fixture(scope="module")
def run(case) -> PipelineRun:
    return run_pipeline(case, case.build())


def run_pipeline(case, pipe: Any) -> PipelineRun:
    calls: dict[str, list] = {name: [] for name in denoisers(pipe)}
    hooks = [recorded(model, calls[name]) for name, model in denoisers(pipe).items()]
    seen: list[torch.Tensor] = []
    latents: list[torch.Tensor] = []

    def decode(z, *args, **kwargs):
        seen.append(z)
        raise StopIteration

    def keep(pipe, step, timestep, tensors):
        latents.append(tensors["latents"])
        return tensors

    stock_decode, pipe.vae.decode = pipe.vae.decode, decode
    with pytest.raises(StopIteration):
        case.run(pipe, PROMPT, NEGATIVE, callback_on_step_end=keep)
    pipe.vae.decode = stock_decode
    for hook in hooks:
        hook.remove()
    return PipelineRun(pipe, calls, latents[-1], seen[0])


def latents_of_pipeline(pipe: Any, latents: torch.Tensor, case) -> torch.Tensor:
    """The pipeline's own way from its latents to (batch, channels, frames, height, width)."""
    height, width, num_frames = case.size
    match type(pipe).__name__:
        case "CogVideoXPipeline":
            return latents.permute(0, 2, 1, 3, 4)
        case "LTXPipeline":
            ratio = pipe.vae_spatial_compression_ratio
            frames = (num_frames - 1) // pipe.vae_temporal_compression_ratio + 1
            return pipe._unpack_latents(latents, frames, height // ratio, width // ratio)
        case "FluxPipeline":
            return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)[:, :, None]
        case "Flux2Pipeline" | "Flux2KleinPipeline":
            side = 2 * pipe.vae_scale_factor
            return latents.transpose(1, 2).unflatten(2, (1, height // side, width // side))
        case "QwenImagePipeline":
            return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        case "StableDiffusionPipeline" | "StableDiffusionXLPipeline" | "StableDiffusion3Pipeline":
            return latents[:, :, None]
    return latents


def denoiser_times(recipe: Any, pipe: Any, step: int) -> torch.Tensor:
    """Where the pipeline was at a step, in the recipe's terms."""
    if recipe.prediction != "flow":
        return pipe.scheduler.timesteps[step]
    sigma = pipe.scheduler.sigmas[step]
    return 1 - sigma if pipe.scheduler.config.invert_sigmas else sigma


def test_latents_undo_what_the_pipeline_does_before_decoding(case, run, monkeypatch):
    recipe = recipe_for(run.pipe, text_length=case.text_length)
    shown = run.decoded if run.decoded.ndim == 5 else run.decoded[:, :, None]
    posterior = SimpleNamespace(sample=lambda generator: run.decoded, mode=lambda: run.decoded)
    encoded = SimpleNamespace(latent_dist=posterior)
    monkeypatch.setattr(run.pipe.vae, "encode", lambda pixels: encoded)

    found = recipe.encode_clip(run.pipe, torch.zeros(1, 3, 1, 8, 8), torch.Generator())
    expected = latents_of_pipeline(run.pipe, run.latents, case)
    # CogVideoX 1.5 decodes no surplus frame; training repeats the first one in its place.
    surplus = expected.shape[2] - shown.shape[2]
    torch.testing.assert_close(
        found[:, :, surplus:], expected[:, :, surplus:], rtol=2e-6, atol=2e-6
    )
    for frame in range(surplus):
        assert torch.equal(found[:, :, frame], found[:, :, surplus])


def test_latents_of_the_pipeline_are_put_in_the_shape_of_a_recipe(case, run):
    recipe = recipe_for(run.pipe, text_length=case.text_length)
    found = recipe.from_pipeline(run.latents, *case.size[:2])
    assert torch.equal(found, latents_of_pipeline(run.pipe, run.latents, case))


def test_encoded_pixels_have_the_shape_of_the_pipelines_latents(case, run):
    recipe = recipe_for(run.pipe, text_length=case.text_length)
    height, width, num_frames = case.size
    generator = torch.Generator().manual_seed(0)
    pixels = 2 * torch.rand(2, 3, num_frames, height, width, generator=generator) - 1
    drawn = recipe.encode_clip(run.pipe, pixels, generator)
    mean = recipe.encode_clip(run.pipe, pixels, None)
    expected = latents_of_pipeline(run.pipe, run.latents, case)
    assert drawn.shape == mean.shape == (2, *expected.shape[1:])
    assert drawn.dtype == torch.float32
    assert not drawn.requires_grad
    # Wan's own encoder takes the mean.
    assert torch.equal(drawn, mean) == (recipe.family == "wan")
    again = recipe.encode_clip(run.pipe, pixels, torch.Generator().manual_seed(1))
    assert torch.equal(
        again, recipe.encode_clip(run.pipe, pixels, torch.Generator().manual_seed(1))
    )


def test_the_denoiser_is_called_as_the_pipeline_calls_it(case, run):
    check_calls(case, run)


def test_so_it_is_in_half_precision(case, caplog):
    # Wan's pipelines want parts in float32, which only from_pretrained knows.
    caplog.set_level("ERROR", logger="diffusers")
    pipe = case.build().to(torch.bfloat16)
    check_calls(case, run_pipeline(case, pipe))


def check_calls(case, run: PipelineRun, fps: float | None = None) -> None:
    prompts = [NEGATIVE, PROMPT] if case.guided else [PROMPT]
    step = 0
    for name, calls in run.calls.items():
        assert calls, f"{name} was not called"
        recipe = recipe_for(run.pipe, name, text_length=case.text_length).at_rate(fps)
        conditions = recipe.encode_prompt(run.pipe, prompts)
        assert not any(value.requires_grad for value in conditions.values())
        model = getattr(run.pipe, name)
        for given, output in calls:
            latents = given["sample" if "sample" in given else "hidden_states"]
            noisy = latents_of_pipeline(run.pipe, latents, case)
            time = denoiser_times(recipe, run.pipe, step)
            mine: list[tuple[dict[str, Any], torch.Tensor]] = []
            hook = recorded(model, mine)
            found = recipe.predict(model, noisy, time.expand(len(noisy)), conditions)
            hook.remove()
            ((told, _),) = mine
            given = {k: v for k, v in given.items() if k not in IDLE}
            # In half precision HunyuanVideo's first timestep is not rounded, but the others are.
            told["timestep"] = told["timestep"].to(given["timestep"].dtype)
            assert_same(told, given, name)
            assert torch.equal(found, latents_of_pipeline(run.pipe, output, case))
            step += 1


def test_gradients_reach_the_denoiser_through_the_call(case, run):
    recipe = recipe_for(run.pipe, text_length=case.text_length)
    model = getattr(run.pipe, recipe.denoiser)
    latents = latents_of_pipeline(run.pipe, run.latents, case)
    clean = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    times = recipe.sample_times(run.pipe.scheduler, len(clean), generator, clean.shape[2:])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    noisy = recipe.add_noise(run.pipe.scheduler, clean, noise, times)
    out = recipe.predict(model, noisy, times, recipe.encode_prompt(run.pipe, [PROMPT]))
    target = recipe.target(run.pipe.scheduler, clean, noise, times)
    assert out.shape == target.shape == latents.shape
    weight = next(p for n, p in model.named_parameters() if n.endswith("to_q.weight"))
    (gradient,) = torch.autograd.grad((out - target).square().mean(), weight)
    assert gradient.any()
    assert gradient.isfinite().all()


def test_a_prompt_is_encoded_alike_whatever_the_others_are(case, run):
    recipe = recipe_for(run.pipe, text_length=case.text_length)
    # An empty prompt at the end empties the whole batch in Mochi's pipeline.
    together = recipe.encode_prompt(run.pipe, [PROMPT, NEGATIVE, ""])
    for i, prompt in enumerate((PROMPT, NEGATIVE, "")):
        for name, value in recipe.encode_prompt(run.pipe, [prompt]).items():
            assert torch.equal(together[name][i : i + 1], value), (prompt, name)


def test_an_empty_prompt_is_what_sdxl_guides_with_without_a_negative_prompt():
    for force_zeros in (True, False):
        pipe = tiny_complete._sdxl(force_zeros)
        _, embeds, _, pooled = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=True)
        found = recipe_for(pipe).encode_prompt(pipe, [""])
        assert torch.equal(found["prompt_embeds"], embeds)
        assert torch.equal(found["pooled_prompt_embeds"], pooled)
        assert bool(pooled.any()) != force_zeros


def test_prompts_are_as_long_as_the_recipe_says():
    pipe = tiny_complete.wan()
    assert recipe_for(pipe).text_length == 512
    recipe = recipe_for(pipe, text_length=19)
    assert recipe.encode_prompt(pipe, [PROMPT, ""])["prompt_embeds"].shape == (2, 19, 16)


def test_the_rate_of_clips_is_told_where_the_pipeline_tells_it():
    case = replace(COMPLETE["ltx"], call={"frame_rate": 10})
    run = run_pipeline(case, case.build())
    recipe = recipe_for(run.pipe)
    with pytest.raises(AssertionError, match="rope_interpolation_scale"):
        check_calls(case, run)
    check_calls(case, run, fps=10)
    assert recipe.at_rate(None) is recipe
    wan = recipe_for(tiny_complete.wan())
    assert wan.at_rate(10) is wan


def test_clips_in_one_batch_have_a_rate_each():
    case = COMPLETE["ltx"]
    pipe = case.build()
    recipe = recipe_for(pipe)
    conditions = recipe.encode_prompt(pipe, [PROMPT, NEGATIVE])
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 8, 3, 4, 6, generator=generator)
    times = torch.tensor([0.3, 0.8])

    def predicted(recipe, **more):
        with torch.no_grad():
            return recipe.predict(pipe.transformer, noisy, times, conditions | more)

    rates = [recipe.encode_origin(rate, (9, 9), (0, 0))["frame_rate"] for rate in (10, None)]
    assert [rate.tolist() for rate in rates] == [[10.0], [25.0]]
    found = predicted(recipe, frame_rate=torch.cat(rates))
    assert torch.equal(found[0], predicted(recipe.at_rate(10))[0])
    assert torch.equal(found[1], predicted(recipe)[1])
    assert not torch.equal(found[0], predicted(recipe)[0])
    assert recipe_for(tiny_complete.wan()).encode_origin(10, (9, 9), (0, 0)) == {}


def test_texts_of_several_lengths_in_one_batch_are_as_each_is_alone():
    case = COMPLETE["qwen-image"]
    pipe = case.build()
    recipe = recipe_for(pipe, text_length=case.text_length)
    prompts = ["", PROMPT, "a cat"]
    noisy = torch.randn(3, 4, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.3, 0.8, 0.5])
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    recorded(pipe.transformer, calls)
    with torch.no_grad():
        conditions = recipe.encode_prompt(pipe, prompts)
        found = recipe.predict(pipe.transformer, noisy, times, conditions)
        for i, prompt in enumerate(prompts):
            alone = recipe.encode_prompt(pipe, [prompt])
            expected = recipe.predict(pipe.transformer, noisy[i : i + 1], times[i : i + 1], alone)
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-5, atol=1e-6)
    lengths = [pipe.encode_prompt(prompt)[0].shape[1] for prompt in prompts]
    together, *one_by_one = [told for told, _ in calls]
    assert together["encoder_hidden_states_mask"].sum(dim=1).tolist() == lengths
    assert together["encoder_hidden_states"].shape[1] == max(lengths) < case.text_length
    assert all("encoder_hidden_states_mask" not in told for told in one_by_one)


def test_sdxl_is_told_where_a_picture_was_cropped():
    pipe = tiny_complete._sdxl(True)
    recipe = recipe_for(pipe)
    conditions = recipe.encode_prompt(pipe, [PROMPT, NEGATIVE])
    origins = [((1080, 1920), (0, 448)), ((2000, 1000), (512, 0))]
    told = [recipe.encode_origin(None, *origin)["origin"] for origin in origins]
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    recorded(pipe.unet, calls)
    noisy, times = torch.zeros(2, 4, 1, 8, 12), torch.tensor([1, 2])
    for more in ({"origin": torch.cat(told)}, {}):
        recipe.predict(pipe.unet, noisy, times, conditions | more)
    side = pipe.vae_scale_factor
    own = [8 * side, 12 * side]
    ids = [call["added_cond_kwargs"]["time_ids"].tolist() for call, _ in calls]
    assert ids[0] == [[1080, 1920, 0, 448, *own], [2000, 1000, 512, 0, *own]]
    assert ids[1] == [[*own, 0, 0, *own]] * 2


class TestNoise:
    """What is trained on against what a scheduler does with a perfect prediction."""

    clean = torch.randn(3, 4, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 4, 2, 3, 5, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("inverted", [False, True])
    @pytest.mark.parametrize("level", [0.031, 0.5, 0.97])
    def test_one_step_of_a_flow_with_the_target_gives_the_clean_latents(self, level, inverted):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted)
        recipe = replace(recipe_for(tiny_complete.wan()), inverted=inverted)
        times = torch.full((3,), level)
        noisy = recipe.add_noise(scheduler, self.clean, self.noise, times)
        target = recipe.target(scheduler, self.clean, self.noise, times)
        scheduler.set_timesteps(sigmas=[level])
        told = scheduler.timesteps[0]
        torch.testing.assert_close(recipe.model_times(times)[0], told, rtol=0, atol=1e-4)
        stepped = scheduler.step(target, told, noisy)[0]
        torch.testing.assert_close(stepped, self.clean, rtol=0, atol=2e-6)

    def test_a_flows_noise_is_the_schedulers(self):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        recipe = recipe_for(tiny_complete.wan())
        places = torch.tensor([5, 500, 990])
        expected = scheduler.scale_noise(self.clean, scheduler.timesteps[places], self.noise)
        found = recipe.add_noise(scheduler, self.clean, self.noise, scheduler.sigmas[places])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
    @pytest.mark.parametrize(
        "scheduler",
        [
            diffusers.DDPMScheduler,
            diffusers.CogVideoXDDIMScheduler,
            diffusers.DDIMScheduler,
        ],
    )
    def test_noise_and_velocity_are_the_schedulers(self, scheduler, kind):
        scheduler = scheduler(prediction_type=kind)
        recipe = replace(recipe_for(tiny_complete._sd()), prediction=kind)
        times = torch.tensor([0, 523, 999])
        found = recipe.add_noise(scheduler, self.clean, self.noise, times)
        expected = scheduler.add_noise(self.clean, self.noise, times)
        # CogVideoX's keep their amplitudes in float64 until they are used.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        target = recipe.target(scheduler, self.clean, self.noise, times)
        velocity = scheduler.get_velocity(self.clean, self.noise, times)
        expected = self.noise if kind == "epsilon" else velocity
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
    def test_a_scheduler_that_scales_otherwise_is_given_what_its_model_is(self, kind):
        # As SDXL ships: its own add_noise gives what must be scaled before the model takes it.
        scheduler = diffusers.EulerDiscreteScheduler(prediction_type=kind)
        scheduler.set_timesteps(10)
        time = scheduler.timesteps[3]
        recipe = replace(recipe_for(tiny_complete._sd()), prediction=kind)
        times = time.long().expand(3)
        assert float(time) == int(time)
        noisy = recipe.add_noise(scheduler, self.clean, self.noise, times)
        own = scheduler.add_noise(self.clean, self.noise, time[None])
        scaled = scheduler.scale_model_input(own, time)
        torch.testing.assert_close(noisy, scaled, rtol=1e-5, atol=1e-5)
        target = recipe.target(scheduler, self.clean, self.noise, times)
        out = scheduler.step(target, time, own)
        torch.testing.assert_close(out.pred_original_sample, self.clean, rtol=1e-4, atol=1e-4)


class TestTimes:
    @pytest.mark.parametrize("shift", [0.4, 1.0, 3.0])
    @pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.875, 1.0), (0.0, 0.875), (0.2, 0.21)])
    @pytest.mark.parametrize("distribution", ["logit-normal", "uniform"])
    def test_levels_have_their_distribution_within_their_bounds(self, shift, bounds, distribution):
        count = 20_000
        generator = torch.Generator().manual_seed(0)
        steps = noising.Shifted(shift)
        levels = noising.sample_levels(count, generator, steps, distribution, bounds)
        assert levels.dtype == torch.float32
        assert levels.min() >= bounds[0]
        assert levels.max() <= bounds[1]
        assert levels.min() > 0
        assert levels.max() < 1

        def below(level: float) -> float:
            """Share of unbounded levels below one, by undoing the shift."""
            if level in (0.0, 1.0):
                return level
            u = level / (shift - (shift - 1) * level)
            if distribution == "uniform":
                return u
            return 0.5 * (1 + math.erf(math.log(u / (1 - u)) / math.sqrt(2)))

        low, high = map(below, bounds)
        for part in (0.1, 0.35, 0.5, 0.8):
            level = bounds[0] + part * (bounds[1] - bounds[0])
            expected = (below(level) - low) / (high - low)
            # Five standard deviations of a count of so many.
            assert abs((levels < level).float().mean().item() - expected) < 2.5 / count**0.5
            above = noising.share_above(level, steps, distribution, bounds)
            assert above == pytest.approx(1 - expected, abs=1e-6)

    def test_the_experts_of_wan_share_the_noise_levels_at_the_boundary(self):
        pipe = tiny_complete._wan_two_experts()
        first, second = (recipe_for(pipe, name) for name in ("transformer", "transformer_2"))
        assert (first.noise_range, second.noise_range) == ((0.7, 1.0), (0.0, 0.7))
        generator = torch.Generator().manual_seed(0)
        assert first.sample_times(pipe.scheduler, 500, generator, SIZE).min() >= 0.7
        assert second.sample_times(pipe.scheduler, 500, generator, SIZE).max() <= 0.7

    @pytest.mark.parametrize(
        "name", ["hunyuanvideo", "ltx", "mochi", "flux", "flux.2", "qwen-image", "sd3", "sd3.5"]
    )
    def test_the_steps_are_those_of_the_pipeline(self, name):
        case = COMPLETE[name]
        pipe = case.build()
        # At the end of a run LTX's scheduler leaves its own steps out.
        pipe.scheduler.register_to_config(shift_terminal=None)
        latents = case.run(pipe, PROMPT, NEGATIVE, steps=16, output_type="latent")
        size = latents_of_pipeline(pipe, latents, case).shape[2:]
        expected = pipe.scheduler.sigmas[:-1].double()
        if pipe.scheduler.config.invert_sigmas:
            expected = 1 - expected
        # Stable Diffusion 3's pipeline has its last step at the scheduler's lowest noise.
        last = pipe.scheduler.sigma_min if name.startswith("sd3") else 1 / 16
        places = torch.linspace(1, last, 16, dtype=torch.float64)
        recipe = recipe_for(pipe)
        if name == "flux.2":
            # Its shift depends on the number of steps, too; that of training is the usual one.
            assert recipe.sampling_steps == 50
            recipe = replace(recipe, sampling_steps=16)
        steps = recipe.steps(pipe.scheduler, size, None)
        torch.testing.assert_close(steps.level(places), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(steps.place(expected), places, rtol=0, atol=2e-5)
        # Trained alike, each quarter of a run's steps is drawn equally often.
        levels = recipe.sample_times(
            pipe.scheduler, 20_000, torch.Generator().manual_seed(0), size, None, "uniform"
        )
        for part in (4, 8, 12):
            share = (levels > expected[part]).float().mean().item()
            assert share == pytest.approx(1 - float(places[part]), abs=0.016)

    # The parts of the levels that the trainers of these models draw, and the steps of sampling, by
    # their published configurations: LTX-Video's, Mochi's, and Flux-dev's.
    @pytest.mark.parametrize(
        ("name", "size", "config", "drawn", "visited"),
        [
            ("ltx", (21, 15, 22), (1024, 4096, 0.95, 2.05), 0.81, 0.70),
            ("ltx", (13, 16, 24), (1024, 4096, 0.95, 2.05), 0.57, 0.54),
            ("mochi", (15, 60, 106), None, 0.71, 0.63),
            ("flux", (1, 128, 128), (256, 4096, 0.5, 1.15), 0.15, 0.26),
        ],
    )
    def test_strong_noise_is_trained_as_often_as_it_is_sampled(
        self, name, size, config, drawn, visited
    ):
        pipe = COMPLETE[name].build()
        if config is not None:
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            pipe.scheduler.register_to_config(**dict(zip(names, config, strict=True)))
        recipe = recipe_for(pipe)
        for distribution, expected in ((None, drawn), ("uniform", visited)):
            levels = recipe.sample_times(
                pipe.scheduler, 20_000, torch.Generator().manual_seed(0), size, None, distribution
            )
            assert (levels > 0.9).float().mean().item() == pytest.approx(expected, abs=0.02)
        usual, even = TrainSettings(), TrainSettings(noise_levels="uniform")
        for settings, share in ((usual, drawn), (even, visited)):
            line = recipe.about_times(pipe.scheduler, size, settings)
            assert line.startswith(f"noise levels: {settings.noise_levels or 'logit-normal'}, ")
            assert abs(int(line.split("; ")[1].split("%")[0]) / 100 - share) < 0.02

    def test_a_shift_that_grows_along_a_line(self):
        pipe = tiny_complete._flux()
        line = {"time_shift_type": "linear", "base_shift": 1, "max_shift": 9}
        pipe.scheduler.register_to_config(**line)
        # Halfway between the 256 and the 4096 tokens of its configuration.
        assert recipe_for(pipe).steps(pipe.scheduler, (1, 64, 136), None) == noising.Shifted(5.0)

    @pytest.mark.parametrize("size", [(1, 4, 6), (1, 64, 64), (1, 64, 68), (1, 128, 128)])
    @pytest.mark.parametrize("kind", ["exponential", "linear"])
    def test_the_shift_of_flux_2_is_that_of_its_pipeline(self, size, kind):
        pipe = tiny_complete._flux2()
        pipe.scheduler.register_to_config(time_shift_type=kind)
        own = sys.modules[type(pipe).__module__].compute_empirical_mu(math.prod(size), 50)
        expected = math.exp(own) if kind == "exponential" else own
        found = recipe_for(pipe).steps(pipe.scheduler, size, None)
        assert found.shift == pytest.approx(expected, rel=1e-9)
        assert recipe_for(pipe).steps(pipe.scheduler, size, 2.0) == noising.Shifted(2.0)
        # Without a dynamic shift there is the scheduler's own.
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        assert recipe_for(pipe).steps(pipe.scheduler, size, None) == noising.Shifted(3.0)

    def test_what_is_drawn_is_said(self):
        experts = tiny_complete._wan_two_experts()
        for name, shift, line in (
            ("transformer", None, "noise levels: logit-normal, shift 3, from 0.7 to 1; 23% of"),
            ("transformer", 1.0, "noise levels: logit-normal, shift 1, from 0.7 to 1; 7% of"),
            ("transformer_2", None, "noise levels: logit-normal, shift 3, from 0 to 0.7"),
        ):
            settings = TrainSettings(shift=shift)
            said = recipe_for(experts, name).about_times(experts.scheduler, SIZE, settings)
            assert said.startswith(line)
        sd = tiny_complete._sd()
        line = recipe_for(sd).about_times(sd.scheduler, SIZE, TrainSettings())
        assert line == "timesteps: all 1000 equally often"

    def test_the_shift_is_the_schedulers_unless_given(self):
        def median(pipe, shift=None):
            generator = torch.Generator().manual_seed(0)
            recipe = recipe_for(pipe)
            return recipe.sample_times(pipe.scheduler, 4001, generator, SIZE, shift).median()

        wan = tiny_complete.wan()
        # The shifted median of the normal number's 0, which is the level 1/2.
        torch.testing.assert_close(median(wan), torch.tensor(0.75), atol=0.02, rtol=0)
        torch.testing.assert_close(median(wan, 1.0), torch.tensor(0.5), atol=0.02, rtol=0)
        mochi = tiny_complete._mochi()
        torch.testing.assert_close(median(mochi, 1.0), torch.tensor(0.5), atol=0.02, rtol=0)
        wan.scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
        torch.testing.assert_close(median(wan), torch.tensor(5 / 6), atol=0.02, rtol=0)

    def test_timesteps_are_drawn_equally_often(self):
        pipe = tiny_complete._sd()
        times = recipe_for(pipe).sample_times(
            pipe.scheduler, 50_000, torch.Generator().manual_seed(0), SIZE
        )
        assert times.dtype == torch.int64
        assert (times.min(), times.max()) == (0, 999)
        counts = torch.bincount(times // 100)
        # Five standard deviations.
        assert ((counts - 5000).abs() < 5 * (50_000 * 0.1 * 0.9) ** 0.5).all()

    def test_a_shift_of_nothing_or_for_what_is_no_flow_is_refused(self):
        wan, sd, generator = tiny_complete.wan(), tiny_complete._sd(), torch.Generator()
        with pytest.raises(ValueError, match=r"shift is 0.0, but must be above 0"):
            recipe_for(wan).sample_times(wan.scheduler, 1, generator, SIZE, 0.0)
        with pytest.raises(ValueError, match=r"shift is 3.0, but this model predicts epsilon"):
            recipe_for(sd).sample_times(sd.scheduler, 1, generator, SIZE, 3.0)
        with pytest.raises(ValueError, match=r"noise_levels is uniform, but this model predicts"):
            recipe_for(sd).check_settings(TrainSettings(noise_levels="uniform"))
        with pytest.raises(ValueError, match=r"noise_levels is 'x', but must be one of logit-nor"):
            TrainSettings(noise_levels="x")


class TestRefused:
    def test_a_family_without_a_recipe_is_told_which_have_one(self):
        pipe = tiny_pipelines.PIPELINES["chroma"].build()
        with pytest.raises(ValueError, match="no training recipe for Chroma; there are recipes"):
            recipe_for(pipe)
        with pytest.raises(ValueError, match=", ".join(RECIPES)):
            recipe_for(pipe)

    @pytest.mark.parametrize("kind", ["i2v", "vace"])
    def test_a_model_with_more_conditions_than_text(self, kind):
        with pytest.raises(ValueError, match="is conditioned on more than text"):
            recipe_for(tiny_wan.PIPELINES[kind]())

    @pytest.mark.parametrize(
        ("config", "line"),
        [
            ({"use_layer3d_rope": True, "use_additional_t_cond": True}, "on more than text"),
            ({"guidance_embeds": True}, "guidance scale among its inputs .guidance_embeds."),
        ],
    )
    def test_a_qwen_image_model_of_another_kind(self, config, line):
        pipe = COMPLETE["qwen-image"].build()
        pipe.transformer.register_to_config(**config)
        with pytest.raises(ValueError, match=line):
            recipe_for(pipe)

    def test_qwen_image_of_a_diffusers_without_its_mask(self, monkeypatch):
        pipe = COMPLETE["qwen-image"].build()
        kind = type(pipe.transformer)
        stock = kind.forward

        def forward(self, *args, txt_seq_lens=None, **kwargs):
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
        with pytest.raises(ValueError, match="does not hide their padding: install a newer one"):
            recipe_for(pipe)

    def test_another_pipeline_of_flux_2(self):
        pipe = tiny_complete._flux2("Flux2KleinKVPipeline")
        line = "no training recipe for Flux2KleinKVPipeline: train its model in Flux2Pipeline or "
        with pytest.raises(ValueError, match=line):
            recipe_for(pipe)

    def test_animatediff(self):
        pipe = tiny_pipelines.PIPELINES["animatediff"].build()
        with pytest.raises(ValueError, match="no training recipe for AnimateDiff"):
            recipe_for(pipe)

    def test_a_denoiser_that_is_not_there(self):
        with pytest.raises(ValueError, match="denoiser is 'unet', but WanPipeline has transformer"):
            recipe_for(tiny_complete.wan(), "unet")

    def test_a_pipeline_without_a_scheduler(self):
        pipe = tiny_complete.wan()
        pipe.scheduler = None
        with pytest.raises(ValueError, match="the model has no scheduler"):
            recipe_for(pipe)

    @pytest.mark.parametrize(
        ("build", "scheduler", "message"),
        [
            (
                tiny_complete.wan,
                diffusers.DDIMScheduler(),
                "DDIMScheduler takes the model's output for epsilon, but models of wan predict a",
            ),
            (
                tiny_complete._sd,
                diffusers.FlowMatchEulerDiscreteScheduler(),
                "takes the model's output for flow, but models of unet predict epsilon or v",
            ),
            (
                tiny_complete._sd,
                diffusers.DDIMScheduler(prediction_type="sample"),
                "the prediction_type of DDIMScheduler is 'sample', but training knows flow_",
            ),
            (
                tiny_complete._sd,
                diffusers.EDMEulerScheduler(),
                "EDMEulerScheduler has no alphas_cumprod",
            ),
        ],
    )
    def test_a_scheduler_for_other_models(self, build, scheduler, message):
        pipe = build()
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=message):
            recipe_for(pipe)

    def test_a_text_length_that_clip_cannot_have(self):
        assert recipe_for(tiny_complete._sd(), text_length=77).text_length == 77
        with pytest.raises(ValueError, match="text_length is 78, but StableDiffusionPipeline pads"):
            recipe_for(tiny_complete._sd(), text_length=78)

    def test_a_unet_with_other_additions(self):
        pipe = tiny_complete._sd()
        pipe.unet = tiny.unet(in_channels=9)
        with pytest.raises(ValueError, match="this UNet2DConditionModel is conditioned on more"):
            recipe_for(pipe)
