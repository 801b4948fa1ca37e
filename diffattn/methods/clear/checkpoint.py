"""The published weights of CLEAR: attention projections of a Flux model, and weights of cells."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from diffattn.methods.checkpoint import (
    check_names,
    check_shapes,
    models_in,
    parameters_by_own_name,
    shapes_in,
)
from diffattn.methods.clear.method import CLEARAttn
from diffattn.models import family_of

# The fine-tuned parameters of an attention module; projections of the text's own stream are not.
_PROJECTION = re.compile(r"to_(q|k|v|out\.\d+)\.(weight|bias)")
_PUBLISHED_CELLS = ".processor.spatial_weight"
_CELLS = f".{CLEARAttn.type}.spatial_weight"


def load_clear_checkpoint(target: Any, path: str | PathLike[str]) -> None:
    """Load a checkpoint of CLEAR, such as clear_local_16.safetensors, into a Flux model.

    The weights replace the model's own and stay when the method is taken off. All keys are checked
    before the first weight changes. A checkpoint for pooled keys, such as
    clear_local_8_down_4.safetensors, needs a `CLEARAttn` of the same `down_factor` attached before.

    Args:
        target: a diffusers pipeline, or its transformer.
        path: a file of https://huggingface.co/Huage001/CLEAR, or a file with the same keys: names
            of the transformer's parameters, and `<module>.processor.spatial_weight` for pooled
            keys.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file's keys or shapes do not fit the model and the attached method.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {path}; download one from"
            f" https://huggingface.co/Huage001/CLEAR first"
        )
    for model in models_in(target):
        with safe_open(path, framework="pt") as file:
            goals = _goals(model, shapes_in(file), path)
            for key, parameter in goals.items():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(key).view(parameter.shape))


def _goals(
    model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, torch.nn.Parameter]:
    """The parameter of the model for each key of the checkpoint."""
    parameters = parameters_by_own_name(model)
    sites = list(family_of(model).layers(model))
    expected = {
        name
        for site in sites
        for name in parameters
        if name.startswith(site + ".") and _PROJECTION.fullmatch(name[len(site) + 1 :])
    }
    cells = {
        site + _PUBLISHED_CELLS: parameters[site + _CELLS]
        for site in sites
        if site + _CELLS in parameters
    }
    _check_cells(shapes, cells, path)
    what = f"{path.name} does not fit {type(model).__name__}"
    wanted = expected | cells.keys()
    check_names(
        what,
        shapes.keys(),
        wanted,
        strange="keys that the model has no attention parameter for",
        missing="no key for parameters of the model's attention",
        advice=(
            "; it must be a CLEAR checkpoint for this model, whose projections must not be fused"
        ),
    )
    # Published cells have axes for batch, heads and channels, all of size 1.
    squeezed = {
        key: tuple(cell.shape)
        for key, cell in cells.items()
        if math.prod(shapes[key]) == cell.numel()
    }
    goals = {key: cells[key] if key in cells else parameters[key] for key in sorted(wanted)}
    check_shapes(what, {**shapes, **squeezed}, goals)
    return goals


def _check_cells(
    shapes: Mapping[str, tuple[int, ...]], cells: Mapping[str, torch.nn.Parameter], path: Path
) -> None:
    """Raise ValueError unless checkpoint and attached method agree on pooled keys."""
    theirs = {math.isqrt(math.prod(shape)) for key, shape in shapes.items() if _is_cells(key)}
    ours = {len(weight) for weight in cells.values()}
    if theirs != ours:
        has, wants = _down_factors(theirs), _down_factors(ours)
        raise ValueError(
            f"{path.name} is for CLEARAttn with down_factor={has}, but the model is attached with"
            f" {wants}; attach CLEARAttn(down_factor={has}) first"
        )


def _is_cells(key: str) -> bool:
    return key.endswith(_PUBLISHED_CELLS)


def _down_factors(found: set[int]) -> str:
    return " and ".join(map(str, sorted(found))) or "1"
