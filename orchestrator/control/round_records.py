"""Records committed rounds: what each cost, what came of it, who took part."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from starling.actors.wire.tickets import mean_loss
from starling.algorithms.api import SERVER
from starling.orchestrator.records.observers import RoundRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from starling.actors.host.host import Returned
    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.run_state import RunState


class Cost(NamedTuple):
    """Cost of a run up to a moment, or of one round."""

    seconds: float = 0.0
    """Seconds on the runtime's clock."""
    payload: int = 0
    transport: int = 0
    """Bytes between processes; 0 where nothing moves between any."""

    def since(self, before: Cost) -> Cost:
        """Return the cost between two moments."""
        return Cost(self.seconds - before.seconds, self.payload - before.payload, self.transport - before.transport)


def spread_of(reported: Iterable[tuple[NodeId, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the mean, the minimum and the maximum of each metric over the reports that have it.

    >>> spread_of([(0, {"drift": 1.0}), (1, {"drift": 4.0}), (2, {})])
    {'drift': {'mean': 2.5, 'min': 1.0, 'max': 4.0}}
    """
    columns: defaultdict[str, list[float]] = defaultdict(list)
    for _, metrics in reported:
        for name, value in metrics.items():
            columns[name].append(value)
    return {
        name: {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        for name, values in sorted(columns.items())
    }


def _last_of_each(reported: Iterable[tuple[NodeId, Mapping[str, float]]]) -> dict[NodeId, dict[str, float]] | None:
    found: dict[NodeId, dict[str, float]] = {}
    for node, metrics in reported:
        found[node] = found.get(node, {}) | dict(metrics)
    return found or None


class RoundRecorder:
    """Makes the record of each committed round, its evaluation included."""

    def __init__(self, state: RunState) -> None:
        self._state = state

    def cost(self) -> Cost:
        """Return what the run has cost so far."""
        state, runtime = self._state, self._state.run.runtime
        return Cost(runtime.now, state.ledger.payload, runtime.transport_nbytes or 0)

    def done(
        self,
        reports: Sequence[tuple[NodeId, Returned]],
        committed: Mapping[NodeId, int],
        cost: Cost,
        *,
        alike: bool,
        contributing: int,
        in_view: int,
        late: int = 0,
    ) -> None:
        """Record the round that was committed last.

        Args:
            reports: of the nodes' programs that returned in it.
            committed: whose mean model is evaluated, if that is due, each after this round of its own.
            cost: of this round.
            alike: these have one model, and one of them is asked.
            contributing: nodes in its last exchange.
            in_view: nodes with which it began.
            late: nodes that were cancelled.
        """
        state, run, number = self._state, self._state.run, self._state.committed
        metrics, node_metrics, evaluate_seconds = state.evaluation.after(number, committed, alike=alike)
        residuals, exist = state.residuals.untold(), state.residuals.exist
        trained = [report for node, report in reports if node != SERVER]
        losses = [(report.loss, report.num_samples) for report in trained if report.loss is not None]
        train_seconds = max((report.train_seconds for report in trained), default=0.0)
        reported = [(node, report.metrics) for node, report in reports if report.metrics]
        run.observer.on_round(
            RoundRecord(
                round=number,
                loss=mean_loss([(loss, count) for loss, count in losses if not math.isnan(loss)]),
                num_samples=sum(report.num_samples for report in trained),
                nodes=len(state.members),
                contributing=contributing,
                alive=len(state.roster.nodes),
                in_view=in_view,
                late=late,
                payload_bytes=cost.payload,
                transport_bytes=None if run.runtime.transport_nbytes is None else cost.transport,
                seconds=cost.seconds,
                train_seconds=train_seconds,
                exchange_seconds=max(0.0, cost.seconds - train_seconds),
                evaluate_seconds=evaluate_seconds,
                metrics=metrics,
                node_metrics=node_metrics,
                reported=spread_of(reported),
                node_reported=_last_of_each(reported) if run.config.evaluation.per_node else None,
                samples=state.sample_counts,
                residuals_lost=len(residuals) if exist else None,
                residual_norm_lost=math.hypot(*residuals) if exist else None,
            )
        )
