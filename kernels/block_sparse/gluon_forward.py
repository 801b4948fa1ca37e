"""The forward in Gluon, Triton's lower language, for Hopper GPUs: softmax while products run."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import triton

from ..checks import LayoutTensors
from .configs import TileConfig
from .launch import on_device
from .plan import cached_row_order

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
