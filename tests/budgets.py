"""How long tests take: the last three runs of each, and a report of those that have become slow. Never a failure."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import pytest

BUDGET_S = {"quick": 2.0, "cluster": 20.0}
KEPT_RUNS = 3
_CACHE_KEY = "starling/durations"


def kind_of(marks: Collection[str]) -> str | None:
    """The budget under which a test with these marks falls; ``None`` for slow tests, which have none."""
    if "slow" in marks:
        return None
    return "cluster" if "cluster" in marks else "quick"


def over_budget(runs: Mapping[str, Sequence[float]], kinds: Mapping[str, str]) -> Iterator[str]:
    """One line for each test of ``kinds`` whose mean duration exceeds its budget, the slowest first."""
    means = {name: fmean(runs[name]) for name in kinds if runs.get(name)}
    for name, mean in sorted(means.items(), key=lambda item: (-item[1], item[0])):
        if mean > BUDGET_S[kinds[name]]:
            yield f"{mean:6.1f} s  {name}  ({kinds[name]}: {BUDGET_S[kinds[name]]:g} s; runs: {len(runs[name])})"


class Budgets:
    """Pytest plugin: keeps durations in the cache, and reports tests over their budget at the end of a session."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._kinds: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Setup and teardown count: a fixture that takes seconds is as slow as a test that does.
        self._seconds[report.nodeid] += report.duration
        kind = kind_of(report.keywords)
        if report.when == "call" and report.passed and kind is not None:
            self._kinds[report.nodeid] = kind

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        cache = getattr(self._config, "cache", None)  # there is none with -p no:cacheprovider
        if cache is None or not self._kinds:
            return
        runs: dict[str, list[float]] = dict(cache.get(_CACHE_KEY, {}))
        for name in self._kinds:
            runs[name] = [*runs.get(name, []), round(self._seconds[name], 3)][-KEPT_RUNS:]
        cache.set(_CACHE_KEY, runs)
        lines = list(over_budget(runs, self._kinds))
        if lines:
            terminalreporter.section("tests over their time budget (mean of their last runs)")
            for line in lines:
                terminalreporter.line(line)
