"""Golden files of methods that select blocks, as tensors: goldens/README.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Golden:
    """The numbers of a file.

    Attributes:
        values: scalars, and arrays as tensors. Those called `*_i8` are multiplied by `unit`, in
            float64, and lose the suffix.
    """

    values: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)


def read(path: Path) -> Golden:
    out: dict[str, Any] = {}
    with np.load(path) as file:
        unit = float(file["unit"]) if "unit" in file.files else 1.0
        for name in file.files:
            array = file[name]
            if array.ndim == 0:
                out[name] = array.item()
            elif name.endswith("_i8"):
                out[name.removesuffix("_i8")] = torch.from_numpy(array.astype(np.float64) * unit)
            else:
                out[name] = torch.from_numpy(array)
    return Golden(out)
