"""The scorecard: every test here is one check, says how often it tried and how often it held, and ends in a table.

``make scorecard`` runs all of them and writes docs/scorecard.md; those that are not marked ``slow`` are part of the
ordinary tests. A check is ``@pytest.mark.check("R1", "what holds")`` and calls ``tally(held)`` once for every trial; it
fails when one trial does not hold, or when fewer were made than ``tries`` says.
"""

import datetime
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ORDER = "RFNIP"


class Tally:
    """Trials of one check."""

    def __init__(self) -> None:
        self.tried = self.held = 0
        self.missed: list[str] = []

    def __call__(self, held: bool, what: str = "") -> None:
        self.tried += 1
        self.held += held
        if not held:
            self.missed.append(what)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scorecard", help="write the table of checks to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "check(id, what, tries): a line of the scorecard")
    config.stash[ROWS] = {}


FAILED = pytest.StashKey[bool]()
ROWS = pytest.StashKey[dict[str, tuple[str, int, int, float, bool]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Counts trials; see the module's docstring."""
    mark = request.node.get_closest_marker("check")
    assert mark is not None, "a test of the scorecard has a check mark"
    name, what, tries = mark.args
    count, started = Tally(), time.monotonic()
    yield count
    if request.node.stash.get(FAILED, False):
        count(False, "what is not counted")
    quick = request.node.get_closest_marker("slow") is None
    seconds = time.monotonic() - started
    request.config.stash[ROWS][name] = (what, count.tried, count.held, seconds, quick)
    assert not count.missed, f"{name}: {len(count.missed)} of {count.tried} did not hold: {count.missed[:5]}"
    assert count.tried >= tries, f"{name}: {count.tried} trials, not {tries}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = sorted(config.stash[ROWS].items(), key=lambda row: (ORDER.index(row[0][0]), int(row[0][1:])))
    if not rows:
        return
    terminalreporter.section("scorecard")
    for name, (what, tried, held, seconds, _) in rows:
        terminalreporter.line(f"{name:4} {held:5}/{tried:<5} {seconds:6.1f} s  {what}")
    if file := config.getoption("--scorecard", None):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        head = [
            "# Scorecard",
            "",
            "What holds when things go wrong, tried as often as said by `make scorecard`; checks marked * are part of",
            f"the ordinary tests. Commit {commit.stdout.strip()}, {datetime.date.today()}.",
            "",
            "| check | what holds | tried | held | seconds |",
            "|---|---|---:|---:|---:|",
        ]
        lines = [
            f"| {name}{'*' if quick else ''} | {what} | {tried} | {held} | {seconds:.1f} |"
            for name, (what, tried, held, seconds, quick) in rows
        ]
        Path(file).write_text("\n".join([*head, *lines, ""]), encoding="utf-8")
