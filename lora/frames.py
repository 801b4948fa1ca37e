"""Frames of videos, animations and pictures, as players and viewers show them.

Square pixels, turned as the file says, on white where they are transparent, 8 bits a channel.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from diffattn.lora.ffmpeg import is_hd, reason, start

if TYPE_CHECKING:
    from PIL.Image import Image

VIDEOS = (
    ".3gp",
    ".avi",
    ".flv",
    ".m2ts",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".mts",
    ".ts",
    ".webm",
    ".wmv",
)
ANIMATIONS = (".gif", ".png", ".webp")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

ON_WHITE = "transparent areas are shown on white"

# At the moment when a frame ends, the next frame is shown. The tolerance, in seconds, covers
# rounding of the two times.
INSTANT = 1e-6

# A rate so close to the file's own means the file's own: 23.98 is 24000/1001, but 24 is not.
_SAME_RATE = 5e-4

# Seconds between frames if a file has no rate, and of a frame of an animation without a delay.
_USUAL = 1 / 25
_DELAY = 0.1

# Seconds to wait for the line about a frame that is there: ffmpeg has written the line before.
_PATIENCE = 10

# Units of the delays of animations in seconds.
_UNITS = {"GIF": 0.01, "PNG": 0.001, "WEBP": 0.001}

# Times are reported; pixels are made square.
_FILTERS = (
    "showinfo,"
    "scale=w='round(iw*max(sar,1))':h='round(ih*max(1/sar,1))':in_color_matrix={matrix}"
    ":flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp,"
    "setsar=1"
)
_CONFIG = re.compile(r"config in time_base: *(\d+)/(\d+), *frame_rate: *(\d+)/(\d+)")
_TIME = re.compile(r"\bn: *\d+ +pts: *(\S+)")
_ERROR = re.compile(r"\[(?:error|fatal)\] *(.*)")

# The first video stream as ffmpeg describes it, up to the next stream, and a frame of it.
_STREAM = re.compile(r"Stream #[^\n]*?: Video: (\w+)(.*?)(?=Stream #|Stream mapping)", re.DOTALL)
_SIZE = re.compile(r"\bs:(\d+)x(\d+)")
_MATRIX = re.compile(r"\bcolor_space:(\w+)")
_WITH_ALPHA = re.compile(r"alpha_mode *: *1\b")
# ffmpeg's own decoders of these codecs leave out transparency.
_DECODERS_OF_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass(frozen=True)
class Frame:
    """A frame of a clip.

    Attributes:
        pixels: uint8 (height, width, 3).
        start, end: seconds from the start of the first frame.
        interval: seconds between the frames of a clip that has a rate, else None.
    """

    pixels: np.ndarray
    start: float
    end: float
    interval: float | None


def read_frames(path: Path, note: Callable[[str], None] = lambda _: None) -> Iterator[Frame]:
    """The frames of a video, an animation or a picture, in order.

    Args:
        path: the file; the extension decides how it is read.
        note: takes a line, at most once, about what the reader has changed.

    Raises:
        Exception: of many kinds, if the file cannot be read.
    """
    if path.suffix.lower() in VIDEOS:
        return _video(path, note)
    return _picture(path, note)


def at_rate(frames: Iterator[Frame], fps: float) -> Iterator[Frame]:
    """The frames that are shown at the times 0, 1 / fps, 2 / fps and so on."""
    count = 0
    for frame in frames:
        if frame.interval is not None and abs(fps * frame.interval - 1) < _SAME_RATE:
            fps = 1 / frame.interval
        while count / fps < frame.end - INSTANT:
            yield frame
            count += 1


def shown(image: Image) -> tuple[np.ndarray, bool]:
    """A picture of Pillow as uint8 (height, width, 3), and whether parts of it are transparent."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would cut off all values above 255.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2), False
    if image.mode in ("RGB", "L", "CMYK", "YCbCr") and "transparency" not in image.info:
        return np.asarray(image.convert("RGB")), False
    return _on_white(np.asarray(image.convert("RGBA")))


