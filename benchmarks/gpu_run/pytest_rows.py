"""A plugin of pytest that writes a row for every test when the test ends."""

from __future__ import annotations

import os

import pytest

from gpu_run.journal import Journal


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # With xdist the reports of all workers come to the process that started them, and only there.
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        facts = {"seconds": round(report.duration, 2)}
        if report.failed:
            facts["error"] = report.longreprtext[-600:]
        Journal.of_environment().add("test", test=report.nodeid, outcome=report.outcome, **facts)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        Journal.of_environment().add(
            "test", test=report.nodeid, outcome="not collected", error=report.longreprtext[-600:]
        )
