"""A pytest plugin for areas that run beside each other on one screen: a line a file, a failure at once, one at the end.

    python -m pytest -p tests.support.progress --area engine tests/engine

Lines begin with the area's name. A test that runs long is named every half minute. What became of the area goes to
`.venv/areas/NAME.json`, for `python -m tests.support.areas`.
"""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import engines

FOLDER = Path(".venv") / "areas"
_PATIENCE = 30.0  # seconds without a line


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --area."""
    parser.addoption("--area", help="name that every line begins with")


@pytest.hookimpl(trylast=True)  # behind the terminal reporter
def pytest_configure(config: pytest.Config) -> None:
    """Begin to print lines if there is an area."""
    if area := config.getoption("--area"):
        config.pluginmanager.register(Progress(area, config), "area-progress")


class Progress:
    """Prints the lines of one area."""

    def __init__(self, area: str, config: pytest.Config) -> None:
        self._area, self._config = area, config
        self._out = os.fdopen(os.dup(1), "w")  # what tests print is captured from descriptor 1
        self._began = self._told = time.monotonic()
        self._total = self._done = 0
        self._file = self._test = ""
        self._over = threading.Event()
        (FOLDER / f"{area}.json").unlink(missing_ok=True)
        config.pluginmanager.get_plugin("terminalreporter").showfspath = False
        threading.Thread(target=self._remind, daemon=True).start()

    def _line(self, text: str) -> None:
        spent = time.monotonic() - self._began
        share = f"{100 * self._done // self._total if self._total else 0:3d}%"
        print(f"{self._area:12} {share} {_clock(spent):>6}  {text}", file=self._out, flush=True)
        self._told = time.monotonic()

    def _remind(self) -> None:
        while not self._over.wait(1.0):
            if time.monotonic() - self._told > _PATIENCE and self._test:
                self._line(f"still in {self._test}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count the tests that will run."""
        self._total = len(session.items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Print a line where a file begins."""
        self._test = nodeid
        file = nodeid.partition("::")[0]
        if file != self._file:
            self._file = file
            self._line(file)

    def pytest_runtest_logfinish(self) -> None:
        """Count the test."""
        self._done += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> Any:
        """Leave out the letter that pytest prints for each test."""
        category, *_ = yield
        return category, "", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print a failure at once, with the command that runs it alone."""
        if report.failed:
            self._line(f"FAILED {report.nodeid}\n    alone: {alone(report.nodeid)}")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, exitstatus: int) -> Any:
        """Stop reminding, and write down what became of the area."""
        self._over.set()
        done = yield
        counts = self._config.pluginmanager.get_plugin("terminalreporter").stats
        found = {
            "area": self._area,
            "exit": int(exitstatus),
            "seconds": round(time.monotonic() - self._began, 1),
            **{name: len(counts.get(name, [])) for name in ("passed", "failed", "error", "skipped")},
            "engines": [round(seconds, 1) for _, seconds in engines.STARTS],
        }
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{self._area}.json").write_text(json.dumps(found))
        return done


def alone(nodeid: str) -> str:
    """The command that runs one test, slow or not."""
    return f".venv/bin/python -m pytest {shlex.quote(nodeid)}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
