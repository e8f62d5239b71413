"""Adds up the rounds of single nodes until they make a round of the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from starling.actors.wire.tickets import Returned
from starling.algorithms.api import SERVER
from starling.orchestrator.control.round_records import Cost

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.round_records import RoundRecorder


class Tally:
    """Collect the reports of nodes since the last recorded round; the server's rounds are not counted."""

    def __init__(self, recorder: RoundRecorder) -> None:
        self._recorder = recorder
        self.num_commits = 0
        """Number of commits since the run began."""
        self.last = -1
        """The node that committed last."""
        self._reports: list[tuple[NodeId, Returned]] = []
        self._contributed: set[NodeId] = set()
        self._mark = Cost()
        """Cost of the run up to the last recorded round."""
        self._spent = Cost()
        """Cost of the open round when the run was saved."""

    def start(self) -> None:
        """Measure the cost of the open round from now on, and add what it had cost before a resumption."""
        self._mark = self._recorder.cost().since(self._spent)

    def add(self, node: NodeId, report: Returned) -> None:
        """Count a round of ``node``."""
        self._reports.append((node, report))
        if node != SERVER:
            self.num_commits += 1
            self.last = node
            self._contributed.add(node)

    def take(self) -> tuple[list[tuple[NodeId, Returned]], int, Cost]:
        """Return the reports, the number of nodes that made them, and their cost; begin with none."""
        before, self._mark = self._mark, self._recorder.cost()
        found = self._reports, len(self._contributed), self._mark.since(before)
        self._reports, self._contributed = [], set()
        return found

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data; reports as far as records of rounds need them."""
        return {
            "commits": self.num_commits,
            "last": self.last,
            "since": [[one.loss, one.num_samples, one.train_seconds] for _, one in self._reports],
            "reported": [[node, one.metrics or {}] for node, one in self._reports],
            "contributed": sorted(self._contributed),
            "mark": list(self._recorder.cost().since(self._mark)),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``to_json`` gave; ``start`` follows when the clock is set."""
        self.num_commits, self.last = state["commits"], state["last"]
        # A checkpoint of before nodes reported metrics has no second list, and has no report of a server.
        reported = state.get("reported") or [(0, {})] * len(state["since"])
        self._reports = [
            (node, Returned("", 0, loss, count, seconds, metrics=_numbers(metrics)))
            for (node, metrics), (loss, count, seconds) in zip(reported, state["since"], strict=True)
        ]
        self._contributed = set(state["contributed"])
        seconds, payload, transport = state["mark"]
        self._spent = Cost(seconds, int(payload), int(transport))


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}
