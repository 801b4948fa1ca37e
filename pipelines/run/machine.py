"""The device as a record describes it, and the messages of other libraries."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from pathlib import Path
from typing import Any

# torchao lists kernels of other machines that it does not load, and registers types in a way that
# torch no longer wants; bitsandbytes, a faster kernel of another package.
_WRITE_AT_IMPORT = (
    "torchao",
    "bitsandbytes",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
)


def describe_device(device: str) -> dict[str, Any]:
    """The type and the name of a device for a record; for the CPU also the number of threads."""
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        return {"type": kind, "name": cpu_name(), "threads": torch.get_num_threads()}
    # Apple's devices have no names.
    name_of = getattr(getattr(torch, kind), "get_device_name", str)
    return {"type": kind, "name": name_of(device)}


def quiet_imports() -> None:
    """Keep the log lines off the screen that libraries write as diffusers imports them.

    diffusers imports every library for quantised weights that is installed. Call before it does.
    """
    if "DIFFUSERS_VERBOSITY" in os.environ:
        return
    for name in _WRITE_AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Keep other libraries' bars, advice and deprecations off the screen.

    This package itself checks what matters. The environment variable DIFFUSERS_VERBOSITY brings the
    messages back.
    """
    if "DIFFUSERS_VERBOSITY" in os.environ:
        return
    import diffusers
    import huggingface_hub
    import transformers

    for advice_to_developers in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", advice_to_developers)
    for library in (diffusers.utils, transformers.utils):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()


def cpu_name() -> str:
    """The name of the processor."""
    # platform.processor() is empty on most Linux systems.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
