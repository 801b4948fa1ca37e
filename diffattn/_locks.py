"""Locks on files and folders. The system releases a lock when its process ends, or is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds.

    Attributes:
        path: the locked file or folder.
        descriptor: open as long as the lock is held.
        certain: whether the file system knows locks. If not, other processes may hold the same one.
    """

    path: Path
    descriptor: int
    certain: bool

    def release(self) -> None:
        """Give the lock back."""
        os.close(self.descriptor)

    def remove(self) -> None:
        """Remove the locked file, then give the lock back."""
        self.path.unlink(missing_ok=True)
        self.release()


def lock_file(path: Path) -> Lock | None:
    """Lock a file, which is made if there is none.

    Returns:
        The lock; None if a live process holds the lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock = _lock(path, descriptor)
        except BlockingIOError:
            return None
        if lock is not None:
            return lock


def lock_existing(path: Path) -> Lock | None:
    """Lock a file or a folder.

    Returns:
        The lock; None if a live process holds the lock, or the path is gone.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        return _lock(path, descriptor)
    except (FileNotFoundError, BlockingIOError):
        return None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait for the lock of a folder, and hold the lock while the block runs."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # File systems without locks leave the block to run beside others.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> Lock | None:
    """Lock an open path; None if the path is another one meanwhile.

    Raises:
        BlockingIOError: if a live process holds the lock.
    """
    certain = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        certain = False
    # The holder before may have removed the path after this process opened it.
    try:
        same = os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        same = False
    if same:
        return Lock(path, descriptor, certain)
    os.close(descriptor)
    return None
