"""FreeSwim: a video far beyond the size that its model was trained on, without training.

The paper is arXiv 2511.14712. A base video is made at the model's own size, or is given. The frames
are enlarged as pictures, noised, and denoised at the large size under FreeSwim's window. Attention
over all tokens guides the denoising, see `dual_path`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch

from diffattn._checks import check, choice, number
from diffattn.methods import FreeSwimAttn
from diffattn.models import SizeRules, size_rules

from .dual_path import DualPath, Guidance, StorePlace, check_place, store_bytes
from .models import FreeSwimModel, Text, check_pipeline, given_or_default, model_of

# Height and width in pixels.
PRESETS = {"1080p": (1088, 1920), "1440p": (1440, 2560), "2160p": (2160, 3840)}

INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}
# The negative prompt of the public code.
NEGATIVE_PROMPT = (
    "repeating patterns, Blurry face, low detail, distorted features, extra limbs, cartoon style,"
    " smooth plastic skin, low resolution, flat colors, lack of texture"
)

# Up to this factor nobody sees a change of the proportions: 832 x 480 is not quite 16 to 9.
_PROPORTIONS = 1.05

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FreeSwimOutput:
    """Large videos, the base videos, and what the upscaling took.

    Attributes:
        frames: the large videos, (prompts, frames, height, width, 3), float32 in [0, 1].
        base: the base videos, in the same form.
        steps: denoising steps that were made at the large size.
        guide_steps: steps among these in which all tokens see each other. A second expert begins
            with one more.
        store_bytes: memory for cross-attention between guide steps, in bytes.
    """

    frames: np.ndarray
    base: np.ndarray
    steps: int
    guide_steps: int
    store_bytes: int


class FreeSwimPipeline:
    """Generation and upscaling by FreeSwim with a stock text-to-video pipeline."""

    def __init__(self, pipe: Any) -> None:
        """Use a stock pipeline.

        A call changes nothing about the pipeline but its attention: the base video is made with a
        method that is attached, and this method is taken off before the large video.

        Args:
            pipe: a `diffusers.WanPipeline` or `diffusers.LTXPipeline`.

        Raises:
            ValueError: if `pipe` is another pipeline.
        """
        check_pipeline(pipe)
        self.pipe = pipe

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        video: np.ndarray | None = None,
        preset: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        base_height: int | None = None,
        base_width: int | None = None,
        base_steps: int = 50,
        num_inference_steps: int = 50,
        strength: float = 0.7,
        guidance_scale: float | None = None,
        negative_prompt: str | None = NEGATIVE_PROMPT,
        flow_shift: float = 9.0,
        cache_steps: int | None = 2,
        store: StorePlace = "device",
        interpolation: str = "bilinear",
        method: FreeSwimAttn | None = None,
        generator: torch.Generator | None = None,
        max_sequence_length: int | None = None,
        frame_rate: float | None = None,
        say: Callable[[str], None] = _log.info,
    ) -> FreeSwimOutput:
        """Make a large video for each prompt.

        Args:
            prompt: what the videos show.
            video: the base video, (frames, height, width, 3), uint8 or float in [0, 1]; made from
                the prompt when None. Frames past the last that the model can take are left out.
            preset: a key of `PRESETS`, instead of `height` and `width`; turned for videos that are
                higher than wide.
            height, width: pixels of the large video, rounded to a size that the model can make.
                With one side given, the other keeps the proportions; with none, both are doubled.
            num_frames: frames of the base video; the pipeline's default when None.
            base_height, base_width: pixels of the size that the model was trained on: the size of
                the base video and of the window. The pipeline's default when None.
            base_steps: denoising steps of the base video.
            num_inference_steps: steps at the large size, of which only the share `strength` is
                made, at the end. If no step remains, the enlarged base video is returned.
            strength: share of the steps that is made, above 0 and up to 1.
            guidance_scale: 1 or less for no guidance; the pipeline's default when None.
            negative_prompt: for the large size; the base video has the pipeline's default.
            flow_shift: of the noise schedule at the large size. The public code has 9 for Wan,
                whose own shifts are 3 and 5.
            cache_steps: all tokens guide once in so many steps. None: they guide in each step, and
                without the prompt too, as in the public code's slower mode.
            store: where guidance is stored for the steps that reuse it: "device", "cpu" or
                "pinned".
            interpolation: a key of `INTERPOLATIONS`.
            method: another window or temperature than FreeSwim's default for the base size.
            generator: for the noise of both sizes.
            max_sequence_length: tokens of a prompt; the pipeline's default when None.
            frame_rate: frames a second, only for LTX; the pipeline's default when None.
            say: takes one line on the sizes and one on the memory, before the work starts.

        Raises:
            ValueError: for an argument out of range; the message names what is allowed.
        """
        model = model_of(self.pipe, frame_rate)
        counts = {"num_inference_steps": num_inference_steps, "base_steps": base_steps}
        for name, count in counts.items():
            if count < model.least_steps:
                raise ValueError(f"{name} is {count}, but must be at least {model.least_steps}")
        check_refinement(strength, cache_steps, interpolation, flow_shift, store)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("there is no prompt: give at least one")
        own = partial(given_or_default, self.pipe)
        base_height, base_width = own("height", base_height), own("width", base_width)
        scale = own("guidance_scale", guidance_scale)
        length = own("max_sequence_length", max_sequence_length)
        rules = size_rules(self.pipe)
        native = rules.grid(base_height, base_width, rules.frame_offset)
        left_out = ""
        if video is not None:
            given = len(video)
            video = legal_frames(as_floats(video), rules)
            num_frames, from_size = len(video), (video.shape[1], video.shape[2])
            left_out = "" if num_frames == given else f" of {given}"
        else:
            num_frames = own("num_frames", num_frames)
            rules.check(base_height, base_width, num_frames)
            from_size = (base_height, base_width)
        asked = target_size(from_size, preset, height, width)
        size = legal_size(asked, rules)
        grid = rules.grid(*size, num_frames)
        rounded = "" if size == asked else f" (asked for {asked[1]}x{asked[0]})"
        say(
            f"{from_size[1]}x{from_size[0]} to {size[1]}x{size[0]}{rounded},"
            f" {num_frames}{left_out} frames{_stretched(from_size, asked)}"
        )
        method = method or FreeSwimAttn(native=(native.height, native.width))
        steps = min(int(num_inference_steps * strength + 1e-9), num_inference_steps)
        guides = 0 if method.is_full_on(grid) else _guide_steps(steps, cache_steps)
        kept = 0
        if guides and cache_steps is not None and cache_steps > 1:
            kept = store_bytes(model.model_at(None), grid.tokens, len(prompts))
        say(
            f"{steps} steps, {guides} of them guided by all tokens;"
            f" {kept / 2**20:.1f} MiB ({store}) keep the guidance in between"
        )

        if video is None:
            out = self.pipe(
                prompt=prompts,
                height=base_height,
                width=base_width,
                num_inference_steps=base_steps,
                guidance_scale=scale,
                generator=generator,
                max_sequence_length=length,
                output_type="np",
                **model.base_arguments(num_frames),
            )
            base = np.asarray(out.frames, np.float32)
        else:
            base = np.stack([video] * len(prompts))
        frames = np.stack([enlarge(clip, size, interpolation) for clip in base])
        if steps:
            avoid = [negative_prompt or ""] * len(prompts)
            text = model.encode_prompts(prompts, avoid, scale > 1, length)
            latents = self._encode(model, frames)
            scheduler = with_shift(self.pipe.scheduler, flow_shift)
            latents = self._refine(
                model, latents, text, scheduler, num_inference_steps, steps, scale,
                cache_steps if guides else 0, method, store, generator,
            )  # fmt: skip
            frames = self._decode(model, latents)
        self.pipe.maybe_free_model_hooks()
        return FreeSwimOutput(frames, base, steps, guides, kept)

    def _refine(
        self,
        model: FreeSwimModel,
        latents: torch.Tensor,
        text: tuple[Text, Text | None],
        scheduler: Any,
        num_inference_steps: int,
        steps: int,
        guidance_scale: float,
        cache_steps: int | None,
        method: FreeSwimAttn,
        store: StorePlace,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Noise latents and denoise them; with 0 `cache_steps` no tokens guide."""
        from diffusers.utils.torch_utils import randn_tensor

        model.set_timesteps(scheduler, num_inference_steps, latents.device)
        start = num_inference_steps - steps
        scheduler.set_begin_index(start)
        noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        sigma = scheduler.sigmas[start].to(latents)
        latents = (1 - sigma) * latents + sigma * noise
        denoiser, path = None, None
        try:
            with self.pipe.progress_bar(total=steps) as bar:
                for step, timestep in enumerate(scheduler.timesteps[start:]):
                    if model.model_at(timestep) is not denoiser:
                        # The stored outputs of one expert are of no use to the other.
                        if path is not None:
                            path.remove()
                        denoiser = model.model_at(timestep)
                        path = DualPath(denoiser, method, store)
                    assert path is not None
                    predict = partial(model.predict, denoiser)
                    call = partial(_guided, predict, path, latents, timestep)
                    with_prompt, without = _guidance_of(step, cache_steps, bool(path.store))
                    out = call(text[0], with_prompt)
                    if guidance_scale > 1:
                        assert text[1] is not None
                        unprompted = call(text[1], without)
                        out = unprompted + guidance_scale * (out - unprompted)
                    latents = scheduler.step(out, timestep, latents, return_dict=False)[0]
                    bar.update()
        finally:
            if path is not None:
                path.remove()
        return latents

    def _encode(self, model: FreeSwimModel, frames: np.ndarray) -> torch.Tensor:
        to = self.pipe._execution_device, self.pipe.vae.dtype
        pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) * 2 - 1
        latents = torch.cat([model.encode(clip[None].to(*to)) for clip in pixels]).float()
        mean, std = (x.view(1, -1, 1, 1, 1).to(latents) for x in model.statistics())
        return (latents - mean) / std

    def _decode(self, model: FreeSwimModel, latents: torch.Tensor) -> np.ndarray:
        mean, std = (x.view(1, -1, 1, 1, 1).to(latents) for x in model.statistics())
        latents = (latents * std + mean).to(self.pipe.vae.dtype)
        clips = [model.decode(clip[None]) for clip in latents]
        pixels = self.pipe.video_processor.postprocess_video(torch.cat(clips), output_type="np")
        return np.asarray(pixels, np.float32)


