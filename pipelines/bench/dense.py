"""Dense attention by a backend of torch, and the fastest backend of a device."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .timing import Call, Timer, describe

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Torch chooses by itself among those that the call allows.
_TORCH = "torch"
_TRIALS = 3


def dense_attention(backend: str) -> Attend:
    """torch's dense attention by one of its backends and no other; "torch" leaves it the choice.

    Returns:
        A function of q, k and v, (batch, heads, tokens, head_dim).
    """

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if backend == _TORCH:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel([BACKENDS[backend]]):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def candidates(device: torch.device) -> tuple[str, ...]:
    """The backends of dense attention to try on a device."""
    return tuple(BACKENDS) if device.type == "cuda" else (_TORCH,)


def fastest(make: Callable[[Attend], Call], device: torch.device, timer: Timer) -> tuple[str, Call]:
    """The fastest backend for a call, and the call.

    Args:
        make: makes the call that is timed of a dense attention.
        device: of the tensors.
        timer: of the device.

    Raises:
        RuntimeError: if no backend computes the call; names the reasons.
    """
    found: dict[str, tuple[float, Call]] = {}
    reasons = []
    names = candidates(device)
    for name in names:
        try:
            # Torch warns of every reason why a backend does not take a call.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                call = make(dense_attention(name))
                call()
                call()
            trials = _TRIALS if len(names) > 1 else 0
            times = [timer.milliseconds(call) for _ in range(trials)]
            found[name] = min(times, default=0.0), call
        except Exception as error:  # backends raise errors of many types
            reasons.append(f"{name}: {describe(error)}")
    if not found:
        raise RuntimeError(f"dense attention does not work here ({'; '.join(reasons)})")
    best = min(found, key=lambda name: found[name][0])
    return best, found[best][1]
