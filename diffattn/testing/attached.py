"""A pytest plugin that runs tests twice: as they are, and with a method attached to every model.

    pytest -p diffattn.testing.attached --diffattn-method full --diffattn-report report.json FILE

Each test runs first without diffattn. Then the test runs again, and every pipeline and every model
of a known family that the test builds has the method attached. A test fails for pytest if it fails
only attached. A test that fails without diffattn too is skipped.

Nothing of diffattn imports this module, which needs pytest.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.runner import runtestprotocol

from diffattn.methods import from_dict
from diffattn.methods.base import Method
from diffattn.testing.construction import Construction

# The full mask: all token pairs attend, by the kernels and the path of the other methods.
_FULL = "dense"
_KEY = "diffattn"


@dataclass(frozen=True)
class Outcome:
    """A test without and with a method.

    Attributes:
        test: the test's node id.
        stock, attached: "passed", "failed" or "skipped"; `attached` is None if `stock` failed, for
            then the test does not run again.
        attachments: how many times a method was attached to a pipeline or a model.
        sparse_calls: attention calls under the method, except in compiled code.
        refused: reasons why a pipeline or a model has no method attached.
        message: the last line of the failure; "" where none is.
    """

    test: str
    stock: str
    attached: str | None = None
    attachments: int = 0
    sparse_calls: int = 0
    refused: tuple[str, ...] = ()
    message: str = ""

    @property
    def is_regression(self) -> bool:
        """Whether the test fails with the method attached alone."""
        return self.attached == "failed"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("diffattn")
    group.addoption(
        "--diffattn-method",
        metavar="METHOD",
        default="full",
        help="'full' (all token pairs attend; the default), the name of a method, or a method as"
        ' JSON, such as \'{"type": "gna", "window": 3}\'. Layers and steps stay dense only where'
        " the JSON says so",
    )
    group.addoption(
        "--diffattn-report",
        metavar="FILE",
        type=Path,
        help="write the outcome of each test, without and with the method, as JSON",
    )


def pytest_configure(config: pytest.Config) -> None:
    text = config.getoption("--diffattn-method")
    try:
        method = parse_method(text)
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"--diffattn-method {text}: {error}") from None
    report = config.getoption("--diffattn-report")
    if report is not None and not report.parent.is_dir():
        raise pytest.UsageError(f"--diffattn-report {report}: there is no folder {report.parent}")
    config.pluginmanager.register(Attached(method, report), "diffattn-attached-runs")


def parse_method(text: str) -> Method:
    """The method of `--diffattn-method`, sparse in every layer and step unless `text` says not.

    Raises:
        TypeError, ValueError: if no method has this name or these parameters.
    """
    entry: Any = {"type": _FULL if text == "full" else text}
    if text.lstrip().startswith("{"):
        entry = json.loads(text)
    return from_dict({"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0, **entry})


@dataclass
class Attached:
    """The runs of the tests of a session, and their outcomes."""

    method: Method
    report: Path | None
    outcomes: list[Outcome] = field(default_factory=list)
    construction: Construction | None = None

    def pytest_sessionstart(self) -> None:
        self.construction = Construction(self.method)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._both(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # With xdist, tests run in processes of their own; reports arrive here.
        for name, value in report.user_properties:
            if name == _KEY and report.when == "teardown":
                self.outcomes.append(Outcome(**json.loads(str(value))))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.construction is not None:
            self.construction.restore()
        if self.report is not None and not hasattr(session.config, "workerinput"):
            content = {
                "method": self.method.to_dict(),
                "versions": _versions(),
                "regressions": [outcome.test for outcome in self._regressions()],
                "tests": [asdict(outcome) for outcome in self.outcomes],
            }
            self.report.write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"diffattn attached: {self.method}")
        count = {
            "pass or skip both ways": sum(
                o.attached in ("passed", "skipped") for o in self.outcomes
            ),
            "fail without diffattn too": sum(o.stock == "failed" for o in self.outcomes),
            "with attention calls under the method": sum(o.sparse_calls > 0 for o in self.outcomes),
            "pass without diffattn, and fail attached": len(self._regressions()),
        }
        for words, number in count.items():
            terminalreporter.line(f"{number:5} {words}")
        for outcome in self._regressions():
            terminalreporter.line(f"      {outcome.test}: {outcome.message}")

    def _regressions(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.is_regression]

    def _both(self, item: pytest.Item) -> Sequence[pytest.TestReport]:
        """The reports of a test's run with the method, or of the run without that failed."""
        assert self.construction is not None
        state = _random_state()
        reports = _run(item)
        outcome = Outcome(item.nodeid, stock=_result(reports))
        if outcome.stock == "failed":
            outcome = Outcome(item.nodeid, "failed", message=_last_line(reports))
            for report in reports:
                _excuse(report, item)
        else:
            _set_random_state(state)
            with self.construction.attaching() as made:
                reports = _run(item)
            outcome = Outcome(
                item.nodeid,
                outcome.stock,
                _result(reports),
                attachments=len(made.attachments),
                sparse_calls=sum(attachment.sparse_calls for attachment in made.attachments),
                refused=tuple(dict.fromkeys(made.refused)),
                message=_last_line(reports),
            )
        reports[-1].user_properties.append((_KEY, json.dumps(asdict(outcome))))
        return reports


def _run(item: pytest.Item) -> list[pytest.TestReport]:
    """Run a test with fixtures and an instance of its own, whatever their scope."""
    if getattr(item, "cls", None) is not None:
        for name in ("_instance", "_obj"):  # which pytest keeps for a second run
            item.__dict__.pop(name, None)
    if "torch._dynamo" in sys.modules:
        # Code compiled by the run before counts as compiled again in this one.
        sys.modules["torch._dynamo"].reset()
    return runtestprotocol(item, log=False, nextitem=None)


def _result(reports: Sequence[pytest.TestReport]) -> str:
    outcomes = {report.outcome for report in reports}
    return next(name for name in ("failed", "skipped", "passed") if name in outcomes)


def _last_line(reports: Sequence[pytest.TestReport]) -> str:
    for report in reports:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(report.longrepr) if crash is None else crash.message
            return (text.strip() or "no message").splitlines()[0]
    return ""


def _excuse(report: pytest.TestReport, item: pytest.Item) -> None:
    """Make a failure without diffattn a skipped test."""
    if report.failed:
        path, line, _ = item.location
        reason = f"Skipped: fails without diffattn too: {_last_line([report])}"
        report.outcome = "skipped"
        report.longrepr = (path, (line or 0) + 1, reason)


def _random_state() -> tuple[Any, ...]:
    import numpy as np

    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_state(state: tuple[Any, ...]) -> None:
    import numpy as np

    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _versions() -> dict[str, str]:
    import diffusers

    return {"diffusers": diffusers.__version__, "torch": torch.__version__}
