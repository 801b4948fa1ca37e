"""FreeSwim: a video far beyond the size that its model was trained on, without training.

The model's own size is made first, or a video is given; it is enlarged as a picture, noised, and
denoised at the large size under FreeSwim's window, guided by what all tokens together see.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch

from diffattn.dual_path import DualPath, Guidance, StorePlace
from diffattn.methods import FreeSwimAttn
from diffattn.models import SizeRules, size_rules

PRESETS = {"1080p": (1088, 1920), "1440p": (1440, 2560), "2160p": (2160, 3840)}
"""Height and width in pixels."""

INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}
NEGATIVE_PROMPT = (
    "repeating patterns, Blurry face, low detail, distorted features, extra limbs, cartoon style,"
    " smooth plastic skin, low resolution, flat colors, lack of texture"
)
"""What the public code asks to avoid."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FreeSwimOutput:
    """A video and how it came about; arrays are float32 in [0, 1].

    ``frames`` and ``base`` are (prompts, frames, height, width, 3): the large video and the small
    one it was made from.
    """

    frames: np.ndarray
    base: np.ndarray
    steps: int
    """Denoising steps at the large size, after strength."""
    guide_steps: int
    """Those of them in which all tokens see each other; a second expert begins with one more."""
    store_bytes: int
    """Memory for cross-attention between guide steps."""


