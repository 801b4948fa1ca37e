"""What selects blocks by content, in Triton: means of blocks, scores of parts, choices, lists.

All functions have a counterpart of torch operators in `diffattn.routing` or `diffattn.selected`,
which runs where there is no GPU and where gradients are wanted. None waits for the device.
"""

import triton

from .best import best_of_rows
from .lists import list_kernel, listed
from .parts import scores_of_parts
from .pooling import pooled
from .rows import MOST_COLUMNS

# Whether the kernels run in Triton's interpreter, on tensors of the CPU.
INTERPRETED = not isinstance(list_kernel, triton.JITFunction)

__all__ = ["INTERPRETED", "MOST_COLUMNS", "best_of_rows", "listed", "pooled", "scores_of_parts"]