def _guided(
    predict: Callable[[torch.Tensor, torch.Tensor, Text], torch.Tensor],
    path: DualPath,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: Text,
    guidance: Guidance,
) -> torch.Tensor:
    """The model's prediction by the path with the window."""
    with path.guided(guidance):
        rows = latents.to(text[0].dtype).repeat(2 if path.has_two else 1, 1, 1, 1, 1)
        return predict(rows, timestep, text)[: len(latents)]


def as_floats(video: np.ndarray) -> np.ndarray:
    """Convert frames to float32 in [0, 1].

    Raises:
        ValueError: unless the frames are (frames, height, width, 3), uint8 or floats in [0, 1].
    """
    if video.ndim != 4 or video.shape[3] != 3 or not len(video):
        raise ValueError(
            f"video has shape {video.shape}, but must be frames x height x width x 3 colours"
        )
    if video.dtype == np.uint8:
        return video.astype(np.float32) / 255
    if not np.issubdtype(video.dtype, np.floating) or video.min() < 0 or video.max() > 1:
        raise ValueError("video must be uint8, or floats from 0 to 1")
    return video.astype(np.float32)


def legal_frames(video: np.ndarray, rules: SizeRules) -> np.ndarray:
    """Leave out the frames at the end that the model cannot take."""
    over = (len(video) - rules.frame_offset) % rules.frame_stride
    return video[: len(video) - over]


