"""The files of a run: their names, the check that they can be written, writing all or none.

Two kinds of hidden entries lie beside the outputs while a run lives: the folder in which its files
are written, and an empty file that claims a name. The run holds a lock on each. An entry without a
lock is left over from a killed run, and the next run removes the entry.
"""

from __future__ import annotations

import re
import shutil
import signal
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from diffattn._checks import did_you_mean
from diffattn._locks import Lock, alone, lock_existing, lock_file

from ..errors import UserError, one_line
from .processes import rank
from .sidecar import describes, is_record
from .video import FORMATS, check_format, frames_folder

PICTURE_FORMATS = (".png", ".jpg", ".jpeg", ".webp")

_LONGEST_SLUG = 40
_STAGING = ".diffattn-staging-"
_CLAIM = ".diffattn-name-"


class Claim:
    """A name that no other run takes before this one has written its files, or ends."""

    def __init__(self, lock: Lock) -> None:
        self._end = weakref.finalize(self, lock.remove)

    def release(self) -> None:
        """Let others have the name."""
        self._end()


@dataclass(frozen=True)
class Outputs:
    """The files of one video or picture; the other files lie beside it under its name.

    Attributes:
        video: the video or the picture.
        claim: holds the name, if the name was chosen here.
        picture: whether the file is a picture: .png is one file then, not a folder of frames.
    """

    video: Path
    claim: Claim | None = field(default=None, compare=False)
    picture: bool = False

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
        """The JSON record of the run: every file has a record of its own."""
        return self.video.with_name(f"{self.video.name}.json")

    def files(self, compare: bool) -> list[Path]:
        """Every path that the run creates; for the extension .png, the folders of frames."""
        videos = [self.video, self.dense, self.comparison] if compare else [self.video]
        return [*(self.on_disk(path) for path in videos), self.sidecar]

    def on_disk(self, path: Path) -> Path:
        """The path that the run creates for one of its videos or pictures."""
        return path if self.picture else on_disk(path)


def on_disk(video: Path) -> Path:
    """The path that the run creates for a video: the file, or the folder of PNG frames."""
    return frames_folder(video) if video.suffix.lower() == ".png" else video


def plan_outputs(
    output: str | None, prompts: Sequence[str], several: bool, seed: int, pictures: bool = False
) -> list[Outputs]:
    """Name the output of each prompt.

    Args:
        output: what the user gave: a file, a folder (an existing folder, or a name with a slash at
            the end), or None for names made from the prompts, in the current folder.
        prompts: the prompts in order.
        several: whether the prompts come from a file; names are numbered then, even for one prompt.
        seed: of the runs; part of the names in a folder.
        pictures: whether the outputs are pictures.

    Raises:
        UserError: if `output` is no folder and has no extension, or cannot be a name.
    """
    digits = max(2, len(str(len(prompts))))
    numbers = [f"{number:0{digits}d}-" if several else "" for number in range(1, len(prompts) + 1)]
    suffix = ".png" if pictures else ".mp4"
    if output is None:
        return [
            new_outputs(f"{number}{slug(prompt)}{suffix}", pictures)
            for number, prompt in zip(numbers, prompts, strict=True)
        ]
    path = given_path(output)
    if path.is_dir() or output.endswith("/"):
        return [
            Outputs(
                path / name_in_folder(f"{number}{slug(prompt)}", seed, suffix), picture=pictures
            )
            for number, prompt in zip(numbers, prompts, strict=True)
        ]
    if not path.suffix:
        raise UserError(
            f"-o {output} has no extension: use"
            f" {', '.join(PICTURE_FORMATS if pictures else FORMATS)}, or end it with / for a folder"
        )
    if not several:
        return [Outputs(path, picture=pictures)]
    return [
        Outputs(path.with_stem(f"{path.stem}-{number[:-1]}"), picture=pictures)
        for number in numbers
    ]


def name_in_folder(stem: str, seed: int, suffix: str) -> str:
    """The name of a file in a folder that the user gave: other seeds have other names."""
    return f"{stem}-seed{seed}{suffix}"


def given_path(output: str) -> Path:
    """The path that the user gave.

    Raises:
        UserError: if no file can have this path.
    """
    path = Path(output).expanduser()
    try:
        output.encode()
        path.is_dir()
    except UnicodeEncodeError:
        raise UserError(f"-o {output!r} is no UTF-8 text: choose another name") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"-o {output[:60]}... cannot be a path: {reason}") from None
    return path