class FreeSwimPipeline:
    """Generation and upscaling by FreeSwim with a stock text-to-video pipeline of Wan."""

    def __init__(self, pipe: Any) -> None:
        """Take a :class:`diffusers.WanPipeline`; it stays as it is between calls.

        Raises:
            ValueError: if it is another pipeline.
        """
        if type(pipe).__name__ != "WanPipeline":
            raise ValueError(f"FreeSwim upscales with a WanPipeline, not a {type(pipe).__name__}")
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
        num_frames: int = 81,
        base_height: int = 480,
        base_width: int = 832,
        base_steps: int = 50,
        num_inference_steps: int = 50,
        strength: float = 0.7,
        guidance_scale: float = 5.0,
        negative_prompt: str | None = NEGATIVE_PROMPT,
        flow_shift: float = 9.0,
        cache_steps: int | None = 2,
        store: StorePlace = "device",
        interpolation: str = "bilinear",
        method: FreeSwimAttn | None = None,
        generator: torch.Generator | None = None,
        max_sequence_length: int = 512,
        say: Callable[[str], None] = _log.info,
    ) -> FreeSwimOutput:
        """Make a large video for each prompt.

        Args:
            prompt: what the videos show.
            video: frames to start from, (frames, height, width, 3), uint8 or float in [0, 1]; made
                at the base size when None. Frames past the last that the model can take are left
                out.
            preset: a key of :data:`PRESETS`, instead of ``height`` and ``width``.
            height, width: pixels, rounded to what the model can make; with one given the other
                keeps the proportions, with none both are doubled.
            num_frames: frames of the base video.
            base_height, base_width: the size that the model was trained on: of the base video, and
                of the window.
            base_steps: denoising steps of the base video.
            num_inference_steps: steps at the large size, of which the last ``strength`` are made;
                where that is none, the enlarged video is returned.
            strength: how much is made anew, above 0 and up to 1.
            guidance_scale: none for 1 and less.
            negative_prompt: for the large size; the base video has the model's own.
            flow_shift: of the noise schedule at the large size.
            cache_steps: every so many steps all tokens guide; None for each step, and without the
                prompt too, as in the public code's slower mode.
            store: where guidance waits for the steps that reuse it.
            interpolation: a key of :data:`INTERPOLATIONS`.
            method: another window or temperature.
            generator: for the noise of both sizes.
            max_sequence_length: tokens of a prompt.
            say: takes one line on the sizes and one on the memory, before the work starts.

        Raises:
            ValueError: for an argument out of range; it names what is allowed.
        """
        _check(strength, num_inference_steps, base_steps, cache_steps, interpolation, flow_shift)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("there is no prompt: give at least one")
        rules = size_rules(self.pipe)
        native = rules.grid(base_height, base_width, rules.frame_offset)
        if video is not None:
            video = legal_frames(as_floats(video), rules)
            num_frames, from_size = len(video), (video.shape[1], video.shape[2])
        else:
            rules.check(base_height, base_width, num_frames)
            from_size = (base_height, base_width)
        asked = target_size(from_size, preset, height, width)
        size = legal_size(asked, rules)
        grid = rules.grid(*size, num_frames)
        rounded = "" if size == asked else f" (asked for {asked[1]}x{asked[0]})"
        say(f"{from_size[1]}x{from_size[0]} to {size[1]}x{size[0]}{rounded}, {num_frames} frames")
        method = method or FreeSwimAttn(native=(native.height, native.width))
        steps = min(int(num_inference_steps * strength + 1e-9), num_inference_steps)
        guides = 0 if method.is_full_on(grid) else _guide_steps(steps, cache_steps)
        kept = 0
        with ExitStack() as cleanup:
            path = DualPath(self._first_model, method, store)
            cleanup.callback(path.remove)
            if guides and cache_steps is not None and cache_steps > 1:
                kept = path.store_bytes(grid.tokens, len(prompts))
        say(
            f"{steps} steps, {guides} of them guided by all tokens;"
            f" {kept / 2**20:.1f} MiB ({store}) keep the guidance in between"
        )

        if video is None:
            base = self._generate(
                prompts, base_height, base_width, num_frames, base_steps, guidance_scale,
                generator, max_sequence_length,
            )  # fmt: skip
        else:
            base = np.stack([video] * len(prompts))
        frames = np.stack([enlarge(clip, size, interpolation) for clip in base])
        if steps:
            text = self.pipe.encode_prompt(
                prompts,
                [negative_prompt or ""] * len(prompts),
                guidance_scale > 1,
                max_sequence_length=max_sequence_length,
                device=self.pipe._execution_device,
            )
            latents = self._encode(frames)
            scheduler = with_shift(self.pipe.scheduler, flow_shift)
            latents = self._refine(
                latents, text, scheduler, num_inference_steps, steps, guidance_scale,
                cache_steps if guides else 0, method, store, generator,
            )  # fmt: skip
            frames = self._decode(latents)
        self.pipe.maybe_free_model_hooks()
        return FreeSwimOutput(frames, base, steps, guides, kept)

    @property
    def _first_model(self) -> torch.nn.Module:
        pipe = self.pipe
        model: torch.nn.Module = (
            pipe.transformer if pipe.transformer is not None else pipe.transformer_2
        )
        return model

    def _generate(
        self,
        prompts: list[str],
        height: int,
        width: int,
        num_frames: int,
        steps: int,
        guidance_scale: float,
        generator: torch.Generator | None,
        max_sequence_length: int,
    ) -> np.ndarray:
        # WanPipeline takes every number of frames for one too few if its VAE keeps them all.
        quirk = self.pipe.vae_scale_factor_temporal == 1
        out = self.pipe(
            prompt=prompts,
            height=height,
            width=width,
            num_frames=num_frames - 1 if quirk else num_frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
            max_sequence_length=max_sequence_length,
            output_type="np",
        )
        return np.asarray(out.frames, np.float32)

    def _refine(
        self,
        latents: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor | None],
        scheduler: Any,
        num_inference_steps: int,
        steps: int,
        guidance_scale: float,
        cache_steps: int | None,
        method: FreeSwimAttn,
        store: StorePlace,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Noise latents and denoise them; ``cache_steps`` of 0 is without guidance."""
        from diffusers.utils.torch_utils import randn_tensor

        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        start = num_inference_steps - steps
        scheduler.set_begin_index(start)
        noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        sigma = scheduler.sigmas[start].to(latents)
        latents = (1 - sigma) * latents + sigma * noise
        model, path = None, None
        try:
            with self.pipe.progress_bar(total=steps) as bar:
                for step, timestep in enumerate(scheduler.timesteps[start:]):
                    if self._model_at(timestep) is not model:
                        # What one expert has kept is nothing to the other.
                        if path is not None:
                            path.remove()
                        model = self._model_at(timestep)
                        path = DualPath(model, method, store)
                    assert path is not None
                    call = partial(self._predict, path, model, latents, timestep)
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

    def _predict(
        self,
        path: DualPath,
        model: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        guidance: Guidance,
    ) -> torch.Tensor:
        """Call the model, and return what the path with the window gives."""
        with path.guided(guidance):
            rows = latents.to(text.dtype).repeat(2 if path.has_two else 1, 1, 1, 1, 1)
            shape: tuple[int, ...] = (len(rows),)
            if self.pipe.config.expand_timesteps:
                patch = model.config.patch_size
                sides = zip(rows.shape[2:], patch, strict=True)
                shape = (len(rows), math.prod(size // side for size, side in sides))
            out: torch.Tensor = model(
                hidden_states=rows,
                timestep=timestep.expand(shape),
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
        return out[: len(latents)]

    def _model_at(self, timestep: torch.Tensor) -> Any:
        """The expert for a timestep, where there are two."""
        ratio = self.pipe.config.boundary_ratio
        if ratio is None or self.pipe.transformer is None:
            return self._first_model
        early = timestep >= ratio * self.pipe.scheduler.config.num_train_timesteps
        return self.pipe.transformer if early else self.pipe.transformer_2

    def _encode(self, frames: np.ndarray) -> torch.Tensor:
        vae, device = self.pipe.vae, self.pipe._execution_device
        stride = self.pipe.vae_scale_factor_temporal
        wanted = (frames.shape[1] - 1) // stride + 1
        # The encoder takes one frame and then fours, also where it keeps every frame, and leaves
        # out what is no whole four. It is causal: what follows a frame does not change it.
        missing = -(frames.shape[1] - 1) % 4
        frames = np.pad(frames, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)), mode="edge")
        pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) * 2 - 1
        clips = [clip[None].to(device, vae.dtype) for clip in pixels]
        latents = torch.cat([vae.encode(clip).latent_dist.mode() for clip in clips]).float()
        mean, std = self._statistics(latents)
        return ((latents - mean) / std)[:, :, :wanted]

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        mean, std = self._statistics(latents)
        latents = (latents * std + mean).to(self.pipe.vae.dtype)
        clips = [self.pipe.vae.decode(clip[None], return_dict=False)[0] for clip in latents]
        pixels = self.pipe.video_processor.postprocess_video(torch.cat(clips), output_type="np")
        return np.asarray(pixels, np.float32)

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std


def as_floats(video: np.ndarray) -> np.ndarray:
    """Return frames as float32 in [0, 1]."""
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
    """Return the height and width that are asked for."""
    if preset is not None:
        if height is not None or width is not None:
            raise ValueError("give a preset, or height and width, not both")
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}")
        return PRESETS[preset]
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and pixels < 1:
            raise ValueError(f"{name} is {pixels}, but must be at least 1")
    if height is None and width is None:
        return 2 * from_size[0], 2 * from_size[1]
    if height is None:
        assert width is not None
        return max(1, round(from_size[0] * width / from_size[1])), width
    return height, width or max(1, round(from_size[1] * height / from_size[0]))


def legal_size(size: tuple[int, int], rules: SizeRules) -> tuple[int, int]:
    """Round a height and width to the nearest that the model can make, up from the middle."""
    unit = rules.spatial_multiple
    height, width = (max(1, (pixels + unit // 2) // unit) * unit for pixels in size)
    return height, width


def enlarge(clip: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Return float frames at another height and width."""
    flag = INTERPOLATIONS[interpolation]
    frames = [cv2.resize(frame, size[::-1], interpolation=flag) for frame in clip]
    # Bicubic and Lanczos go beyond what they are given.
    return np.stack(frames).clip(0, 1)


