"""Makes the benchmarks' modules importable: they are scripts, in no package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