def target_size(
    from_size: tuple[int, int], preset: str | None, height: int | None, width: int | None
) -> tuple[int, int]:
    """The height and width in pixels that the arguments ask for.

    Raises:
        ValueError: for an unknown preset, a size below 1, or a preset and a size at once.
    """
    check_target(preset, height, width)
    if preset is not None:
        height, width = PRESETS[preset]
        return (width, height) if from_size[0] > from_size[1] else (height, width)
    if height is None and width is None:
        return 2 * from_size[0], 2 * from_size[1]
    if height is None:
        assert width is not None
        return max(1, round(from_size[0] * width / from_size[1])), width
    return height, width or max(1, round(from_size[1] * height / from_size[0]))


def check_target(preset: str | None, height: int | None, width: int | None) -> None:
    """Raise ValueError for an unknown preset, a size below 1, or a preset and a size at once."""
    if preset is not None:
        if height is not None or width is not None:
            raise ValueError("give a preset, or height and width, not both")
        check("preset", preset, choice(PRESETS))
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and pixels < 1:
            raise ValueError(f"{name} is {pixels}, but must be at least 1")


def _stretched(from_size: tuple[int, int], size: tuple[int, int]) -> str:
    """A note for the user if a change of the proportions can be seen; else nothing."""
    before, after = (width / height for height, width in (from_size, size))
    if 1 / _PROPORTIONS < after / before < _PROPORTIONS:
        return ""
    return (
        f"; the picture is stretched, from {before:.2f} times as wide as high to {after:.2f}: give"
        f" one of height and width to keep it"
    )


