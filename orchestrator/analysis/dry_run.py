"""Dry runs: every program, exchange and message of a run in the simulator, with training that only takes time.

Bytes are what the run's ledger counts, and seconds are the virtual clock's, for any algorithm. Local steps and
gradients are not computed: parameters stay as they are, and every gradient is zero. Traffic that depends on values
(an outlier that sends nothing, say) is therefore that of nodes in agreement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from starling.actors.host.computation import Computation
from starling.actors.training.optimizers import Schedule
from starling.actors.wire.tickets import Stale
from starling.algorithms.api import Batch, Gradient, GradientReport, Train, TrainReport
from starling.orchestrator.analysis.estimates import CHECK_BYTES, layout_of, simulation_bytes
from starling.orchestrator.config.sections import CheckpointConfig, FaultsConfig
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records.observers import Observer
from starling.orchestrator.runtimes.simulator.models import SimulatedModels
from starling.orchestrator.runtimes.simulator.runtime import Simulator
from starling.orchestrator.runtimes.user_code import user_code
from starling.orchestrator.units import bytes_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from starling.actors.replica.replica import Replica
    from starling.actors.wire.tickets import Compute
    from starling.algorithms.api import Layout, NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import Summary
    from starling.orchestrator.runtimes.events import NodeFacts

_NO_DEADLINE_S = 1e12
"""Deadline in virtual seconds: on a slow link an exchange takes as long as it takes."""


def dry_run(config: Config, rounds: int) -> Summary:
    """Run ``rounds`` rounds of a configuration without training, losses, checkpoints or a run directory.

    Raises:
        StarlingError: the run cannot begin, or its program fails.
    """
    cluster = config.cluster.model_copy(update={"round_deadline_s": _NO_DEADLINE_S})
    evaluation = config.evaluation.model_copy(update={"every_rounds": 0, "per_node": False, "average": None})
    optimizer = config.optimizer.model_copy(update={"schedule": Schedule()})  # one fits any length
    update = {
        "rounds": rounds,
        "cluster": cluster,
        "optimizer": optimizer,
        "evaluation": evaluation,
        "faults": FaultsConfig(),
        "checkpoint": CheckpointConfig(every_rounds=0),
    }
    config = config.model_copy(update=update)
    runtime = _DrySimulator(config)
    try:
        return Controller(config, runtime, Observer(), run_id="dry", run_dir="").run()
    finally:
        runtime.close()


def require_memory(config: Config) -> Layout:
    """Return the layout of a run's model, of which a dry run holds a copy or more for each node.

    Raises:
        ConfigError: they do not fit into this machine's memory.
    """
    spec = config.replica_spec()
    with user_code(0, 0):
        layout = layout_of(spec, CHECK_BYTES)
    needed, there = simulation_bytes(spec, layout, config.num_nodes), psutil.virtual_memory().available
    if needed > there:
        raise ConfigError(
            f"task: a dry round of {config.num_nodes} nodes of this model needs {bytes_text(needed)} of memory, and "
            f"this machine has {bytes_text(there)} left; take fewer nodes, or a smaller model and step time"
        )
    return layout


class _DrySimulator(Simulator):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.models = _Unevaluated(self._nodes)

    def start(self) -> list[NodeFacts]:
        facts = super().start()
        host = self.host
        host.computation = _NoTraining(host.replicas, host.fences, host.times, host.logs)
        return facts


class _Unevaluated(SimulatedModels):
    def evaluate(self, nodes: Sequence[NodeId], max_batches: int | None, *, averaged: bool = False) -> dict[str, float]:
        del nodes, max_batches, averaged
        return {}


class _NoTraining(Computation):
    """Answers what programs train or differentiate without doing it; losses and batches are real."""

    def run(self, requests: Sequence[tuple[NodeId, Compute]]) -> list[Any]:
        return [self._answer(node, operation) for node, operation in requests]

    def _answer(self, node: NodeId, operation: Compute) -> Any:  # noqa: ANN401 - what the operation gives
        if not isinstance(operation, Train | Gradient):
            return super().run([(node, operation)])[0]
        if self._fences[node].is_set():
            return Stale()
        replica = self._replicas[node]
        try:
            return _trained(replica, operation) if isinstance(operation, Train) else _gradient(replica, operation)
        except Exception as error:  # noqa: BLE001 - whatever a user's data raise
            return self._outcome(node, error)


def _trained(replica: Replica, operation: Train) -> TrainReport:
    steps, size = replica.trainer.num_steps(operation), replica.trainer.step_size(operation)
    return TrainReport(0.0, sum(len(replica.data.draw(size)) for _ in range(steps)), steps, 0.0)


def _gradient(replica: Replica, operation: Gradient) -> GradientReport:
    batch = replica.data.batch(Batch()) if operation.batch is None else operation.batch
    return GradientReport(torch.zeros_like(replica.parameters), 0.0, batch.num_samples)
