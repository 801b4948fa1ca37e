"""A Flux picture at sizes beyond the trained one: enlarged, noised and denoised, size by size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .image_ladder import show_progress_alike

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffattn import Method

# The values of CLEAR's public code (arXiv 2412.16112). That code switches off the shift that grows
# with the size; the fixed shift of Flux's scheduler remains.
SHIFT = 3.0
STRENGTH = 0.7
STEPS = 20
GUIDANCE = 7.5
NTK_FACTOR = 10
RADIUS = 16


def upscale_flux(
    pipe: Any,
    image: Image,
    sizes: Sequence[tuple[int, int]],
    *,
    method: Method | None = None,
    strength: float = STRENGTH,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
    **call: Any,
) -> Image:
    """Enlarge a picture in one or several steps, each of which draws its details anew (SDEdit).

    Every change that the call makes to the pipeline is undone at its end.

    Args:
        pipe: a `FluxPipeline`.
        image: the picture to start from, of a size that the model was trained on.
        sizes: height and width of each step in pixels; doubling is recommended.
        method: attention method of the transformer. By default a method that is attached already
            stays; where none is attached, CLEAR is attached with proportional attention and the
            position embedding for large sizes.
        strength: share of the denoising steps that is done; the first steps are left out.
        steps: denoising steps that `strength` is a share of.
        guidance_scale: scale of Flux's distilled guidance.
        call: further arguments of diffusers' `FluxImg2ImgPipeline`: `prompt`, `generator`, ...

    Returns:
        The picture at the last size.

    Raises:
        UserError: if the pipeline is not Flux, `sizes` is empty, the model cannot make one of the
            sizes, or `method` is given although a method is attached.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
    from PIL.Image import Resampling

    from diffattn import CLEARAttn, set_attn_processor
    from diffattn.attach import attached_to
    from diffattn.models import size_rules

    if not isinstance(pipe, FluxPipeline):
        raise UserError(f"only Flux can be upscaled like this, not {type(pipe).__name__}")
    if not sizes:
        raise UserError("sizes is empty: give the height and the width of at least one step")
    for height, width in sizes:
        try:
            size_rules(pipe).check(height, width, 1)
        except ValueError as error:
            raise UserError(error) from None
    keeps_method = attached_to(pipe.transformer) is not None
    if keeps_method and method is not None:
        raise UserError(
            "method is given, but the pipeline's transformer has one attached already: leave it"
            " out, or call set_attn_processor(None) before"
        )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, use_dynamic_shifting=False, shift=SHIFT
    )
    refining = FluxImg2ImgPipeline(**(pipe.components | {"scheduler": scheduler}))
    show_progress_alike(pipe, refining)
    vae, was_tiling = pipe.vae, pipe.vae.use_tiling
    if not keeps_method:
        chosen = method or CLEARAttn(
            radius=RADIUS, proportional_attention=True, ntk_factor=NTK_FACTOR
        )
        set_attn_processor(refining, chosen)
    try:
        # At the large sizes a whole picture would not fit into memory while it is en- or decoded.
        vae.enable_tiling()
        for height, width in sizes:
            image = refining(
                image=image.resize((width, height), Resampling.LANCZOS),
                height=height,
                width=width,
                strength=strength,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                **call,
            ).images[0]
    finally:
        vae.use_tiling = was_tiling
        if not keeps_method:
            set_attn_processor(refining, None)
    return image
