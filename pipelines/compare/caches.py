"""Step caches beside sparse attention: steps that a model does not compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffattn._checks import did_you_mean
from diffattn.models import denoisers

from ..errors import UserError

# From diffusers itself, and from the package cache-dit.
CACHES = ("first-block", "cache-dit")


def lacking(cache: str | None) -> str | None:
    """Why a cache cannot be had here; None if it can."""
    if cache == "cache-dit" and importlib.util.find_spec("cache_dit") is None:
        return "needs the package cache-dit: pip install cache-dit"
    return None


def check_cache(case: str, cache: str | None) -> None:
    """Refuse a cache that cannot be had, before anything is rendered.

    Args:
        case: the name of its case.
        cache: the name of the cache; None for none.

    Raises:
        UserError: if there is no such cache, or its package is missing.
    """
    if cache is not None and cache not in CACHES:
        hint = did_you_mean(cache, CACHES)
        raise UserError(f"case {case!r}: cache must be {' or '.join(CACHES)}, not {cache!r}{hint}")
    reason = lacking(cache)
    if reason is not None:
        raise UserError(f"case {case!r}: {cache} {reason}")


@contextmanager
def cached(pipe: Any, cache: str | None) -> Iterator[None]:
    """Have a pipeline's denoisers reuse what they computed in earlier steps, while the block runs.

    Raises:
        UserError: if the model does not take the cache.
    """
    if cache is None:
        yield
        return
    begin = _first_block if cache == "first-block" else _cache_dit
    with begin(pipe):
        yield


@contextmanager
def _first_block(pipe: Any) -> Iterator[None]:
    from diffusers import FirstBlockCacheConfig

    models = denoisers(pipe).values()
    for model in models:
        if not hasattr(model, "enable_cache"):
            raise UserError(f"{type(model).__name__} takes no cache of diffusers")
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        yield
    finally:
        for model in models:
            model.disable_cache()


@contextmanager
def _cache_dit(pipe: Any) -> Iterator[None]:
    import cache_dit

    cache_dit.enable_cache(pipe)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)