def upright(image: Image) -> Image:
    """A picture turned as its camera says: cameras store their orientation instead."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _on_white(rgba: np.ndarray) -> tuple[np.ndarray, bool]:
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3]), False
    share = alpha.astype(np.uint32)
    mixed = rgba[..., :3] * share + 255 * (255 - share)
    return ((mixed + 127) // 255).astype(np.uint8), True


def _picture(path: Path, note: Callable[[str], None]) -> Iterator[Frame]:
    from PIL import Image

    with Image.open(path) as image:
        if image.format in _UNITS and getattr(image, "n_frames", 1) > 1:
            yield from _animation(image, note)
            return
        pixels, transparent = shown(upright(image))
        if transparent:
            note(ON_WHITE)
        yield Frame(pixels, 0.0, 2 * INSTANT, None)


def _animation(image: Image, note: Callable[[str], None]) -> Iterator[Frame]:
    assert image.format is not None
    # The first picture of an animated PNG may be for programs that show no animations only.
    first = 1 if getattr(image, "default_image", False) else 0
    numbers = range(first, getattr(image, "n_frames", 1))
    ends: list[float] = []
    for number in numbers:
        image.seek(number)
        image.load()
        # Players show a frame for a tenth of a second if its delay is missing or 0.
        delay = image.info.get("duration", 0) / 1000 or _DELAY
        ends.append((ends[-1] if ends else 0.0) + delay)
    starts = [0.0, *ends]
    # Delays are rounded to their unit: frames at a constant rate have delays of two lengths.
    unit = _UNITS[image.format] + INSTANT
    mean = ends[-1] / len(ends)
    interval: float | None = mean
    if all(abs(time - i * mean) <= unit for i, time in enumerate(starts)):
        starts = [i * mean for i in range(len(starts))]
    else:
        interval = None
    said = False
    for index, number in enumerate(numbers):
        image.seek(number)
        pixels, transparent = shown(image)
        if transparent and not said:
            note(ON_WHITE)
            said = True
        yield Frame(pixels, starts[index], starts[index + 1], interval)


def _video(path: Path, note: Callable[[str], None]) -> Iterator[Frame]:
    said = False
    before: Frame | None = None
    with contextlib.closing(_decoded(path)) as decoded:
        for rgba, time, interval in decoded:
            if before is not None:
                # Some files have no times, or the same time twice.
                lasts = before.end - before.start
                now = time if time > before.start else before.start + lasts
                yield Frame(before.pixels, before.start, now, before.interval)
                lasts, time = now - before.start, now
            else:
                lasts = interval
            pixels, transparent = _on_white(rgba)
            if transparent and not said:
                note(ON_WHITE)
                said = True
            # The last frame lasts as long as the frame before.
            before = Frame(pixels, time, time + lasts, interval)
    if before is None:
        raise ValueError("it has no frames")
    yield before


def _decoded(path: Path) -> Generator[tuple[np.ndarray, float, float], None, None]:
    """The frames of a video, uint8 (height, width, 4), with start times and the interval."""
    form = _form(path)
    decoder = [] if form.decoder is None else ["-c:v", form.decoder]
    arguments = ["-loglevel", "level+info", *decoder, "-i", f"file:{path}", "-map", "0:v:0"]
    arguments += [
        "-vf",
        _FILTERS.format(matrix=form.matrix),
        "-fps_mode",
        "passthrough",
        "-pix_fmt",
        "rgba",
        "-c:v",
        "pam",
    ]
    arguments += ["-f", "image2pipe", "pipe:1"]
    process = start(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    log = _Log(process.stderr)
    try:
        count = 0
        while (pixels := _read_pam(process.stdout)) is not None:
            yield pixels, log.time(count), log.interval
            count += 1
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        log.close()
    if code or not count:
        raise ValueError(reason(code, log.errors))


@dataclass(frozen=True)
class _Form:
    """How a video is to be decoded.

    Attributes:
        decoder: ffmpeg's name of the decoder; None for the usual one.
        matrix: ffmpeg's name of the matrix of the colours; "auto" for that which the file states.
    """

    decoder: str | None
    matrix: str


def _form(path: Path) -> _Form:
    """How a video is to be decoded, by its description and its first frame."""
    arguments = ["-loglevel", "info", "-i", f"file:{path}", "-map", "0:v:0", "-frames:v", "1"]
    arguments += ["-vf", "showinfo", "-f", "null", "-"]
    process = start(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    text = process.communicate()[1].decode(errors="replace")
    stream, size, matrix = (found.search(text) for found in (_STREAM, _SIZE, _MATRIX))
    decoder = None
    if stream is not None and _WITH_ALPHA.search(stream[2]):
        decoder = _DECODERS_OF_ALPHA.get(stream[1])
    if size is None or matrix is None or matrix[1] != "unknown":
        return _Form(decoder, "auto")
    width, height = int(size[1]), int(size[2])
    return _Form(decoder, "bt709" if is_hd(height, width) else "bt601")


class _Log:
    """What ffmpeg says while it decodes: the times of frames, and errors.

    Attributes:
        interval: seconds between frames, by the rate that the file states.
        errors: the messages of errors.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        """Read a stream to its end in a thread of its own, so that ffmpeg never waits."""
        self.interval = _USUAL
        self.errors: list[str] = []
        self._tick = 0.0
        self._times: list[float | None] = []
        self._over = False
        self._news = threading.Condition()
        self._stream = stream
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for the end of the stream, whose program has ended."""
        self._thread.join()
        self._stream.close()

    def _read(self) -> None:
        for line in self._stream:
            with self._news:
                self._take(line.decode(errors="replace"))
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    def time(self, index: int) -> float:
        """The start of a frame in seconds after the first frame's.

        Times in files are rounded to a tick, often a millisecond, which frames at a constant rate
        do not keep: a time within a tick of a multiple of the interval is that multiple.
        """
        with self._news:
            self._news.wait_for(lambda: self._over or index < len(self._times), _PATIENCE)
            known = self._times[: index + 1]
        first, own = (known[0], known[-1]) if index < len(known) else (None, None)
        if own is None or first is None:
            return index * self.interval
        time = own - first
        if self._tick == 0 or _is_whole(self.interval / self._tick):
            return time
        even = round(time / self.interval) * self.interval
        return even if abs(time - even) <= min(self._tick, self.interval / 2) + INSTANT else time

    def _take(self, line: str) -> None:
        if found := _TIME.search(line):
            pts = found[1]
            self._times.append(None if pts == "NOPTS" else int(pts) * self._tick)
        elif found := _CONFIG.search(line):
            tick_top, tick_bottom, rate_top, rate_bottom = map(int, found.groups())
            self._tick = tick_top / tick_bottom if tick_bottom else 0.0
            if rate_top and rate_bottom:
                self.interval = rate_bottom / rate_top
        elif found := _ERROR.search(line):
            self.errors.append(found[1])


def _is_whole(value: float) -> bool:
    return math.isclose(value, round(value), rel_tol=1e-6)


def _read_pam(stream: IO[bytes]) -> np.ndarray | None:
    """The next picture of a stream of PAM files, (height, width, 4); None at the end."""
    fields: dict[bytes, bytes] = {}
    while (line := stream.readline()) != b"ENDHDR\n":
        if not line:
            return None
        name, _, value = line.strip().partition(b" ")
        fields[name] = value
    shape = int(fields[b"HEIGHT"]), int(fields[b"WIDTH"]), int(fields[b"DEPTH"])
    data = stream.read(math.prod(shape))
    return np.frombuffer(data, np.uint8).reshape(shape) if len(data) == math.prod(shape) else None
