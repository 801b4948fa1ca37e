"""Locks that end with their process."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from diffattn._locks import alone, lock_existing, lock_file

HOLD = """
import sys
from pathlib import Path
from diffattn._locks import lock_file
print(lock_file(Path(sys.argv[1])) is not None, flush=True)
input()
"""


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first = lock_file(tmp_path / "a")
    assert first is not None
    assert first.certain
    assert lock_file(tmp_path / "a") is None
    assert lock_existing(tmp_path / "a") is None
    first.release()
    second = lock_file(tmp_path / "a")
    assert second is not None
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_folders_and_paths_that_are_gone(tmp_path: Path) -> None:
    lock = lock_existing(tmp_path)
    assert lock is not None
    assert lock_existing(tmp_path) is None
    lock.release()
    assert lock_existing(tmp_path / "none") is None
    with alone(tmp_path):
        assert lock_existing(tmp_path) is None


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    command = [sys.executable, "-P", "-c", HOLD, path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert lock_file(path) is None
        process.kill()
    lock = lock_file(path)
    assert lock is not None
    lock.release()


def test_a_file_removed_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, the holder before removes the file: the lock is on the next."""
    path = tmp_path / "a"
    flock, calls = fcntl.flock, []

    def remove_first(descriptor: int, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    lock = lock_file(path)
    assert lock is not None
    assert len(calls) == 2
    assert path.exists()
    assert lock_file(path) is None
    lock.release()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unknown)
    lock = lock_file(tmp_path / "a")
    assert lock is not None
    assert not lock.certain
    lock.release()
    with alone(tmp_path):
        pass
