"""The forwards of attached denoisers that are running, each with a state of its own.

Threads and tasks may call one denoiser at the same time. Each has a context of its own, in which
the state of its forward is found. Code that autograd runs again has no context of the forward that
it belongs to, and takes the state of the last forward that began anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from diffattn.attach.run_clock import RunClock
from diffattn.grid import TokenGrid
from diffattn.methods.agent.merging import Merging
from diffattn.methods.base import SiteWeights
from diffattn.orders import TileOrder
from diffattn.schedule import Moment


@dataclass(eq=False)
class Call:
    """The state of one forward of an attached denoiser.

    Attributes:
        clock: the denoising run that the forward is a part of.
        moment: the position of the forward in the run. The clock may move on before autograd runs
            parts of the forward again.
        video: the video tokens, without text, of the attention calls to come; None before they are
            known.
        order: the order that the forward has put its tokens in; None for the model's own order.
        inside: the video tokens by module, for models whose modules have grids of their own.
        weights, rotary, merging: those of the site whose call is running, see `Site`.
        place: the number of that site, an int64 tensor on the CPU, where the method remembers.
            Compiled code takes the values of tensors as they are, and would be compiled again for
            every other integer.
        attention_calls: calls of attached sites so far, except in compiled code.
        sparse_groups: whether each group of the denoiser was sparse when the call began.
    """

    clock: RunClock
    video: TokenGrid | None = None
    order: TileOrder | None = None
    inside: dict[str, TokenGrid] = field(default_factory=dict)
    weights: SiteWeights | None = None
    rotary: Any = None
    merging: Merging | None = None
    place: torch.Tensor | None = None
    attention_calls: int = 0
    sparse_groups: tuple[bool, ...] = ()
    moment: Moment = field(init=False)

    def __post_init__(self) -> None:
        self.moment = self.clock.moment


# The calls that are running in this context, by the serial number of their attached denoiser. A
# context inherits the mapping of the context that it was made in, so no mapping is ever changed.
_running: ContextVar[Mapping[int, Call]] = ContextVar(
    "diffattn_running", default=MappingProxyType({})
)


def running_call(serial: int) -> Call | None:
    """The forward of attached denoiser number `serial` that runs in this context, if one does."""
    return _running.get().get(serial)


def begin_call(serial: int, call: Call) -> None:
    """Make `call` the running forward of attached denoiser number `serial` in this context."""
    _running.set({**_running.get(), serial: call})


def end_call(serial: int) -> Call | None:
    """End the running forward of an attached denoiser in this context, and return its state."""
    calls = dict(_running.get())
    ended = calls.pop(serial, None)
    if ended is not None:
        _running.set(calls)
    return ended