def legal_size(size: tuple[int, int], rules: SizeRules) -> tuple[int, int]:
    """Round a height and width to the nearest that the model can make, halves upwards."""
    unit = rules.spatial_multiple
    height, width = (max(1, (pixels + unit // 2) // unit) * unit for pixels in size)
    return height, width


def enlarge(clip: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize float frames (frames, height, width, 3) to a height and width."""
    flag = INTERPOLATIONS[interpolation]
    frames = [cv2.resize(frame, size[::-1], interpolation=flag) for frame in clip]
    # Bicubic and Lanczos interpolation leave the range of their input.
    return np.stack(frames).clip(0, 1)


def with_shift(scheduler: Any, flow_shift: float) -> Any:
    """A scheduler of the same class whose noise schedule has another shift.

    Raises:
        ValueError: if the scheduler has no shift.
    """
    # A dynamic shift is switched off: it grows with the number of tokens, without end.
    dynamic = "use_dynamic_shifting"
    fixed = {dynamic: False} if dynamic in scheduler.config else {}
    for name in ("flow_shift", "shift"):
        if name in scheduler.config:
            return type(scheduler).from_config(scheduler.config, **{name: flow_shift}, **fixed)
    raise ValueError(f"{type(scheduler).__name__} has no flow_shift to set")


def _guidance_of(step: int, cache_steps: int | None, kept: bool) -> tuple[Guidance, Guidance]:
    """The guidance of a step's two calls: with the prompt, and without."""
    if cache_steps is None:
        return "override", "override"
    if cache_steps == 0:
        return "own", "own"
    if cache_steps == 1:
        return "override", "own"
    return ("store" if step % cache_steps == 0 or not kept else "reuse"), "own"


def _guide_steps(steps: int, cache_steps: int | None) -> int:
    return steps if cache_steps is None else -(-steps // cache_steps)


def check_refinement(
    strength: float,
    cache_steps: int | None,
    interpolation: str,
    flow_shift: float,
    store: str,
) -> None:
    """Raise ValueError for a setting of the second stage that is wrong for every model."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, but must be above 0 and up to 1")
    if cache_steps is not None and cache_steps < 1:
        raise ValueError(
            f"cache_steps is {cache_steps}, but must be at least 1, or None for guidance in every"
            f" step, without the prompt too"
        )
    check("interpolation", interpolation, choice(INTERPOLATIONS))
    check("flow_shift", flow_shift, number(above=0))
    check_place(store)
