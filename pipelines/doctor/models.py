"""The bundled model, and the models of the Hugging Face Hub that are at hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..run.loading import find_model
from ..run.request import BUNDLED_MODEL
from .findings import Check, Finding

_SHOWN = 5


def check_bundled_model() -> Iterator[Finding]:
    """The model of the command line, by its files."""
    folder = Path(find_model(BUNDLED_MODEL))
    weights = list(folder.rglob("*.safetensors"))
    # A checkout without git-lfs has small text files in their places.
    if not weights or any(file.stat().st_size < 1024 for file in weights):
        yield Finding("problem", BUNDLED_MODEL, f"{folder} has no weights", "install diffattn anew")
        return
    yield Finding("ok", BUNDLED_MODEL, str(folder))


def check_hub() -> Iterator[Finding]:
    """Whether the Hub is used, and which models are in its cache."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    names = sorted(entry.name for entry in cache.glob("models--*")) if cache.is_dir() else []
    shown = ", ".join(name.removeprefix("models--").replace("--", "/") for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    there = f"{len(names)} models in the cache{f' ({shown}{more})' if names else ''}"
    if not constants.HF_HUB_OFFLINE:
        yield Finding("ok", "hub", there)
    elif names:
        yield Finding("ok", "hub", f"offline (HF_HUB_OFFLINE): only models of the cache; {there}")
    else:
        yield Finding(
            "warning",
            "hub",
            "offline (HF_HUB_OFFLINE), and the cache has no model",
            f"unset HF_HUB_OFFLINE to download models; {BUNDLED_MODEL} and folders work",
        )


CHECKS: tuple[Check, ...] = (check_bundled_model, check_hub)
