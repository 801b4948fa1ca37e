"""Step caches beside sparse attention: steps that a model does not compute.

A cache is named by words: "first-block" of diffusers, or "cache-dit" of that package, and after a
colon the difference between steps below which a step is left out, as in "cache-dit:0.2".
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffattn._checks import did_you_mean
from diffattn.models import denoisers

from ..errors import UserError, one_line, shortened

CACHES = ("first-block", "cache-dit")

# Steps that cache-dit computes in any case: its own number, and no more than this share of a run.
_WARM_UP = 0.25


def lacking(cache: str | None) -> str | None:
    """Why a cache cannot be had here; None if it can."""
    if cache is None or cache.partition(":")[0] != "cache-dit":
        return None
    found = importlib.util.find_spec("cache_dit") is not None
    return None if found else "needs the package cache-dit: pip install cache-dit"


def check_cache(case: str, cache: str | None) -> None:
    """Refuse a cache that cannot be had, before anything is rendered.

    Args:
        case: the name of its case.
        cache: the words of the cache; None for none.

    Raises:
        UserError: if there is no such cache, or its package is missing.
    """
    if cache is None:
        return
    name, colon, threshold = cache.partition(":")
    if name not in CACHES:
        hint = did_you_mean(name, CACHES)
        raise UserError(f"case {case!r}: cache must be {' or '.join(CACHES)}, not {name!r}{hint}")
    if colon and _threshold(cache) is None:
        raise UserError(
            f"case {case!r}: after {name}: stands a number above 0, not {shortened(threshold)!r}"
        )
    reason = lacking(cache)
    if reason is not None:
        raise UserError(f"case {case!r}: {name} {reason}")


def _threshold(cache: str) -> float | None:
    try:
        value = float(cache.partition(":")[2])
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


@contextmanager
def cached(pipe: Any, cache: str | None, steps: int) -> Iterator[None]:
    """Have a pipeline's denoisers reuse what they computed in earlier steps, while the block runs.

    Args:
        pipe: the pipeline.
        cache: the words of a cache that `check_cache` has passed; None for none.
        steps: denoising steps of the run.

    Raises:
        UserError: if the model does not take the cache.
    """
    if cache is None:
        yield
        return
    of_diffusers = cache.startswith("first-block")
    begun = _first_block(pipe, cache) if of_diffusers else _cache_dit(pipe, cache, steps)
    with begun:
        yield


@contextmanager
def _first_block(pipe: Any, cache: str) -> Iterator[None]:
    from diffusers import FirstBlockCacheConfig

    models: list[Any] = list(denoisers(pipe).values())
    threshold = _threshold(cache)
    config = FirstBlockCacheConfig() if threshold is None else FirstBlockCacheConfig(threshold)
    for model in models:
        if not hasattr(model, "enable_cache"):
            raise UserError(f"{type(model).__name__} takes no cache of diffusers")
    for model in models:
        model.enable_cache(config)
    try:
        yield
    finally:
        for model in models:
            model.disable_cache()


@contextmanager
def _cache_dit(pipe: Any, cache: str, steps: int) -> Iterator[None]:
    """cache-dit's own settings (DBCache), but for few blocks and few steps."""
    # It tells of each cache that it puts in and takes out.
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit

    config = cache_dit.DBCacheConfig()
    config.Fn_compute_blocks = max(1, min(config.Fn_compute_blocks, _blocks(pipe) // 2))
    config.max_warmup_steps = min(config.max_warmup_steps, round(_WARM_UP * steps))
    threshold = _threshold(cache)
    if threshold is not None:
        config.residual_diff_threshold = threshold
    try:
        cache_dit.enable_cache(pipe, cache_config=config)
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(f"cache-dit refuses {type(pipe).__name__}: {one_line(error)}") from None
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def _blocks(pipe: Any) -> int:
    """The number of blocks in the longest row of blocks of a pipeline's denoisers."""
    import torch

    rows = [
        len(child)
        for model in denoisers(pipe).values()
        for child in model.children()
        if isinstance(child, torch.nn.ModuleList)
    ]
    return max(rows, default=1)
