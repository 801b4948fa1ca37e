"""Errors of the library and of models that are bad input: one line for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UserError

# Words of torch's errors where a CPU has too little memory; on a GPU the error has a class.
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "tried to allocate")
_OUT_OF_MEMORY = "out of memory: try fewer frames, a smaller size, --dtype bfloat16 or --offload"


@contextmanager
def refusals() -> Iterator[None]:
    """Turn refusals of arguments, and a lack of memory, into errors for the user.

    Raises:
        UserError: in the place of a ValueError, and as `lacks`.
    """
    try:
        with lacks():
            yield
    except ValueError as error:
        raise UserError(error) from error


@contextmanager
def lacks(no_memory: str = _OUT_OF_MEMORY) -> Iterator[None]:
    """Turn a lack of memory, or of an implementation, into an error for the user.

    Args:
        no_memory: what to say where memory is missing.

    Raises:
        UserError: in the place of a NotImplementedError, or an error that says that memory is
            missing. All other errors pass.
    """
    try:
        yield
    except NotImplementedError as error:
        raise UserError(error) from error
    except (MemoryError, RuntimeError) as error:
        if is_lack_of_memory(error):
            raise UserError(no_memory) from None
        raise


def is_lack_of_memory(error: Exception) -> bool:
    """Whether an error of Python or torch says that memory is missing."""
    import torch

    words = any(words in str(error) for words in _NO_MEMORY)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or words


def gave_nan(dtype: str) -> str:
    """What to say of frames that hold NaN."""
    if dtype == "float32":
        return (
            "the model gave NaN in float32: its weights or its LoRA hold NaN, or a setting such as"
            " --guidance-scale is too large"
        )
    others = "--dtype float32" + (" or --dtype bfloat16" if dtype == "float16" else "")
    return f"the model gave NaN in {dtype}: try {others}"
