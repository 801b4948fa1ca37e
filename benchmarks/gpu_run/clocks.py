"""The GPU's clocks, power and temperature, read once a second beside everything else."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_run.parent import kill

FIELDS = (
    "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active,"
    "utilization.gpu"
)


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Add lines to a CSV file while the block runs; one line says if there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader", "-l", "1"]
    with path.open("ab") as file:
        try:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            file.write(f"nvidia-smi does not start: {error}\n".encode())
            yield
            return
        try:
            yield
        finally:
            kill(process)


def asked(fields: str) -> str:
    """nvidia-smi's `fields` of the first GPU; empty if nvidia-smi fails or does not exist."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""
