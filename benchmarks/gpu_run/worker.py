"""The program of a stage's process, `python -m gpu_run.worker`; its environment names the stage."""

from __future__ import annotations

import importlib
import json
import os
import sys

from gpu_run.import_folder import ROOT
from gpu_run.journal import Journal

DRY_VARIABLE = "GPU_RUN_DRY"

# Modules with a `run(what, setting)`, by the part of a stage's name before the colon.
MODULES = {
    "compile": "compiling",
    "yardstick": "yardstick",
    "smoke": "smoke",
    "tune": "tune",
    "rates": "rates",
    "flex": "flex",
    "selecting": "selecting",
    "linear": "linear_rates",
    "summary": "summary_rates",
    "building": "building",
    "methods": "methods",
}


def main() -> int:
    journal = Journal.of_environment()
    kind, _, what = journal.stage.partition(":")
    if kind not in MODULES:
        print(f"no stage is called {journal.stage}", file=sys.stderr)
        return 2
    dry = os.environ.get(DRY_VARIABLE) == "1"
    if dry and kind != "compile":
        interpret()
    run = importlib.import_module(f"gpu_run.{MODULES[kind]}").run
    from gpu_run.setting import Setting

    # Imports run while another stage has the GPU. A line says when this stage has its turn.
    os.environ.update(json.loads(sys.stdin.readline()))
    setting = Setting.make(journal, dry)
    journal.add("facts", **setting.facts())
    run(what, setting)
    return 0


def interpret() -> None:
    """Let kernels run in Triton's interpreter, repaired as the project's tests repair it."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported by anything
    import pytest

    sys.path.append(str(ROOT / "tests" / "kernels"))
    importlib.import_module("interpreter").repair(pytest.MonkeyPatch())


if __name__ == "__main__":
    sys.exit(main())