def with_shift(scheduler: Any, flow_shift: float) -> Any:
    """Return a scheduler of the same kind whose noise schedule has another shift."""
    for name in ("flow_shift", "shift"):
        if name in scheduler.config:
            return type(scheduler).from_config(scheduler.config, **{name: flow_shift})
    raise ValueError(f"{type(scheduler).__name__} has no flow_shift to set")


def _guidance_of(step: int, cache_steps: int | None, kept: bool) -> tuple[Guidance, Guidance]:
    """Return the guidance of a step's calls with the prompt and without."""
    if cache_steps is None:
        return "override", "override"
    if cache_steps == 0:
        return "own", "own"
    if cache_steps == 1:
        return "override", "own"
    return ("store" if step % cache_steps == 0 or not kept else "reuse"), "own"


def _guide_steps(steps: int, cache_steps: int | None) -> int:
    return steps if cache_steps is None else -(-steps // cache_steps)


def _check(
    strength: float,
    num_inference_steps: int,
    base_steps: int,
    cache_steps: int | None,
    interpolation: str,
    flow_shift: float,
) -> None:
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, but must be above 0 and up to 1")
    counts = {"num_inference_steps": num_inference_steps, "base_steps": base_steps}
    if cache_steps is not None:
        counts["cache_steps"] = cache_steps
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, but must be at least 1")
    if interpolation not in INTERPOLATIONS:
        allowed = ", ".join(INTERPOLATIONS)
        raise ValueError(f"interpolation is {interpolation!r}, but must be one of {allowed}")
    if not flow_shift > 0:
        raise ValueError(f"flow_shift is {flow_shift}, but must be above 0")
