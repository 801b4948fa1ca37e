"""`python3 benchmarks/gpu_run run --minutes 8`; docs/gpu.md says more."""

import sys
from pathlib import Path

# Python puts this folder on its path; the imports need its parent there instead.
sys.path[0] = str(Path(__file__).parents[1])

from gpu_run.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
