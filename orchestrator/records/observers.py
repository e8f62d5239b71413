"""Round records, the run summary, and the observers that receive them."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from starling.algorithms.api import Layout
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.round_log import Entry
    from starling.orchestrator.runtimes.events import FinalModel, NodeFacts


Status: TypeAlias = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class RoundRecord:
    """One committed round."""

    round: int
    loss: float | None
    """Mean training loss over the samples of the nodes that trained; ``None`` if nobody did."""
    num_samples: int
    nodes: int
    """Committed members."""
    contributing: int
    """Members in the closed set of the last exchange."""
    alive: int
    """Nodes that are there when the round is committed, those that came too late for it too."""
    in_view: int
    """Members with which the round began."""
    late: int
    """Members that were cancelled: too slow, or not reached."""
    payload_bytes: int
    transport_bytes: int | None
    seconds: float
    """Seconds on the runtime's clock."""
    train_seconds: float
    """Training time of the slowest node."""
    exchange_seconds: float
    """The rest of the round: exchanges and waiting for others."""
    evaluate_seconds: float = 0.0
    """Seconds of the evaluation on this machine's clock, not part of ``seconds``."""
    metrics: dict[str, float] | None = None
    """Metrics of the model after the round, and of its running average, if they were evaluated."""
    node_metrics: dict[int, dict[str, float]] | None = None
    """Metrics of each node's own model, where these differ and ``evaluation.per_node`` is set."""
    reported: dict[str, dict[str, float]] = field(default_factory=dict)
    """``mean``, ``min`` and ``max`` over nodes of each metric that programs have reported (``Node.report``)."""
    node_reported: dict[int, dict[str, float]] | None = None
    """Reported metrics by node, if ``evaluation.per_node`` is set."""
    samples: dict[str, int] = field(default_factory=dict)
    """Counts of drawn, committed, redrawn and lost samples up to this round, defined at ``Summary.samples``."""

    residuals_lost: int | None = None
    """Number of nodes lost since the last commit with an unsent error-feedback residual; ``None`` in a run without
    residuals."""
    residual_norm_lost: float | None = None
    """Norm of all lost residuals."""

    @property
    def spread(self) -> dict[str, tuple[float, float]]:
        """The least and the greatest value of each metric among the nodes."""
        columns: dict[str, list[float]] = {}
        for values in (self.node_metrics or {}).values():
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        return {name: (min(values), max(values)) for name, values in columns.items()}


@dataclass(frozen=True)
class Summary:
    """Result of a run; ``starling run --json`` prints it."""

    status: Status
    run_id: str
    run_dir: str
    algorithm: str
    rounds: int
    """Committed."""
    metrics: dict[str, float]
    """Metrics of the last evaluation."""
    bytes: dict[str, int | float | None]
    """``payload``, ``recovery``, ``per_round`` (payload), and ``transport`` (``None`` in the simulator)."""
    nodes: dict[str, int]
    """``started``, ``joined`` (later), ``lost``, and ``drained``: left as they were told to."""
    samples: dict[str, int]
    """``drawn``, as far as nodes lived to tell, of these ``committed``, and ``redrawn``: drawn in rounds that were not
    committed, and therefore again later. ``lost``: of epochs that all others have completed, what nobody else may draw
    and whose node is away."""
    replicas: str | None
    """``identical`` or ``healed``: what comparing their shared state showed; ``None`` if it is not replicated."""
    digest: str | None
    """Digest of the final model's tensors; None if there is no model."""
    seconds: float
    virtual_seconds: float | None
    lost: dict[str, int | float] = field(default_factory=dict)
    """``residuals``: nodes that were lost with a residual; ``residual_norm``: the norm of all these residuals."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Losses with which the validation loss compares, by name."""
    checkpoints: dict[str, int] | None = None
    """``written``, ``failed``, ``retries``, and the ``last_round`` that was saved; ``None``: there are none."""
    average_digest: str | None = None
    """Digest of the running average's tensors (``evaluation.average``)."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data without NaN."""
        return finite(asdict(self))


def finite(data: Any) -> Any:  # noqa: ANN401 - plain data of any shape
    """Return the data with None in place of NaN and infinities, which JSON cannot hold."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    return None if isinstance(data, float) and not math.isfinite(data) else data


@dataclass(frozen=True)
class Started:
    """Facts about a run whose nodes are all up."""

    config: Config
    run_id: str
    run_dir: str
    nodes: Sequence[NodeFacts]
    layout: Layout
    baselines: Mapping[str, float]
    virtual: bool
    resumed_after: int | None = None
    """The round of the checkpoint with which it goes on."""


class Observer:
    """Takes what happens in a run; every method does nothing unless overridden."""

    def on_start(self, started: Started) -> None:
        """Take the start: all nodes are up, before the first round."""

    def on_log(self, node: int, lines: Sequence[str]) -> None:
        """Take lines that a node wrote to its log."""

    def on_usage(self, node: int, values: Mapping[str, float]) -> None:
        """Take the usage of a node's process and machine, every few seconds; on a cluster."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """A line of the controller's record."""

    def on_round(self, record: RoundRecord) -> None:
        """A round is committed."""

    def on_sealed(self, entry: Entry) -> None:
        """A round whose record is kept was committed; also its members, if they changed."""

    def on_saving(self) -> Mapping[str, Any]:
        """A checkpoint is made of the run as it is now: plain data of one's own to go into it."""
        return {}

    def on_snapshot(self, number: int, model: FinalModel) -> Path | None:
        """The model after round ``number``, from which rounds may be replayed; return the file with it, if any."""

    def on_model(self, model: FinalModel) -> None:
        """The final model is here."""

    def on_average(self, model: FinalModel) -> None:
        """Take the running average of the models (``evaluation.average``), after ``on_model``."""

    def on_end(self, summary: Summary) -> None:
        """The run is over, one way or another; called once, also if it never began."""


class Observers(Observer):
    """Several observers as one, told in order."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = tuple(observers)

    def on_start(self, started: Started) -> None:
        for observer in self._observers:
            observer.on_start(started)

    def on_log(self, node: int, lines: Sequence[str]) -> None:
        for observer in self._observers:
            observer.on_log(node, lines)

    def on_usage(self, node: int, values: Mapping[str, float]) -> None:
        for observer in self._observers:
            observer.on_usage(node, values)

    def on_event(self, event: Mapping[str, Any]) -> None:
        for observer in self._observers:
            observer.on_event(event)

    def on_round(self, record: RoundRecord) -> None:
        for observer in self._observers:
            observer.on_round(record)

    def on_sealed(self, entry: Entry) -> None:
        for observer in self._observers:
            observer.on_sealed(entry)

    def on_saving(self) -> Mapping[str, Any]:
        saved: dict[str, Any] = {}
        for observer in self._observers:
            saved |= observer.on_saving()
        return saved

    def on_snapshot(self, number: int, model: FinalModel) -> Path | None:
        files = [observer.on_snapshot(number, model) for observer in self._observers]
        return next((file for file in files if file is not None), None)

    def on_model(self, model: FinalModel) -> None:
        for observer in self._observers:
            observer.on_model(model)

    def on_average(self, model: FinalModel) -> None:
        for observer in self._observers:
            observer.on_average(model)

    def on_end(self, summary: Summary) -> None:
        """Tell all, also if some raise: the first of what they raised comes out at the end."""
        with contextlib.ExitStack() as stack:
            for observer in reversed(self._observers):
                stack.callback(observer.on_end, summary)
