"""Pictures of Stable Diffusion beyond its own size: doubled and refined, size by size (SDEdit).

LinFusion (arXiv 2409.02097) makes its largest pictures this way. A method that is cheaper than
softmax attention, such as LinFusion or Agent Attention, makes the last sizes affordable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# The values of LinFusion's public notebook, for 2, 4, 8 and 16 times the size.
STRENGTHS = (0.4, 0.3, 0.2, 0.1)
STEPS = 50

# How many numbers a block of a U-Net holds at once, per token and channel: a block with attention,
# and a block of convolutions alone.
_ATTENDING = 18
_CONVOLVING = 6

# Height and width in pixels.
Size = tuple[int, int]


@dataclass(frozen=True)
class Rung:
    """One size on the way up: the picture is enlarged to this size and partly made anew.

    Attributes:
        height, width: of the picture in pixels.
        strength: share of the denoising steps that is done; the first steps are left out.
    """

    height: int
    width: int
    strength: float


class LadderPipeline:
    """A Stable Diffusion pipeline that makes its pictures larger, size by size."""

    def __init__(self, pipe: Any) -> None:
        """Use a stock pipeline, which is not changed.

        A method attached to the pipeline's U-Net works here too, attached before or later.

        Args:
            pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.

        Raises:
            UserError: if `pipe` is another pipeline.
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
            prompt: what the picture shows; None if `call` holds embeddings of the prompt.
            height, width: of the large picture in pixels.
            image: a picture to start from; when None, the first picture is made from the prompt.
            start: height and width of the first picture, ignored with `image`; when None, the
                shorter side is the model's own size.
            start_steps: denoising steps of the first picture.
            strengths: share of the denoising steps that is done at each larger size; further sizes
                take the last strength.
            steps: denoising steps that a strength is a share of.
            seed: of the noise, the same at each size.
            say: takes lines for the user: the memory needed, then each size.
            call: further arguments for both of diffusers' pipelines, from text and from an image,
                such as `guidance_scale`.

        Returns:
            The picture of `height` x `width` pixels.

        Raises:
            UserError: if the model cannot make one of the sizes, or a strength or size is out of
                range.
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
    """The sizes from a start to a goal: each doubles the size before, and the goal is the last.

    Args:
        start: height and width of the first picture, which is not among the sizes.
        goal: height and width of the last picture.
        multiple: pixels; sizes before the goal are rounded to multiples of this number.

    Raises:
        UserError: if the goal is not larger on both sides, or has another shape.
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
    """The size in the goal's shape whose shorter side is the model's own, `native`, in pixels."""
    scale = native / min(goal)
    return _round(scale * goal[0], multiple), _round(scale * goal[1], multiple)


def native_pixels(pipe: Any) -> int:
    """Side in pixels of the square pictures that a model was trained on."""
    size = pipe.unet.config.sample_size
    return (size if isinstance(size, int) else min(size)) * pipe.vae_scale_factor


def rungs(sizes: Sequence[Size], strengths: Sequence[float], steps: int) -> list[Rung]:
    """Give each size its strength; sizes beyond the last strength take the last strength.

    Raises:
        UserError: if a strength is out of range, or leaves no denoising step to do.
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
    """Estimate the memory in bytes that a picture takes in addition to the weights.

    The estimate follows from the shapes. It counts the skip connections of the U-Net and the
    largest block. A block with attention holds 18 numbers per token and channel at once, most of
    them in the feed-forward's hidden layer; a block of convolutions alone holds 6. Attention itself
    adds nothing, unless a method builds tables of all pairs.

    Args:
        pipe: the pipeline.
        height, width: of the picture in pixels.
        samples: samples in a forward; 2 with guidance.
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
    # Three copies of the picture: the VAE's output, the VAE's tiles, the pixels of the file.
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

    A method attached to the pipeline's U-Net stays attached, and goes through its schedule of steps
    at each size. The VAE works in tiles during the call; the pipeline is not changed otherwise.

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.
        image: the picture to start from.
        ladder: the sizes in turn, as `rungs` gives them.
        steps: denoising steps that a strength is a share of.
        seed: of the noise, the same at each size.
        say: takes a line for each size.
        call: further arguments of diffusers' image-to-image pipelines: `prompt`, ...

    Returns:
        The picture at the last size.

    Raises:
        UserError: if `pipe` is another pipeline, or the model cannot make one of the sizes.
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
    """The image-to-image pipeline that shares the parts of a Stable Diffusion pipeline."""
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
    """Show the progress of `other` in the way that `pipe` shows its own."""
    other.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    if "progress_bar" in vars(pipe):  # replaced on this object, as `run.progress.watched` does
        other.progress_bar = pipe.progress_bar


def check_sizes(pipe: Any, ladder: Sequence[Rung]) -> None:
    """Raise UserError if the model cannot make one of the sizes."""
    from diffattn.models import size_rules

    try:
        for rung in ladder:
            size_rules(pipe).check(rung.height, rung.width, 1)
    except ValueError as error:
        raise UserError(error) from None


def noise_generator(seed: int) -> Any:
    """A generator to draw noise from."""
    import torch

    # A generator on the CPU gives the same noise for every device.
    return torch.Generator("cpu").manual_seed(seed)


def _round(pixels: float, multiple: int) -> int:
    return max(multiple, round(pixels / multiple) * multiple)


def _text(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
