"""Makes `python benchmarks/machine_code` run the package beside the other benchmarks."""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from machine_code.command import main

if __name__ == "__main__":
    sys.exit(main())
