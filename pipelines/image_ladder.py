"""Pictures of Stable Diffusion beyond its own size: doubled and refined, size by size (SDEdit).

It is how LinFusion (arXiv 2409.02097) makes its largest pictures. A method whose cost grows with
the tokens, such as LinFusion or Agent Attention, is what makes the last sizes affordable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# Of LinFusion's public notebook, for pictures of twice, four, eight and sixteen times the size.
STRENGTHS = (0.4, 0.3, 0.2, 0.1)
STEPS = 50

# Numbers per token and channel that a block of a U-Net holds at once.
_ATTENDING = 18
_CONVOLVING = 6

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Rung:
    """One size on the way up: the picture is enlarged to it and partly made anew."""

    height: int
    width: int
    strength: float
    """Share of the denoising steps that is done, at the end of them."""


class LadderPipeline:
    """A Stable Diffusion pipeline that makes its pictures larger, size by size."""

    def __init__(self, pipe: Any) -> None:
        """Take over a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.

        It stays as it is, and what is attached to it works here, before or after.

        Raises:
            UserError: if it is another.
        """
        _image_to_image(pipe)
        self.pipe = pipe

    def __call__(
        self,
        prompt: str | None = None,
        *,
        height: int,
        width: int,
        image: Image | None = None,
        start: Size | None = None,
        start_steps: int = STEPS,
        strengths: Sequence[float] = STRENGTHS,
        steps: int = STEPS,
        seed: int = 0,
        say: Callable[[str], None] = lambda line: None,
        **call: Any,
    ) -> Image:
        """Make a large picture.

        Args:
            prompt: what it shows; None if `call` has it encoded.
            height, width: of the picture in pixels.
            image: a picture to start from; one is made when None.
            start: height and width of the one that is made; as long as the model's own on its
                shorter side when None.
            start_steps: its denoising steps.
            strengths: share of the steps that is done at each larger size; the last holds for more.
            steps: denoising steps that a strength is a share of.
            seed: of the noise, the same at each size.
            say: takes lines for the user: the memory needed, then each size.
            call: more arguments of both of diffusers' pipelines, such as `guidance_scale`.

        Raises:
            UserError: if the model cannot make a size, or a strength or size is out of range.
        """
        from diffattn.models import size_rules

        multiple = size_rules(self.pipe).spatial_multiple
        if image is not None:
            start = image.height, image.width
        start = start or first_size((height, width), native_pixels(self.pipe), multiple)
        ladder = rungs(ladder_sizes(start, (height, width), multiple), strengths, steps)
        check_sizes(self.pipe, ladder)
        samples = 2 if call.get("guidance_scale", 2) > 1 else 1
        memory = step_bytes(self.pipe, height, width, samples) / 2**30
        say(f"{_text((height, width))} will take about {memory:.2f} GiB besides the weights")
        if prompt is not None:
            call["prompt"] = prompt
        if image is None:
            say(f"{_text(start)}: made from the prompt, {start_steps} steps")
            made = self.pipe(
                height=start[0],
                width=start[1],
                num_inference_steps=start_steps,
                generator=noise_generator(seed),
                **call,
            )
            image = made.images[0]
        return refine(self.pipe, image, ladder, steps=steps, seed=seed, say=say, **call)


def ladder_sizes(start: Size, goal: Size, multiple: int) -> list[Size]:
    """Sizes from one to another: each twice the one before, but the last, which may be nearer.

    Args:
        start: height and width of the picture there is, which is not among them.
        goal: those of the last one.
        multiple: what those between are rounded to.

    Raises:
        UserError: if the goal is no larger, or of another shape.
    """
    if goal[0] <= start[0] or goal[1] <= start[1]:
        raise UserError(
            f"the picture is to be {_text(goal)}, but it starts from {_text(start)}: give a larger"
            f" --height and --width"
        )
    growth = goal[0] / start[0], goal[1] / start[1]
    if abs(growth[0] / growth[1] - 1) > 0.05:
        raise UserError(
            f"a picture of {_text(start)} cannot become {_text(goal)}, which is of another shape;"
            f" {_text((goal[0], round(goal[0] * start[1] / start[0])))} would do"
        )
    sizes: list[Size] = []
    factor = 2
    while factor < 0.999 * min(growth):
        sizes.append((_round(factor * start[0], multiple), _round(factor * start[1], multiple)))
        factor *= 2
    return [*sizes, goal]


def first_size(goal: Size, native: int, multiple: int) -> Size:
    """The size of the goal's shape whose shorter side is the model's own."""
    scale = native / min(goal)
    return _round(scale * goal[0], multiple), _round(scale * goal[1], multiple)


def native_pixels(pipe: Any) -> int:
    """Side of the square pictures that a model was trained on."""
    size = pipe.unet.config.sample_size
    return (size if isinstance(size, int) else min(size)) * pipe.vae_scale_factor


def rungs(sizes: Sequence[Size], strengths: Sequence[float], steps: int) -> list[Rung]:
    """The sizes with their strengths; the last of these holds for all sizes that come after.

    Raises:
        UserError: for a strength out of range, or one that leaves no step to do.
    """
    if not strengths:
        raise UserError("strengths is empty: give at least one number above 0, up to 1")
    for strength in strengths:
        if not 0 < strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, not {strength:g}")
        if int(steps * strength) < 1:
            raise UserError(
                f"strength {strength:g} of {steps} steps is less than one step: give more --steps"
            )
    last = len(strengths) - 1
    return [Rung(*size, strengths[min(i, last)]) for i, size in enumerate(sizes)]


def step_bytes(pipe: Any, height: int, width: int, samples: int) -> int:
    """Memory that a picture of a size takes besides the weights: an estimate, from the shapes.

    The skip connections of the U-Net are counted and, for the rest of a forward, what a block holds
    at once: where it has attention, 18 times the channels of its tokens, of which most are the
    feed-forward's hidden layer. Attention adds nothing, unless it is done by tables of all pairs.

    Args:
        height, width: pixels.
        samples: in a forward; 2 with guidance.
    """
    unet = pipe.unet
    rows, columns = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    channels = list(unet.config.block_out_channels)
    kept, most = channels[0] * rows * columns, 0
    for level, (count, block) in enumerate(zip(channels, unet.down_blocks, strict=True)):
        numbers = count * -(-rows // 2**level) * -(-columns // 2**level)
        kept += len(block.resnets) * numbers
        if level + 1 < len(channels):
            kept += -(-numbers // 4)
        most = max(most, numbers * (_ATTENDING if hasattr(block, "attentions") else _CONVOLVING))
    itemsize = next(unet.parameters()).dtype.itemsize
    # The picture as the VAE gives it, its copy in tiles, and as pixels of a file.
    picture = height * width * 3 * (4 + 4 + 1)
    return samples * (kept + most) * itemsize + picture


def refine(
    pipe: Any,
    image: Image,
    ladder: Sequence[Rung],
    *,
    steps: int = STEPS,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    **call: Any,
) -> Image:
    """Take a picture up a ladder of sizes.

    What is attached to the pipeline's U-Net stays attached, and goes through its phases at each
    size. The VAE works in tiles meanwhile; the pipeline stays as it is.

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.
        image: the picture to start from.
        ladder: the sizes in turn, from `rungs`.
        steps: denoising steps that a strength is a share of.
        seed: of the noise, the same at each size.
        say: takes a line for each size.
        call: more arguments of diffusers' image-to-image pipelines: `prompt`, `guidance_scale`, ...

    Raises:
        UserError: if the pipeline is another, or a size none that it can make.
    """
    from PIL.Image import Resampling

    refining = _image_to_image(pipe)
    check_sizes(pipe, ladder)
    vae, was_tiling = pipe.vae, pipe.vae.use_tiling
    try:
        vae.enable_tiling()
        for rung in ladder:
            say(
                f"{rung.width}x{rung.height}: strength {rung.strength:g},"
                f" {int(steps * rung.strength)} of {steps} steps"
            )
            image = refining(
                image=image.resize((rung.width, rung.height), Resampling.BICUBIC),
                strength=rung.strength,
                num_inference_steps=steps,
                generator=noise_generator(seed),
                **call,
            ).images[0]
    finally:
        vae.use_tiling = was_tiling
    return image


def _image_to_image(pipe: Any) -> Any:
    """The pipeline that makes pictures of pictures with the parts of another, and shares them."""
    from diffusers import (
        StableDiffusionImg2ImgPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLPipeline,
    )

    if isinstance(pipe, StableDiffusionXLPipeline):
        out: Any = StableDiffusionXLImg2ImgPipeline(
            **pipe.components,
            force_zeros_for_empty_prompt=pipe.config.force_zeros_for_empty_prompt,
            add_watermarker=pipe.watermark is not None,
        )
    elif isinstance(pipe, StableDiffusionPipeline):
        out = StableDiffusionImg2ImgPipeline(
            **pipe.components, requires_safety_checker=pipe.config.requires_safety_checker
        )
    else:
        raise UserError(
            f"only Stable Diffusion 1.5, 2.1 and XL can go up this ladder, not"
            f" {type(pipe).__name__}"
        )
    show_progress_alike(pipe, out)
    return out


def show_progress_alike(pipe: Any, other: Any) -> None:
    """Show the progress of another pipeline as that of `pipe` is shown."""
    other.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    if "progress_bar" in vars(pipe):  # somebody watches it
        other.progress_bar = pipe.progress_bar


def check_sizes(pipe: Any, ladder: Sequence[Rung]) -> None:
    """Raise UserError if a size is none that the model can make."""
    from diffattn.models import size_rules

    try:
        for rung in ladder:
            size_rules(pipe).check(rung.height, rung.width, 1)
    except ValueError as error:
        raise UserError(error) from None


def noise_generator(seed: int) -> Any:
    """What noise is drawn from, the same for every size."""
    import torch

    # On the CPU it gives the same noise whatever the device.
    return torch.Generator("cpu").manual_seed(seed)


def _round(pixels: float, multiple: int) -> int:
    return max(multiple, round(pixels / multiple) * multiple)


def _text(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
