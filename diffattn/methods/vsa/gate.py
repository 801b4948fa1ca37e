"""The trained gate of VSA, and the processor that gives it what the site projects to queries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F

from diffattn.grid import TokenGrid
from diffattn.methods.base import SiteState, SiteWeights


class VSAGate(SiteWeights):
    """The gate of a site: how much of the coarse attention each channel of a token takes.

    Attributes:
        to_gate_compress: a linear layer of the inputs of `to_q` that begins as 0, with a bias if
            `to_q` has one.
    """

    def __init__(self, module: Any) -> None:
        """Make a gate of zeros for an attention module, on the module's device and in its dtype.

        Raises:
            ValueError: if the module has no projection `to_q`.
        """
        super().__init__()
        to_q: Any = getattr(module, "to_q", None)
        if getattr(to_q, "in_features", None) is None:
            raise ValueError(
                f"coarse is True, but {type(module).__name__} has no projection to_q, whose inputs"
                f" the gate of vsa needs: use VSAAttn(coarse=False) with this model"
            )
        # No random number is drawn: attaching must not change those of the user.
        layer = torch.nn.Linear(
            to_q.in_features, to_q.out_features, bias=to_q.bias is not None, device="meta"
        )
        self.to_gate_compress = layer.to_empty(device="cpu")
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
        self._has_learnt = False
        self.place_beside(module)

    def forward(self, x: torch.Tensor) -> torch.Tensor | None:
        """The gate of tokens: (batch, tokens, channels) to (batch, tokens, heads * head_dim).

        None if every weight is 0 and none is to be trained.
        """
        parameters = list(self.to_gate_compress.parameters())
        is_trained = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if not is_trained and self._is_zero(parameters):
            return None
        for parameter in parameters:
            # Offloading does not move layers made after its start.
            if parameter.device != x.device and not parameter.is_meta:
                self.to_gate_compress.to(x.device)
            break
        gate: torch.Tensor = self.to_gate_compress(x)
        return gate

    def _is_zero(self, parameters: list[torch.nn.Parameter]) -> bool:
        """Whether all weights are 0, as far as they are at hand.

        The look at the weights waits for the device. A gate that was found to be none of zeros is
        not looked at again.
        """
        if not self._has_learnt:
            self._has_learnt = any(p.is_meta or bool(p.detach().any()) for p in parameters)
        return not self._has_learnt


class _Observed:
    """An attention module that remembers what it projects to queries."""

    def __init__(self, attn: Any, gate: VSAGate) -> None:
        self._attn = attn
        self._gate = gate
        self._inputs: torch.Tensor | None = None

    def to_q(self, x: torch.Tensor) -> torch.Tensor:
        self._inputs = x
        return self._attn.to_q(x)

    def to_qkv(self, x: torch.Tensor) -> torch.Tensor:
        """The projections that `fuse_qkv_projections()` makes one of."""
        self._inputs = x
        return self._attn.to_qkv(x)

    def gate(self) -> torch.Tensor | None:
        if self._inputs is None:
            raise RuntimeError(
                "the gate of vsa needs the inputs of to_q, but the attention processor has not"
                " called that projection: use VSAAttn(coarse=False) with this model"
            )
        gate: torch.Tensor | None = self._gate(self._inputs)
        return gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


# The attention module whose processor runs in this context.
_running: ContextVar[_Observed | None] = ContextVar("diffattn_vsa", default=None)


def gate_of_call(query: torch.Tensor, grid: TokenGrid) -> torch.Tensor | None:
    """The gate of the attention call that runs, in the shape of `query`; None for no coarse branch.

    Tokens that the model projects by other layers, such as a text stream of its own, have 0.

    Args:
        query: (batch, tokens, heads, head_dim).
        grid: the tokens of the call.

    Raises:
        NotImplementedError: if the gate is of other tokens or heads than the call.
    """
    observed = _running.get()
    gate = None if observed is None else observed.gate()
    if gate is None:
        return None
    tokens, channels = gate.shape[1:]
    pictures = grid.pictures
    if tokens != grid.tokens and tokens == pictures.stop - pictures.start:
        gate = F.pad(gate, (0, 0, pictures.start, grid.tokens - pictures.stop))
    heads, head_dim = query.shape[2:]
    if gate.shape[1] != query.shape[1] or channels != heads * head_dim:
        raise NotImplementedError(
            f"the gate of vsa is of {tokens} tokens and {channels} channels, but attention of"
            f" {query.shape[1]} tokens and {heads} x {head_dim} channels, as with context"
            f" parallelism and merged tokens: use VSAAttn(coarse=False) here"
        )
    return gate.unflatten(2, (heads, head_dim))


def with_gate(processor: Any, name: str, state: SiteState) -> Any:
    """Make a processor give sparse calls the gate of the site.

    Args:
        processor: the processor to change.
        name: name of the attention module's submodule that is a `VSAGate`.
        state: the state of the site, which says whether calls are sparse.

    Returns:
        `processor`.
    """
    own: Any = type(processor)
    if not hasattr(own, "_diffattn_gate"):
        processor.__class__ = _observing_class(own)
    processor._diffattn_gate = name, state
    return processor


@functools.cache
def _observing_class(cls: type) -> type:
    """A subclass of `cls` that passes an `_Observed` attention module to `cls.__call__`."""
    own: Callable[..., Any] = cls.__call__

    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        name, state = self._diffattn_gate
        if state is None or not state.sparse:
            return own(self, attn, *args, **kwargs)
        observed = _Observed(attn, attn.get_submodule(name))
        token = _running.set(observed)
        try:
            return own(self, observed, *args, **kwargs)
        finally:
            _running.reset(token)

    # Compiled code cannot read a context variable.
    call = torch.compiler.disable(call)
    # diffusers passes a processor the arguments that the processor's signature names.
    call = functools.wraps(own)(call)
    # For IP-Adapters, diffusers makes new processors of the class, which no site has a state for.
    untold = {"_diffattn_gate": ("", None)}
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": __name__} | untold)
