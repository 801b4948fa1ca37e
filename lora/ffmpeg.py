"""The program ffmpeg: how it is found and run, and the reason when it fails."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from typing import IO

QUIET = ("-hide_banner", "-nostdin", "-nostats")

_LONGEST = 160

# Players take the colours of a video without a tag for BT.709 from this size on, and for BT.601
# below.
_HD_WIDTH, _HD_HEIGHT = 1280, 577


class FfmpegError(Exception):
    """ffmpeg is missing, or did not do its work; the message is one line."""


def executable() -> str:
    """The ffmpeg of IMAGEIO_FFMPEG_EXE, else that of imageio-ffmpeg, else that of the system.

    Raises:
        FfmpegError: if there is none.
    """
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise FfmpegError("no ffmpeg was found") from None


def start(arguments: Sequence[str], **streams: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """Start ffmpeg; Ctrl-C reaches the caller alone.

    Raises:
        FfmpegError: if there is no ffmpeg that can be started.
    """
    program = executable()
    try:
        return subprocess.Popen([program, *QUIET, *arguments], start_new_session=True, **streams)  # type: ignore[call-overload]
    except OSError as error:
        raise FfmpegError(f"cannot start {program}: {error.strerror}") from None


def run(arguments: Sequence[str], feed: Iterable[bytes] = ()) -> str:
    """Run ffmpeg to its end.

    Args:
        arguments: the arguments of the program.
        feed: bytes for its standard input, in parts.

    Returns:
        The standard output.

    Raises:
        FfmpegError: if ffmpeg cannot be started, ends with another code than 0, or is ended.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as messages:
        process = start(
            ["-loglevel", "error", *arguments], stdin=subprocess.PIPE, stdout=out, stderr=messages
        )
        assert process.stdin is not None
        try:
            # An ffmpeg that has ended takes no more: its code and its messages say why.
            with contextlib.suppress(BrokenPipeError), process.stdin:
                for part in feed:
                    process.stdin.write(part)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        messages.seek(0)
        said = messages.read().decode(errors="replace").splitlines()
        if code:
            raise FfmpegError(reason(code, said))
        out.seek(0)
        return out.read().decode(errors="replace")


def is_hd(height: int, width: int) -> bool:
    """Whether players take the colours of a video of this size in pixels for BT.709."""
    return width >= _HD_WIDTH or height >= _HD_HEIGHT


def reason(code: int, messages: Sequence[str]) -> str:
    """One line about a failure.

    Args:
        code: the exit code, negative for a signal.
        messages: the lines of errors that ffmpeg wrote. The first names the cause, those after it
            only the consequences.
    """
    end = f"exit code {code}" if code >= 0 else f"ended by {_signal(-code)}"
    lines = [" ".join(re.sub(r"^(\[[^]]*\] *)+", "", line).split()) for line in messages]
    first = next((line for line in lines if line), "")
    return f"{first[:_LONGEST]} ({end})" if first else end


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
