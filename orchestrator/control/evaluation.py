"""Evaluates the run's model, and fetches it at the end."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from starling.orchestrator.errors import NodeGoneError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.context import RunContext
    from starling.orchestrator.protocol.byte_ledger import Ledger
    from starling.orchestrator.runtimes.events import FinalModel

_T = TypeVar("_T")


class Evaluated(NamedTuple):
    """Metrics of one round; None where it was not evaluated."""

    metrics: dict[str, float] | None = None
    """Metrics of the nodes' mean model."""
    node_metrics: dict[NodeId, dict[str, float]] | None = None
    """Metrics of each node's own model."""
    seconds: float = 0.0


class Evaluation:
    """Evaluates the mean model of nodes when ``evaluation`` of the configuration says so."""

    def __init__(self, run: RunContext, ledger: Ledger) -> None:
        self._run = run
        self._ledger = ledger
        self.metrics: dict[str, float] = {}
        """The last metrics of the mean model, and of its running average."""

    def after(self, number: int, committed: Mapping[NodeId, int], *, alike: bool) -> Evaluated:
        """Evaluate after round ``number``, if that is due.

        Args:
            number: the round.
            committed: whose mean model it is, each after this round of its own.
            alike: they have one model, and one of them is asked.
        """
        config = self._run.config.evaluation
        is_last = number == self._run.config.rounds - 1
        if not is_last and not (config.every_rounds and (number + 1) % config.every_rounds == 0):
            return Evaluated()
        runtime, began = self._run.runtime, time.monotonic()
        runtime.states.settle(committed)
        nodes = tuple(committed)
        self.metrics = self._ask(nodes, lambda asked: runtime.models.evaluate(asked, config.max_batches), alike=alike)
        if config.average is not None:
            of_average = self._ask(
                nodes, lambda asked: runtime.models.evaluate(asked, config.max_batches, averaged=True), alike=alike
            )
            self.metrics |= {f"{config.average.label}_{name}": value for name, value in of_average.items()}
        node_metrics = self._of_each(nodes) if config.per_node and not alike else None
        return Evaluated(self.metrics, node_metrics, time.monotonic() - began)

    def fetch(self, nodes: Sequence[NodeId], *, alike: bool, averaged: bool = False) -> FinalModel:
        """Fetch the mean model of ``nodes``, or one node's if they are ``alike``; ``averaged``: the running average."""
        models = self._run.runtime.models
        return self._ask(nodes, lambda asked: models.fetch(asked, averaged=averaged), alike=alike)

    def _of_each(self, nodes: Sequence[NodeId]) -> dict[NodeId, dict[str, float]]:
        """Evaluate each node's own model, without nodes that die meanwhile."""
        found: dict[NodeId, dict[str, float]] = {}
        for node in nodes:
            with contextlib.suppress(NodeGoneError):
                found[node] = self._run.runtime.models.evaluate((node,), self._run.config.evaluation.max_batches)
        return found

    def _ask(self, nodes: Sequence[NodeId], what: Callable[[Sequence[NodeId]], _T], *, alike: bool) -> _T:
        """Ask ``nodes`` for their mean model, without nodes that die meanwhile.

        Raises:
            NodeGoneError: all of them did.
        """
        there = list(nodes)
        while True:
            asked = there[:1] if alike else there
            try:
                answer = what(asked)
            except NodeGoneError as error:
                there.remove(error.node)
                if not there:
                    raise
            else:
                layout = self._run.runtime.layout
                self._ledger.book("evaluation", (len(asked) - 1) * (layout.nbytes + layout.buffer_nbytes))
                return answer