def new_outputs(name: str, picture: bool = False) -> Outputs:
    """Claim a name in the current folder, numbered until no file and no living run has the name.

    Of several processes that make one video, the first alone writes, and claims.
    """
    path, number = Path(name), 1
    while True:
        outputs = Outputs(path, picture=picture)
        if not _exists(outputs) and not rank():
            claim = _claim(outputs)
            # A run that has just ended may have written its files before the claim was made.
            if claim is not None and not _exists(outputs):
                return Outputs(path, claim, picture)
        elif not _exists(outputs):
            return outputs
        number += 1
        path = Path(name).with_stem(f"{Path(name).stem}-{number}")


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
        if outputs.picture:
            check_picture_format(outputs.video)
        else:
            check_format(outputs.video, fps)
        for path in outputs.files(compare):
            if path.resolve() in protected:
                raise UserError(f"-o {outputs.video} would overwrite {path}, which is read here")
            _check_target(path, outputs)
        check_replaceable(outputs.sidecar, outputs.video)
        check_writable(outputs.video.parent)


def check_picture_format(path: Path) -> None:
    """Raise UserError, before anything is rendered, for a file that is no picture by its name."""
    suffix = path.suffix.lower()
    if suffix not in PICTURE_FORMATS:
        hint = did_you_mean(suffix, PICTURE_FORMATS)
        raise UserError(
            f"cannot write {path}: the extension must be"
            f" {', '.join(PICTURE_FORMATS[:-1])} or {PICTURE_FORMATS[-1]}{hint}"
        )


@contextmanager
def staged(outputs: Outputs, kept: list[Path]) -> Iterator[Path]:
    """Yield a folder to write files in; at the end all files move to their places, or all vanish.

    The folder lies beside the outputs, so that a move is a renaming. After the moves the path of
    the video is added to `kept`.

    Raises:
        UserError: if a file cannot be written.
    """
    parent = outputs.video.parent
    try:
        folder, lock = _staging_folder(parent)
        try:
            yield folder
            with _interrupts_wait(), alone(parent):
                _move(folder, outputs)
                kept.append(outputs.on_disk(outputs.video))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
            if outputs.claim is not None:
                outputs.claim.release()
    except OSError as error:
        raise UserError(f"cannot write {outputs.video}: {one_line(error)}") from None


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


def _staging_folder(parent: Path) -> tuple[Path, Lock]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=parent))
        # Another run may take the folder for a left-over before the lock is held.
        if (lock := lock_existing(folder)) is not None:
            return folder, lock


def _move(folder: Path, outputs: Outputs) -> None:
    """Move the files of a folder to their places, the record last.

    A record that described the former video is taken away before: no record ever lies beside a
    video that the record does not describe.
    """
    parent, record = outputs.video.parent, folder / outputs.sidecar.name
    new = [path for path in sorted(folder.iterdir()) if path != record]
    if record.exists():
        check_replaceable(outputs.sidecar, outputs.video)
    former = folder / ".former"
    former.mkdir()
    # Records of earlier versions have the name of the video without its extension.
    old = [outputs.sidecar, outputs.video.with_suffix(".json")]
    moved = [path for path in old if describes(path, outputs.video.name)]
    for path in moved:
        path.rename(former / path.name)
    try:
        for path in new:
            target = parent / path.name
            if target.is_dir():
                target.rename(former / target.name)
                moved.append(target)
            path.rename(target)
        if record.exists():
            record.rename(outputs.sidecar)
    except OSError:
        for path in moved:
            if not path.exists():
                (former / path.name).rename(path)
        raise


def _exists(outputs: Outputs) -> bool:
    return any(file.exists() for file in outputs.files(compare=True))


def _claim(outputs: Outputs) -> Claim | None:
    """Claim a name; None if a living run has the name."""
    path = outputs.video.parent / f"{_CLAIM}{outputs.video.name}"
    try:
        lock = lock_file(path)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}") from None
    return None if lock is None else Claim(lock)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs have left in a folder; living runs hold locks."""
    for path in folder.glob(f"{_STAGING}*"):
        if path.is_dir() and (lock := lock_existing(path)) is not None:
            if lock.certain:
                shutil.rmtree(path, ignore_errors=True)
            lock.release()
    for path in folder.glob(f"{_CLAIM}*"):
        # A file with content is none of ours.
        if path.is_file() and (lock := lock_existing(path)) is not None:
            if lock.certain and path.stat().st_size == 0:
                path.unlink(missing_ok=True)
            lock.release()


def check_replaceable(record: Path, output: Path) -> None:
    """Raise UserError if the record of an output would overwrite a file that is no record."""
    if record.is_file() and not is_record(record):
        raise UserError(
            f"-o {output} would overwrite {record}, which is no record of diffattn: move it, or"
            f" choose another name"
        )


def _check_target(path: Path, outputs: Outputs) -> None:
    folder = outputs.video.suffix.lower() == ".png" and not outputs.picture
    if not folder or path == outputs.sidecar:
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
    """Make the folder if there is none, and remove what killed runs have left in it.

    Raises:
        UserError: if the folder takes no file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        with suppress(PermissionError):
            _remove_leftovers(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
