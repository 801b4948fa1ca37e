"""Several processes that make one video together, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .request import Request

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from diffattn import TokenGrid

_START = "torchrun --nproc-per-node 2 --no-python diffattn generate ..."


def rank() -> int:
    """The number of this process; process 0 speaks to the user and writes the files."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes(request: Request) -> None:
    """Refuse several processes that would all do the same, and a single one that would wait."""
    if request.context_parallel == "none":
        if count() > 1:
            raise UserError(
                f"torchrun started {count()} processes, each of which would make the same video:"
                f" give --context-parallel ulysses or ring"
            )
    elif count() < 2:
        raise UserError(
            f"--context-parallel {request.context_parallel} needs several processes, started with"
            f" {_START}"
        )


@contextlib.contextmanager
def together(request: Request) -> Iterator[None]:
    """Connect the processes while the block runs; only the output of process 0 is shown."""
    if request.context_parallel == "none":
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.accelerator.device_count() == 0:
        raise UserError(
            f"--context-parallel {request.context_parallel} needs an accelerator: diffusers finds"
            " none here"
        )
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group()
    with contextlib.ExitStack() as stack:
        if rank():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    # After an error the other processes may never reach this line: torchrun ends them.
    if ours:
        dist.destroy_process_group()


def own_device(device: torch.device, request: Request) -> torch.device:
    """The device of this process, of the type of `device`.

    Raises:
        UserError: if the processes cannot have a device each.
    """
    if request.context_parallel == "none":
        return device
    import torch

    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return device
    option = f"--context-parallel {request.context_parallel}"
    accelerators = torch.accelerator.device_count()
    if device.type != kind.type or request.device not in (None, device.type):
        raise UserError(
            f"{option} gives each process a {kind.type} device of its own:"
            f" leave --device {request.device} out"
        )
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= accelerators:
        raise UserError(
            f"{option}: there are {accelerators} {kind.type} devices for more processes"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


def spread(pipe: DiffusionPipeline, request: Request, grid: TokenGrid) -> None:
    """Spread the denoisers of a pipeline over the processes.

    Args:
        pipe: the pipeline.
        request: the complete request of the run.
        grid: the tokens of its video.

    Raises:
        UserError: if diffusers has no plan for a denoiser, or the heads or tokens cannot be divided
            among the processes.
    """
    if request.context_parallel == "none":
        return
    from diffusers import ContextParallelConfig

    from diffattn._compat import has_parallel_plan
    from diffattn.models import denoisers

    tokens = grid.tokens
    models: dict[str, Any] = denoisers(pipe)
    for model in models.values():
        name = type(model).__name__
        if not has_parallel_plan(model):
            raise UserError(
                f"{name} cannot be spread over processes: diffusers has no plan for it; leave"
                f" --context-parallel out"
            )
        heads = model.config.num_attention_heads
        if request.context_parallel == "ulysses" and heads % count():
            raise UserError(
                f"the {heads} attention heads of {name} cannot be divided among {count()}"
                f" processes: start another number of them, or use --context-parallel ring"
            )
    if tokens % count():
        raise UserError(
            f"{request.num_frames} frames {request.width}x{request.height} are {tokens} tokens,"
            f" which cannot be divided among {count()} processes: try another size or number of"
            f" processes"
        )
    for model in models.values():
        model.enable_parallelism(
            config=ContextParallelConfig(**{f"{request.context_parallel}_degree": count()})
        )
