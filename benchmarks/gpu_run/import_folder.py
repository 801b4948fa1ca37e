"""A folder from which a checkout's package can be imported."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Folders beside diffattn/ that are sub-packages of it, see pyproject.toml.
BESIDE = ("kernels", "lora", "pipelines", "samples")


def make(folder: Path, root: Path = ROOT) -> Path:
    """Put the package together from links, and this program beside it.

    The checkout alone cannot be imported: its sub-packages lie beside diffattn/.

    Args:
        folder: the folder to fill; must be empty.
    """
    package = folder / "diffattn"
    package.mkdir(parents=True)
    for entry in (root / "diffattn").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in BESIDE:
        (package / name).symlink_to(root / name)
    (folder / "gpu_run").symlink_to(root / "benchmarks" / "gpu_run")
    return folder


def sources_of(root: Path = ROOT) -> str:
    """A digest of the source text that decides what the kernels compute."""
    digest = hashlib.sha256()
    for folder in ("kernels", "diffattn"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
