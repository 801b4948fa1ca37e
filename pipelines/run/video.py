"""Writing frames: MP4 through imageio's ffmpeg, GIF, or a folder of PNG files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

from diffattn._checks import did_you_mean

from ..errors import UserError

FORMATS = (".mp4", ".gif", ".png")

# A GIF's delay is a whole number of 1/100 s and players slow delays below 2/100 s down.
_FASTEST_GIF = 50


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
    if suffix == ".gif" and fps is not None and fps > _FASTEST_GIF:
        raise UserError(f"a GIF shows at most {_FASTEST_GIF} frames a second, not --fps {fps:g}")


def frames_folder(path: Path) -> Path:
    """The folder that holds the frames of a `path` with extension .png."""
    return path.with_suffix("")


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames (count, height, width, 3), uint8, in the format that the extension names.

    A `path` with extension .png names the folder that takes `frame_0000.png` and so on; the
    folder must not exist.
    """
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png}
    writers[path.suffix.lower()](path, frames, fps)


def _check_ffmpeg() -> None:
    advice = "pip install imageio-ffmpeg, point IMAGEIO_FFMPEG_EXE at one, or write .gif or .png"
    try:
        import imageio_ffmpeg

        executable = imageio_ffmpeg.get_ffmpeg_exe()
        # imageio-ffmpeg only checks executables that it has found itself.
        subprocess.run([executable, "-version"], check=True, capture_output=True, timeout=30)
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError):
        raise UserError(f"no working ffmpeg for MP4 files: {advice}") from None


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    import imageio.v2 as imageio

    # yuv420p, the only form all players read, halves the colours: it needs even sides.
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    even = np.pad(frames, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
    writer = imageio.get_writer(
        path,
        format="FFMPEG",
        mode="I",
        fps=fps,
        codec="libx264",
        quality=8,
        macro_block_size=1,
        ffmpeg_log_level="error",
    )
    with writer:
        for frame in even:
            writer.append_data(frame)


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        loop=0,
    )


def _write_png(path: Path, frames: np.ndarray, fps: float) -> None:
    from PIL import Image

    folder = frames_folder(path)
    folder.mkdir()
    digits = max(4, len(str(len(frames) - 1)))
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame_{index:0{digits}d}.png")
