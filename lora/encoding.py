"""Encoding of a folder of clips with captions, once for all trainings on these clips."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffattn.lora.cache import (
    CachedClips,
    entry_key,
    fingerprint,
    is_stored,
    open_folder,
    seed_of,
    store,
    write_index,
)
from diffattn.lora.captions import CaptionedClip
from diffattn.lora.clips import ClipError, read_shot
from diffattn.lora.errors import LoraError
from diffattn.lora.recipes import Recipe
from diffattn.models import size_rules

# Part of every key of this module; to be raised when the encoding changes.
_FORMAT = 3

# The components that determine the encoding of a prompt.
_TEXT_PARTS = (
    "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3",
)  # fmt: skip


def prepare(
    pipe: Any,
    recipe: Recipe,
    clips: Sequence[CaptionedClip],
    folder: Path,
    height: int,
    width: int,
    num_frames: int = 1,
    fps: float | None = None,
    seed: int = 0,
    tiling: bool = True,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> CachedClips:
    """Encode the clips and captions that are not encoded yet.

    Only one process at a time may encode. A process that finds everything encoded writes nothing.

    Args:
        pipe: the pipeline with its VAE and text encoders.
        recipe: the recipe of the pipeline.
        clips: the clips to encode.
        folder: the folder of the data set; may hold other clips, and clips of a stopped run.
        height, width: pixels of the encoded clips.
        num_frames: frames of the encoded clips; 1 for pictures.
        fps: frames a second to take; every frame when None.
        seed: seed of the samples from the VAE's posterior.
        tiling: whether the VAE encodes clips that are larger than its tiles (256 to 512 pixels for
            most video models) in overlapping tiles. HunyuanVideo's needs 2 GiB instead of 20 at
            1280x720 and 129 frames. Latents differ a little at the seams.
        report: called with a line for each clip that is skipped because it cannot be read or is too
            short, or that is shown on white because parts of it are transparent.
        progress: called with the number of finished clips and the number of all clips.

    Returns:
        The data set; all clips have the same shape.

    Raises:
        LoraError: if the pipeline has no VAE or text encoder, the model cannot make the size, no
            clip can be used, or `folder` cannot be written to.
    """
    if pipe.vae is None:
        raise LoraError(f"{type(pipe).__name__} has no VAE to encode clips: load it with its vae")
    check_size(pipe, height, width, num_frames)
    if fps is not None and not fps > 0:
        raise LoraError(f"fps is {fps:g}, but must be above 0")
    if bad := [clip.path for clip in clips if (clip.source is not None) != recipe.edits]:
        what = "has no source" if recipe.edits else "has a source"
        raise LoraError(
            f"{bad[0]} {what}, but this {recipe.family} model"
            f" {'edits' if recipe.edits else 'does not edit'} pictures"
        )
    text = text_identity(pipe, recipe)
    open_folder(folder)
    settings = {
        "format": _FORMAT,
        "size": [height, width, num_frames],
        "fps": fps,
        "seed": seed,
        "text": text,
        "vae": fingerprint(pipe.vae),
        "tiling": tiling,
    }
    keys: list[str] = []
    with in_tiles(pipe.vae, tiling):
        for done, clip in enumerate(clips, start=1):
            try:
                content = _digest(clip.path)
                about_clip = {"content": content, "caption": clip.caption}
                if clip.source is not None:
                    about_clip["source"] = _digest(clip.source)
                key = entry_key(settings | about_clip)
                if not is_stored(folder, key):
                    say = partial(_report_about, report, clip.path)
                    shot = read_shot(clip.path, height, width, num_frames, fps, say)
                    generator = torch.Generator().manual_seed(seed_of(key))
                    latents = recipe.encode_clip(pipe, shot.frames[None], generator)
                    if not latents.isfinite().all():
                        raise ClipError(
                            f"the VAE gives NaN or infinity for it in {_name(pipe.vae.dtype)}"
                        )
                    told = _encode_conditions(pipe, recipe, clip, height, width, say)
                    told |= recipe.encode_origin(shot.rate, shot.size, shot.crop)
                    about = {"caption": clip.caption, "source": clip.path.name}
                    store(folder, key, latents, told, about)
                keys.append(key)
            except ClipError as error:
                report(f"skipped {clip.path}: {error}")
            progress(done, len(clips))
    if not keys:
        raise LoraError(f"none of the {len(clips)} clips can be used for {num_frames} frames")
    empty = store_empty(pipe, recipe, folder, text)
    facts = {"family": recipe.family, "size": [height, width, num_frames], "fps": fps}
    write_index(folder, keys, empty, facts)
    return CachedClips(folder)


@contextmanager
def in_tiles(vae: Any, tiling: bool) -> Iterator[None]:
    """Have a VAE work on large pictures and videos in tiles while the block runs, or not."""
    before = getattr(vae, "use_tiling", tiling)  # a VAE that knows no tiles stays as it is
    if before != tiling:
        _set_tiling(vae, tiling)
    try:
        yield
    finally:
        if before != tiling:
            _set_tiling(vae, before)


def _set_tiling(vae: Any, tiling: bool) -> None:
    if tiling:
        vae.enable_tiling()
    else:
        vae.disable_tiling()


def check_size(pipe: Any, height: int, width: int, num_frames: int) -> None:
    """Raise LoraError, naming the nearest legal sizes, if the model cannot make a size."""
    try:
        size_rules(pipe).check(height, width, num_frames)
    except ValueError as error:
        raise LoraError(error) from None


def text_identity(pipe: Any, recipe: Recipe) -> str:
    """A hash of everything that determines the encoding of a prompt.

    Raises:
        LoraError: if the pipeline has no text encoder.
    """
    parts: list[Any] = [getattr(pipe, name, None) for name in _TEXT_PARTS]
    encoders = [part for part in parts if isinstance(part, torch.nn.Module)]
    if not encoders:
        raise LoraError(
            f"{type(pipe).__name__} has no text encoder to encode captions: load it with its"
            f" text_encoder and tokenizer"
        )
    words = [{"words": entry_key(p.get_vocab())} for p in parts if hasattr(p, "get_vocab")]
    about: dict[str, Any] = {"family": recipe.family, "length": recipe.text_length}
    if recipe.edits:
        about["edits"] = True
    return fingerprint(*encoders, *words, about)


def store_empty(pipe: Any, recipe: Recipe, folder: Path, text: str) -> str:
    """Encode and store the empty prompt, which replaces dropped captions.

    Args:
        pipe: the pipeline.
        recipe: the recipe of the pipeline.
        folder: the folder of the data set.
        text: the result of `text_identity`.

    Returns:
        The key of the entry.
    """
    key = entry_key({"format": _FORMAT, "text": text, "caption": ""})
    if not is_stored(folder, key):
        told = _finite(recipe.encode_empty(pipe), "")
        store(folder, key, None, told, {"caption": ""})
    return key


def encode_caption(pipe: Any, recipe: Recipe, caption: str) -> dict[str, torch.Tensor]:
    """The denoiser's conditions for a caption, with a batch axis of 1.

    Raises:
        LoraError: if the conditions are not finite.
    """
    return _finite(recipe.encode_prompt(pipe, [caption]), caption)


def _encode_conditions(
    pipe: Any,
    recipe: Recipe,
    clip: CaptionedClip,
    height: int,
    width: int,
    say: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    if clip.source is None:
        return encode_caption(pipe, recipe, clip.caption)
    try:
        shot = read_shot(clip.source, *recipe.source_size(height, width), note=say)
    except ClipError as error:
        raise ClipError(f"its source {clip.source}: {error}") from None
    told = recipe.encode_source(pipe, shot.frames[None], clip.caption)
    return _finite(told, clip.caption)


def _finite(told: dict[str, torch.Tensor], caption: str) -> dict[str, torch.Tensor]:
    for name, value in told.items():
        if not value.isfinite().all():
            raise LoraError(
                f"the text encoder gives NaN or infinity for the caption {caption!r}, as {name} in"
                f" {_name(value.dtype)}: load it in float32 or bfloat16"
            )
    return told


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _report_about(report: Callable[[str], None], path: Path, line: str) -> None:
    report(f"{path}: {line}")


def _digest(path: Path) -> str:
    """A hash of a file's content."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ClipError(f"cannot read it: {error.strerror}") from None
