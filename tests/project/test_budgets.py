from __future__ import annotations

from typing import Any

import pytest

from tests.budgets import Budgets, kind_of, over_budget


@pytest.mark.parametrize(
    ("marks", "kind"), [([], "quick"), (["cluster"], "cluster"), (["slow"], None), (["cluster", "slow"], None)]
)
def test_slow_tests_have_no_budget(marks: list[str], kind: str | None):
    assert kind_of(marks) == kind


def test_the_mean_of_a_tests_runs_is_compared_with_its_budget():
    runs = {"once": [5.0, 0.1, 0.1], "always": [2.5, 2.5, 2.5], "cluster": [19.0], "on Ray": [21.0], "other": [99.0]}
    kinds = {"once": "quick", "always": "quick", "cluster": "cluster", "on Ray": "cluster"}
    assert list(over_budget(runs, kinds)) == [
        "  21.0 s  on Ray  (cluster: 20 s; runs: 1)",
        "   2.5 s  always  (quick: 2 s; runs: 3)",
    ]


class Cache(dict[str, Any]):
    set = dict.__setitem__


class Config:
    """What a plugin uses of pytest's."""

    def __init__(self) -> None:
        self.cache = Cache()


class Terminal:
    """What a plugin uses of pytest's."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines.append(title)

    def line(self, text: str) -> None:
        self.lines.append(text)


def report(when: Any, seconds: float, outcome: Any = "passed") -> pytest.TestReport:
    return pytest.TestReport("a test", ("", 0, ""), {}, outcome, None, when, duration=seconds)


def test_three_runs_are_kept_and_all_phases_count():
    config: Any = Config()
    for seconds in (90.0, 0.5, 0.5, 0.5):
        budgets, terminal = Budgets(config), Terminal()
        for when, share in (("setup", 1.0), ("call", seconds), ("teardown", 0.25)):
            budgets.pytest_runtest_logreport(report(when, share))
        budgets.pytest_terminal_summary(terminal)  # type: ignore[arg-type]
        assert bool(terminal.lines) == (seconds == 90.0 or 91.25 in config.cache["starling/durations"]["a test"])
    assert config.cache["starling/durations"] == {"a test": [1.75, 1.75, 1.75]}


def test_what_fails_is_not_kept():
    config: Any = Config()
    budgets = Budgets(config)
    budgets.pytest_runtest_logreport(report("call", 5.0, "failed"))
    budgets.pytest_terminal_summary(Terminal())  # type: ignore[arg-type]
    assert config.cache == {}


def test_without_a_cache_nothing_is_said():
    class Bare:
        """Of ``-p no:cacheprovider``."""

    bare: Any = Bare()
    budgets = Budgets(bare)
    budgets.pytest_runtest_logreport(report("call", 5.0))
    terminal = Terminal()
    budgets.pytest_terminal_summary(terminal)  # type: ignore[arg-type]
    assert terminal.lines == []
