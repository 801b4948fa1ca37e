"""Optimisers by name: of torch, and 8-bit and schedule-free ones by the libraries of others."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from diffattn._checks import did_you_mean
from diffattn.lora.errors import LoraError

# The libraries that optimisers come from, by the first part of a name: where their classes are, and
# the extra of this package that installs them.
_HOMES: Mapping[str, tuple[str, str | None]] = {
    "torch": ("torch.optim", None),
    "bitsandbytes": ("bitsandbytes.optim", "bitsandbytes"),
    "torchao": ("torchao.optim", "torchao"),
    "schedulefree": ("schedulefree", "schedulefree"),
}
USUAL = "torch.AdamW"
# They call the loss themselves, or take sparse gradients alone.
_UNFIT = ("LBFGS", "SparseAdam", "Optimizer")
# Set by settings of their own.
_APART = ("params", "lr", "weight_decay")


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of an optimiser.

    Args:
        name: "LIBRARY.CLASS", such as "bitsandbytes.AdamW8bit"; the library is torch,
            bitsandbytes, torchao or schedulefree.

    Raises:
        LoraError: if there is no such optimiser, or its library is not installed.
    """
    library, _, cls = name.partition(".")
    if library not in _HOMES or not cls:
        raise LoraError(
            f"optimizer is {name!r}, but must be LIBRARY.CLASS with the library"
            f" {', '.join(_HOMES)}, such as bitsandbytes.AdamW8bit or {USUAL}"
        )
    home, extra = _HOMES[library]
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        raise LoraError(
            f"optimizer is {name!r}, which needs {library}: pip install diffattn[{extra}]"
            f" ({type(error).__name__}: {error})"
        ) from None
    found = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, torch.optim.Optimizer)
        and key not in _UNFIT
        and "Closure" not in key
        and not key.startswith("_")
    }
    if cls not in found:
        raise LoraError(
            f"optimizer is {name!r}, but {library} has no optimiser {cls!r} that trains a"
            f" LoRA{did_you_mean(cls, found, or_list=True)}"
        )
    return found[cls]


def make_optimizer(
    parameters: list[torch.nn.Parameter],
    name: str,
    learning_rate: float,
    weight_decay: float,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Make an optimiser.

    Args:
        parameters: the parameters to train.
        name: see `optimizer_class`.
        learning_rate, weight_decay: arguments that all optimisers have; an optimiser without a
            weight decay takes 0 alone.
        options: further arguments of the optimiser.

    Raises:
        LoraError: as `optimizer_class`, or if the optimiser refuses an argument.
    """
    cls = optimizer_class(name)
    known = [key for key in inspect.signature(cls.__init__).parameters if key != "self"]
    for key in options:
        if key in _APART or key not in known:
            allowed = [key for key in known if key not in _APART]
            raise LoraError(
                f"optimizer_args has {key!r}, but {name} takes {', '.join(allowed)}"
                f" (learning_rate and weight_decay are settings of their own)"
            )
    arguments = {"lr": learning_rate, **options}
    if "weight_decay" in known:
        arguments["weight_decay"] = weight_decay
    elif weight_decay:
        raise LoraError(
            f"weight_decay is {weight_decay:g}, but {name} has none: leave it out, or take {USUAL}"
        )
    try:
        made: Any = cls(parameters, **arguments)
        if is_schedule_free(name):
            made.train()
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise LoraError(f"{name} refuses its arguments: {error}") from None
    optimizer: torch.optim.Optimizer = made
    return optimizer


def set_rate(optimizer: Any, rate: float) -> None:
    """Set the learning rate of an optimiser; those of torchao hold it in a tensor of their own."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def is_schedule_free(name: str) -> bool:
    """Whether an optimiser takes its steps at other weights than those that are its result."""
    return name.startswith("schedulefree.")


@contextmanager
def at_result(optimizer: Any, parameters: list[torch.nn.Parameter], name: str) -> Iterator[None]:
    """Have the parameters at the result of the training so far, while the block runs.

    Only schedule-free optimisers train at other weights. Their way back rounds; so the weights are
    kept, and a look changes no bit of a training.
    """
    if not is_schedule_free(name):
        yield
        return
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
