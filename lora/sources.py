"""The pictures that clips were edited from: files of the same names in a folder of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffattn.lora.captions import CaptionedClip
from diffattn.lora.errors import LoraError
from diffattn.lora.frames import IMAGES

FOLDER = "sources"


def apart_from_sources(folder: Path, paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The clips in a folder, and the files in the folder's `sources` folder.

    Args:
        folder: the folder of the clips.
        paths: files in this folder, from `find_clips`.

    Raises:
        LoraError: if all the files, or none, are in the `sources` folder.
    """
    sources = [path for path in paths if path.relative_to(folder).parts[0] == FOLDER]
    clips = [path for path in paths if path not in set(sources)]
    if not sources or not clips:
        empty = folder if sources else folder / FOLDER
        raise LoraError(
            f"there are no pictures in {empty}: for a model that edits, {folder} holds the edited"
            f" pictures with their captions (the instructions), and {FOLDER} in it holds for each"
            f" the picture before, of the same name"
        )
    return clips, sources


def with_sources(
    folder: Path, clips: Sequence[CaptionedClip], sources: Sequence[Path]
) -> tuple[list[CaptionedClip], list[Path]]:
    """Clips with the pictures that they were edited from.

    A source has the name of a clip, and may end otherwise: `a/1.png` is from `sources/a/1.jpg`.

    Args:
        folder: the folder of the clips.
        clips: clips in this folder.
        sources: the files in the folder's `sources` folder.

    Returns:
        The clips, and the sources that no clip is from.

    Raises:
        LoraError: if a clip has no source or several, or a source is a video.
    """
    by_name: dict[Path, Path] = {}
    for path in sources:
        name = path.relative_to(folder / FOLDER).with_suffix("")
        if name in by_name:
            raise LoraError(
                f"{by_name[name].name} and {path.name} in {path.parent} have one name: remove one"
            )
        if path.suffix.lower() not in IMAGES:
            raise LoraError(f"{path} is no picture; sources end in {', '.join(IMAGES)}")
        by_name[name] = path
    found = []
    for clip in clips:
        name = clip.path.relative_to(folder).with_suffix("")
        source = by_name.pop(name, None)
        if source is None:
            wanted = folder / FOLDER / name
            raise LoraError(
                f"{clip.path} has no picture that it was edited from: put that to {wanted}.png, or"
                f" another kind of picture of this name"
            )
        found.append(replace(clip, source=source))
    return found, list(by_name.values())
