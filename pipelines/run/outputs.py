"""The files of a run: their names, the check that they can be written, writing all or none."""

from __future__ import annotations

import re
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, one_line
from .video import FORMATS, check_format, frames_folder

_LONGEST_SLUG = 40


@dataclass(frozen=True)
class Outputs:
    """The files of one video; the other files lie beside the video under its name."""

    video: Path

    @property
    def dense(self) -> Path:
        """The dense rendering of a comparison."""
        return self.video.with_suffix(f".dense{self.video.suffix}")

    @property
    def comparison(self) -> Path:
        """Both renderings side by side."""
        return self.video.with_suffix(f".compare{self.video.suffix}")

    @property
    def sidecar(self) -> Path:
        """The JSON record of the run."""
        return self.video.with_suffix(".json")

    def files(self, compare: bool) -> list[Path]:
        """Every path that the run creates; for the extension .png, the folders of frames."""
        videos = [self.video, self.dense, self.comparison] if compare else [self.video]
        return [*(on_disk(path) for path in videos), self.sidecar]


def on_disk(video: Path) -> Path:
    """The path that the run creates for a video: the file, or the folder of PNG frames."""
    return frames_folder(video) if video.suffix.lower() == ".png" else video


def plan_outputs(output: str | None, prompts: Sequence[str], several: bool) -> list[Outputs]:
    """Name the output of each prompt.

    Args:
        output: what the user gave: a file, a folder (an existing folder, or a name with a slash at
            the end), or None for names made from the prompts, in the current folder.
        prompts: the prompts in order.
        several: whether the prompts come from a file; names are numbered then, even for one prompt.

    Raises:
        UserError: if `output` is no folder and has no extension.
    """
    digits = max(2, len(str(len(prompts))))
    numbers = [f"{number:0{digits}d}-" if several else "" for number in range(1, len(prompts) + 1)]
    if output is None:
        return [
            _unused(Path(f"{number}{slug(prompt)}.mp4"))
            for number, prompt in zip(numbers, prompts, strict=True)
        ]
    path = Path(output).expanduser()
    if path.is_dir() or output.endswith("/"):
        return [
            Outputs(path / f"{number}{slug(prompt)}.mp4")
            for number, prompt in zip(numbers, prompts, strict=True)
        ]
    if not path.suffix:
        raise UserError(
            f"-o {output} has no extension: use {', '.join(FORMATS)}, or end it with / for a folder"
        )
    if not several:
        return [Outputs(path)]
    return [Outputs(path.with_stem(f"{path.stem}-{number[:-1]}")) for number in numbers]


def check_outputs(
    planned: Iterable[Outputs], compare: bool, fps: float | None, inputs: Iterable[Path]
) -> None:
    """Refuse outputs that could not be written, before the long run instead of after the run.

    Args:
        planned: the outputs.
        compare: whether the run makes a comparison.
        fps: frames a second of the videos; None if the model decides.
        inputs: files that no output may replace.

    Raises:
        UserError: if an output is refused.
    """
    protected = {path.expanduser().resolve() for path in inputs}
    for outputs in planned:
        check_format(outputs.video, fps)
        for path in outputs.files(compare):
            if path.resolve() in protected:
                raise UserError(f"-o {outputs.video} would overwrite {path}, which is read here")
            _check_target(path, outputs)
        check_writable(outputs.video.parent)


@contextmanager
def staged(outputs: Outputs, kept: list[Path]) -> Iterator[Path]:
    """Yield a folder to write files in; at the end all files move to their places, or all vanish.

    The folder lies beside the outputs, so that a move is a renaming. After the moves the path of
    the video is added to `kept`.

    Raises:
        UserError: if a file cannot be written.
    """
    folder = Path(tempfile.mkdtemp(prefix=".diffattn-", dir=outputs.video.parent))
    try:
        yield folder
        with _interrupts_wait():
            for path in sorted(folder.iterdir()):
                target = outputs.video.parent / path.name
                if target.is_dir():
                    shutil.rmtree(target)
                path.rename(target)
            kept.append(on_disk(outputs.video))
    except OSError as error:
        raise UserError(f"cannot write {outputs.video}: {one_line(error)}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def slug(prompt: str) -> str:
    """A short file name made of a prompt's words."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words[:_LONGEST_SLUG].strip("-") or "video"


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done."""
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt


def _unused(path: Path) -> Outputs:
    """Number a name made from the prompt until no file has that name."""
    outputs, number = Outputs(path), 1
    while any(file.exists() for file in outputs.files(compare=True)):
        number += 1
        outputs = Outputs(path.with_stem(f"{path.stem}-{number}"))
    return outputs


def _check_target(path: Path, outputs: Outputs) -> None:
    frames = outputs.video.suffix.lower() == ".png" and path != outputs.sidecar
    if not frames:
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
        return
    if path.is_file():
        raise UserError(f"cannot write frames to the folder {path}: it is a file")
    if path.is_dir() and any(not _is_frame(item) for item in path.iterdir()):
        raise UserError(f"cannot write frames to {path}: the folder holds other files")


def _is_frame(path: Path) -> bool:
    return re.fullmatch(r"frame_\d+\.png", path.name) is not None


def check_writable(folder: Path) -> None:
    """Make the folder if there is none; raise UserError if it takes no file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
