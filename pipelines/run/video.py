"""Writing frames: MP4 through ffmpeg, GIF, or a folder of PNG files; each file is read back."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffattn._checks import did_you_mean
from diffattn.lora.ffmpeg import FfmpegError, is_hd, run

from ..errors import UserError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = (".mp4", ".gif", ".png")

# A GIF's delay is a whole number of 1/100 s, of 16 bits, and players slow delays below 2/100 s
# down.
_FASTEST_GIF = 50
_SLOWEST_GIF = 100 / 65535

# Constant quality of libx264: no visible loss.
_QUALITY = "10"


def check_format(path: Path, fps: float | None) -> None:
    """Raise UserError, before anything is rendered, for a file that `write_video` cannot write."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        hint = did_you_mean(suffix, FORMATS)
        raise UserError(
            f"cannot write {path}: the extension must be {', '.join(FORMATS[:-1])} or "
            f"{FORMATS[-1]}{hint}"
        )
    if suffix == ".mp4":
        _check_ffmpeg()
    if suffix == ".gif" and fps is not None:
        if fps > _FASTEST_GIF:
            raise UserError(
                f"a GIF shows at most {_FASTEST_GIF} frames a second, not --fps {fps:g}"
            )
        if fps < _SLOWEST_GIF:
            raise UserError(
                f"a GIF shows a frame for at most 655 s: --fps must be at least"
                f" {_SLOWEST_GIF:.4f}, not {fps:g}"
            )


def frames_folder(path: Path) -> Path:
    """The folder that holds the frames of a `path` with extension .png."""
    return path.with_suffix("")


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames in the format that the extension names, and read the file back.

    A `path` with extension .png names the folder that takes `frame_0000.png` and so on; the
    folder must not exist.

    Args:
        path: the file.
        frames: (count, height, width, 3), uint8.
        fps: frames a second.

    Raises:
        UserError: if ffmpeg fails, or the file does not hold as many frames of the size.
    """
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png}
    writers[path.suffix.lower()](path, frames, fps)


def write_picture(path: Path, image: Image) -> None:
    """Write a picture of Pillow in the format that the extension names, and read the file back.

    Raises:
        UserError: if the file does not hold a picture of the size.
    """
    image.save(path)
    check_picture(path, image.size)


def _check_ffmpeg() -> None:
    """Have ffmpeg encode one frame into nothing: it may be missing, or lack the codec."""
    try:
        run([*_raw(16, 16, 25), *_encoding(16, 16), "-f", "null", "-"], [bytes(16 * 16 * 3)])
    except FfmpegError as error:
        raise UserError(
            f"no working ffmpeg for MP4 files: pip install imageio-ffmpeg, point"
            f" IMAGEIO_FFMPEG_EXE at one, or write .gif or .png ({error})"
        ) from None


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    # yuv420p, the only form all players read, halves the colours: it needs even sides.
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    height, width = frames.shape[1] + odd_rows, frames.shape[2] + odd_columns
    padding = ((0, odd_rows), (0, odd_columns), (0, 0))
    feed = (np.pad(frame, padding, mode="edge").tobytes() for frame in frames)
    arguments = [*_raw(height, width, fps), *_encoding(height, width), "-y", f"file:{path}"]
    try:
        run(arguments, feed)
        # One line for each frame that can be decoded.
        shown = run(["-i", f"file:{path}", "-map", "0:v:0", "-f", "framecrc", "-"]).splitlines()
    except FfmpegError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"cannot write {path.name}: ffmpeg failed: {error}") from None
    count = sum(1 for line in shown if line and not line.startswith("#"))
    sizes = [line.split(":")[1].strip() for line in shown if line.startswith("#dimensions")]
    if count == len(frames) and sizes == [f"{width}x{height}"]:
        return
    path.unlink(missing_ok=True)
    raise UserError(
        f"cannot write {path.name}: ffmpeg made {count} frames {', '.join(sizes)} instead of"
        f" {len(frames)} frames {width}x{height}"
    )


def _raw(height: int, width: int, fps: float) -> list[str]:
    """The arguments for raw frames on the standard input."""
    form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    return [*form, "-r", f"{fps:.10g}", "-i", "pipe:0"]


def _encoding(height: int, width: int) -> list[str]:
    """The arguments for H.264 in the colours of the size, which the file states."""
    matrix, tag = ("bt709", "bt709") if is_hd(height, width) else ("bt601", "smpte170m")
    filters = (
        f"scale=out_color_matrix={matrix}:out_range=tv"
        ":flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp,"
        "format=yuv420p,"
        # Pictures of models are sRGB: the primaries are those of BT.709 at every size.
        f"setparams=range=tv:colorspace={tag}:color_primaries=bt709:color_trc=bt709"
    )
    tags = ["-colorspace", tag, "-color_primaries", "bt709", "-color_trc", "bt709"]
    codec = ["-an", "-c:v", "libx264", "-crf", _QUALITY, "-pix_fmt", "yuv420p"]
    return ["-vf", filters, *codec, *tags, "-color_range", "tv"]


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    # Delays of two lengths keep the rate, which one length of whole 1/100 s cannot.
    ends = [round(100 * number / fps) for number in range(len(frames) + 1)]
    delays = [10 * (end - start) for start, end in itertools.pairwise(ends)]
    try:
        images[0].save(
            path,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=delays,
            loop=0,
        )
    except (struct.error, OverflowError, ValueError) as error:
        raise UserError(
            f"cannot write {path.name}: a GIF cannot show frames at {fps:g} a second"
            f" ({one_line(error)})"
        ) from None
    _check_gif(path, frames, sum(delays))


def _check_gif(path: Path, frames: np.ndarray, milliseconds: int) -> None:
    from PIL import Image, ImageSequence

    lasts, last = 0, None
    try:
        with Image.open(path) as image:
            size = image.size
            for shown in ImageSequence.Iterator(image):
                last = shown.copy()
                lasts += round(last.info.get("duration", 0))
    except Exception as error:  # decoders raise errors of many kinds for bad files
        raise UserError(
            f"cannot write {path.name}: it cannot be read back: {one_line(error)}"
        ) from None
    # Equal frames in turn are stored once, and last longer: the time counts, not the number.
    if lasts != milliseconds:
        raise UserError(
            f"cannot write {path.name}: it lasts {lasts / 1000:g} s instead of"
            f" {milliseconds / 1000:g} s"
        )
    _check_size(path, size, (frames.shape[2], frames.shape[1]))


def _write_png(path: Path, frames: np.ndarray, fps: float) -> None:
    from PIL import Image

    folder = frames_folder(path)
    folder.mkdir()
    digits = max(4, len(str(len(frames) - 1)))
    for index, frame in enumerate(frames):
        file = folder / f"frame_{index:0{digits}d}.png"
        Image.fromarray(frame).save(file)
        check_picture(file, (frame.shape[1], frame.shape[0]))


def check_picture(path: Path, size: tuple[int, int]) -> None:
    """Read a picture back.

    Args:
        path: the file.
        size: width and height in pixels.

    Raises:
        UserError: if the file cannot be read, or the picture has another size.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            found = image.size
    except Exception as error:  # decoders raise errors of many kinds for bad files
        raise UserError(
            f"cannot write {path.name}: it cannot be read back: {one_line(error)}"
        ) from None
    _check_size(path, found, size)


def _check_size(path: Path, found: Sequence[int], size: tuple[int, int]) -> None:
    if tuple(found) != size:
        raise UserError(
            f"cannot write {path.name}: it is {found[0]}x{found[1]} instead of {size[0]}x{size[1]}"
        )
