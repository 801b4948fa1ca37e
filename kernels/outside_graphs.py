"""Calls that compiled code makes outside of its graph.

Importing this module imports Dynamo, which takes a second: import the module where a call is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call_outside(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call a function; code that is being compiled breaks its graph here."""
    return function(*arguments, **keywords)


@torch.compiler.disable(
    reason="torch.compile drops the forward-mode derivative of attention; compile without"
    " fullgraph, or compile only what is outside of torch.func.jvp and dual_level"
)
def apply_outside(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply a function whose forward-mode derivative compiled code would drop."""
    return function.apply(*arguments)
