"""The ladder of sizes on tiny Stable Diffusion pipelines: sizes, strengths, phases, no trace."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_complete import COMPLETE

import diffattn
from diffattn import AgentAttn, DenseAttn, LinFusionAttn
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.image_ladder import (
    STRENGTHS,
    LadderPipeline,
    Rung,
    first_size,
    ladder_sizes,
    native_pixels,
    refine,
    rungs,
    step_bytes,
)


def picture(height: int = 24, width: int = 32) -> Image.Image:
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def build(name: str) -> Any:
    pipe = COMPLETE[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=[name for name in COMPLETE if name.startswith(("sd1", "sdxl"))])
def pipe(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.mark.parametrize(
    ("start", "goal", "sizes"),
    [
        # The public notebook's, and the paper's 16K.
        ((512, 1024), (8192, 16384), [(1024, 2048), (2048, 4096), (4096, 8192), (8192, 16384)]),
        ((1024, 1024), (1536, 1536), [(1536, 1536)]),
        ((512, 768), (1536, 2304), [(1024, 1536), (1536, 2304)]),
        ((512, 520), (2048, 2080), [(1024, 1040), (2048, 2080)]),
    ],
)
def test_sizes_double(start: Any, goal: Any, sizes: list[Any]) -> None:
    assert ladder_sizes(start, goal, 8) == sizes
    assert [rung.strength for rung in rungs(sizes, STRENGTHS, 50)] == [0.4, 0.3, 0.2, 0.1][
        : len(sizes)
    ]


def test_a_long_ladder_ends_with_the_last_strength() -> None:
    assert rungs([(8, 8), (16, 16), (32, 32)], (0.5, 0.25), 4)[1:] == [
        Rung(16, 16, 0.25),
        Rung(32, 32, 0.25),
    ]


def test_the_first_size_has_the_shape_of_the_last() -> None:
    assert first_size((8192, 16384), 512, 8) == (512, 1024)
    assert first_size((2048, 3080), 1024, 16) == (1024, 1536)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ladder_sizes((64, 64), (64, 128), 8), "to be 128x64, but it starts from 64x64: g"),
        (
            lambda: ladder_sizes((64, 64), (128, 256), 8),
            "a picture of 64x64 cannot become 256x128, which is of another shape; 128x128 would do",
        ),
        (lambda: rungs([(8, 8)], (), 50), "strengths is empty"),
        (
            lambda: rungs([(8, 8)], (0.5, 1.5), 50),
            "strength must be above 0 and at most 1, not 1.5",
        ),
        (lambda: rungs([(8, 8)], (0.1,), 9), "strength 0.1 of 9 steps is less than one step"),
    ],
)
def test_bad_ladders(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_each_size_is_what_diffusers_makes_of_the_one_before(pipe: Any) -> None:
    import diffusers

    xl = isinstance(pipe, diffusers.StableDiffusionXLPipeline)
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if xl else None
    other = (kind or diffusers.StableDiffusionImg2ImgPipeline).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    was = pipe.vae.use_tiling
    other.vae.enable_tiling()
    want = picture()
    for size, strength in (((64, 48), 0.5), ((128, 96), 0.25)):
        want = other(
            "a cat",
            image=want.resize(size, Image.Resampling.BICUBIC),
            strength=strength,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(5),
        ).images[0]
    pipe.vae.use_tiling = was
    said: list[str] = []
    ladder = rungs(ladder_sizes((24, 32), (96, 128), 4), (0.5, 0.25), 4)
    out = refine(pipe, picture(), ladder, steps=4, seed=5, say=said.append, prompt="a cat")
    assert out.size == (128, 96)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(want))
    assert pipe.vae.use_tiling == was
    assert said == ["64x48: strength 0.5, 2 of 4 steps", "128x96: strength 0.25, 1 of 4 steps"]


def test_the_pipeline_makes_its_first_picture_itself() -> None:
    pipe = build("sdxl")
    call: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": "a dog"}
    first = pipe(
        "a cat",
        height=24,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        **call,
    ).images[0]
    said: list[str] = []
    out = LadderPipeline(pipe)(
        "a cat",
        height=48,
        width=64,
        start_steps=2,
        strengths=(0.5,),
        steps=4,
        seed=7,
        say=said.append,
        **call,
    )
    want = refine(pipe, first, [Rung(48, 64, 0.5)], steps=4, seed=7, prompt="a cat", **call)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(want))
    assert said[0].startswith("64x48 will take about 0.0")
    assert said[1:] == [
        "32x24: made from the prompt, 2 steps",
        "64x48: strength 0.5, 2 of 4 steps",
    ]


def test_a_method_goes_through_its_phases_at_each_size() -> None:
    pipe = build("sd1.5")
    attachment = diffattn.set_attn_processor(pipe, AgentAttn())
    sites = attachment.sites
    counts = [(0, 0)]

    def count(line: str) -> None:
        counts.append((attachment.sparse_calls, attachment.dense_calls))

    ladder = rungs([(48, 48), (96, 96)], (1.0, 0.5), 10)
    refine(pipe, picture(24, 24), ladder, steps=10, say=count, prompt="a cat")
    count("")
    # 40 % of the steps that are done have agents: of ten 4, of five 2; PNDM makes one more.
    made = [
        tuple((b - a) // sites for a, b in zip(*pair, strict=True))
        for pair in itertools.pairwise(counts[1:])
    ]
    assert [sum(pair) for pair in made] == [11, 6]
    assert [pair[0] for pair in made] == [5, 3]
    diffattn.set_attn_processor(pipe, None)


def test_linfusion_goes_up_too() -> None:
    pipe = build("sd1.5")
    attachment = diffattn.set_attn_processor(pipe, LinFusionAttn())
    out = refine(pipe, picture(24, 24), rungs([(48, 48)], (0.5,), 4), steps=4, prompt="a cat")
    assert out.size == (48, 48)
    assert attachment.sparse_calls > 0
    assert attachment.dense_calls == 0
    diffattn.set_attn_processor(pipe, None)


def test_dense_method_changes_nothing() -> None:
    pipe = build("sd1.5")
    ladder = rungs([(48, 48)], (0.5,), 4)
    want = np.asarray(refine(pipe, picture(24, 24), ladder, steps=4, prompt="a cat"))
    diffattn.set_attn_processor(pipe, DenseAttn())
    out = np.asarray(refine(pipe, picture(24, 24), ladder, steps=4, prompt="a cat"))
    assert np.abs(out.astype(int) - want.astype(int)).max() <= 1
    diffattn.set_attn_processor(pipe, None)


def test_memory_is_linear_in_the_pixels_and_near_what_a_forward_takes() -> None:
    pipe = build("sd1.5")
    native = native_pixels(pipe)
    assert native == 24
    small, large = (step_bytes(pipe, size, size, 2) for size in (256, 512))
    assert large == pytest.approx(4 * small, rel=1e-3)
    rows = 64
    text = torch.zeros(2, 77, 16)
    with (
        torch.no_grad(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        pipe.unet(torch.zeros(2, 4, rows, rows), 3, text)
    results = profile.profiler.kineto_results
    changes = sorted(
        (e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    live = np.cumsum([e.nbytes() for e in changes])
    estimate = step_bytes(pipe, 2 * rows, 2 * rows, 2) - 9 * 3 * (2 * rows) ** 2
    assert 0.7 < estimate / live.max() < 2


def test_the_pipeline_stays_as_it_is_when_it_fails() -> None:
    pipe = build("sd1.5")
    with pytest.raises(UserError, match=r"height is 101, but this model needs a multiple of 2"):
        refine(pipe, picture(), [Rung(101, 64, 0.5)], prompt="a cat")
    with pytest.raises(ValueError, match="`prompt` has to be of type"):
        refine(pipe, picture(), [Rung(48, 64, 0.5)], prompt=3)
    assert not pipe.vae.use_tiling


def test_other_pipelines_are_refused() -> None:
    pipe = COMPLETE["wan"].build()
    with pytest.raises(
        UserError, match=r"only Stable Diffusion 1.5, 2.1 and XL .* not WanPipeline"
    ):
        refine(pipe, picture(), [Rung(48, 64, 0.5)], prompt="a cat")
    with pytest.raises(UserError, match="not WanPipeline"):
        LadderPipeline(pipe)
