"""The contract between the controller and a runtime, part by part. ``Simulator`` and ``Cluster`` implement it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from starling.orchestrator.runtimes.events import (
    FinalModel,
    Happening,
    NodeFacts,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from starling.actors.data import Position
    from starling.actors.data.fingerprint import Fingerprint
    from starling.actors.host.round_order import RoundOrder
    from starling.actors.replica.catch_up import Transcript
    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import Layout, NodeId
    from starling.orchestrator.protocol.events import Advance, Close, Deliver, Measure, Secure
    from starling.orchestrator.protocol.mailboxes import Envelope, Handover


class Standing(Protocol):
    """A snapshot of all processes between two rounds, on a clock that can be set."""

    initial: tuple[NodeId, ...]
    """Nodes to start with, besides the server; empty: those of the configuration."""

    def to_json(self) -> Mapping[str, Any]:
        """Return the state of every process and all scheduled events as plain data, without anything of a round."""
        ...

    def bring_back(
        self,
        processes: Mapping[str, Any],
        saved: Mapping[NodeId, StateExport],
        kept: Collection[NodeId],
        new: Collection[NodeId],
        in_flight: Sequence[Envelope],
    ) -> None:
        """Restore the processes that ``to_json`` described; the nodes of ``initial`` have been started.

        Args:
            processes: returned by ``to_json``.
            saved: states by node: of every present node that is not new, and of every kept one.
            kept: nodes whose state outlives them.
            new: present nodes that are still in the initial state.
            in_flight: messages that had not arrived.
        """
        ...


class Processes(Protocol):
    """The processes that host nodes: started, checked, and struck by faults."""

    @property
    def num_spares(self) -> int:
        """Number of processes that stand by, or are being started to."""
        ...

    def launch(self, nodes: Sequence[NodeId]) -> None:
        """Start nodes, in a spare process if there is one, else in new ones.

        ``Up`` or ``NotUp`` is reported for each. A node that had ``Notice`` goes on until it is retired.
        """
        ...

    def stand_by(self, count: int) -> None:
        """Start ``count`` spare processes; ``SpareLost`` is reported for those that die."""
        ...

    def probe(self, nodes: Sequence[NodeId]) -> None:
        """Ping the processes of ``nodes``; ``Died`` is reported for those that do not answer in time.

        A node that computes, for however long, does answer.
        """
        ...

    def kill(self, node: NodeId) -> None:
        """End a node's process, as a scheduled fault."""
        ...

    def give_up(self, node: NodeId, reason: str) -> None:
        """End the process of a node that is of no use; ``Died`` with ``reason`` is reported for all of its nodes."""
        ...

    def hang(self, node: NodeId) -> None:
        """Stop a node's process, so that it answers nothing, as a scheduled fault."""
        ...

    def preempt(self, node: NodeId) -> None:
        """Give a node notice, and end its process after ``cluster.drain_s``, as a cloud would."""
        ...


class Programs(Protocol):
    """The programs of a round: begun, and cancelled."""

    def begin(self, order: RoundOrder, nodes: Sequence[NodeId]) -> None:
        """Begin a round on ``nodes``."""
        ...

    def advance(self, decision: Advance) -> None:
        """Run programs on with the result of a closed exchange, as soon as the network has brought it."""
        ...

    def halt(self, nodes: Sequence[NodeId]) -> None:
        """Cancel programs; ``Halted`` is reported for each node, or ``Died`` if it does not stop in time."""
        ...


class ExchangeSteps(Protocol):
    """The steps of the running round's exchanges."""

    def measure(self, requests: Sequence[Measure]) -> None:
        """Have parts measured; ``Measured`` is reported for each."""
        ...

    def secure(self, secures: Sequence[Secure]) -> None:
        """Have parts reduced; ``Secured`` is reported for each."""
        ...

    def deliver(self, decision: Deliver) -> None:
        """Bring reduced parts to the members; ``Delivered`` is reported for each."""
        ...

    def close(self, decision: Close) -> None:
        """Make the result ready for ``Programs.advance``."""
        ...

    def give_up(self, node: NodeId) -> None:
        """Let fetches of what ``node`` contributed fail now instead of at their time limit."""
        ...


class Messages(Protocol):
    """Payloads between ``Send`` and ``Receive``.

    Delivered payloads of asynchronous algorithms, and the server's, are kept until ``discard``: their receivers may
    begin the round again.
    """

    def dispatch(self, envelope: Envelope) -> None:
        """Carry a message to its receiver's machine; ``Arrived`` or ``Vanished`` is reported."""
        ...

    def discard(self, node: NodeId, letter: int) -> None:
        """Drop a payload that ``node`` sent."""
        ...

    def hand_over(self, handover: Handover) -> None:
        """Resume a node that waits in ``Receive`` with the outcome."""
        ...

    def export(self, envelopes: Sequence[Envelope]) -> Iterator[StateExport]:
        """Yield the payloads of waiting messages as one export. May be consumed in another thread."""
        ...

    def put_back(self, envelopes: Sequence[Envelope], letters: StateExport) -> None:
        """Restore payloads from an export; the ``letter`` of each envelope is -1 for the first, -2 for the next."""
        ...


class States(Protocol):
    """Committed state of nodes: applied, copied between nodes, kept, and exported."""

    def settle(self, committed: Mapping[NodeId, int]) -> None:
        """Apply the commits up to the given round of each node; ``begin`` does so too."""
        ...

    def transfer(self, joiner: NodeId, donor: NodeId, position: Position | None = None) -> None:
        """Copy the committed parameters and shared state of ``donor`` to ``joiner``, whose local state stays.

        ``Loaded``, ``NotLoaded``, or ``Died`` of the joiner is reported. Its data go on at ``position``.
        """
        ...

    def replay(
        self,
        joiner: NodeId,
        donor: NodeId,
        transcript: Transcript,
        base: bytes | None,
        position: Position | None = None,
    ) -> None:
        """Have ``joiner`` compute the committed state from the records of the rounds that it missed.

        ``base`` is the model before the first of them. Events are those of a transfer from ``donor``, which does
        nothing.
        """
        ...

    def keep(self, node: NodeId, number: int) -> None:
        """Copy what ``node`` committed in round ``number`` to where it outlives its machine; ``Kept`` is reported.

        The copy before stays until then.
        """
        ...

    def release(self, node: NodeId) -> None:
        """Drop the kept copy of ``node``."""
        ...

    def restore(self, node: NodeId) -> bool:
        """Load a node's own kept copy into it; return False without one. Events are those of ``transfer``."""
        ...

    def snapshot(
        self, nodes: Sequence[NodeId], shared: NodeId | None, kept: Collection[NodeId] = ()
    ) -> Iterator[tuple[NodeId, StateExport]]:
        """Yield all that nodes have committed, as of now. May be consumed in another thread, while rounds go on.

        Args:
            nodes: a node that dies before its copy is fetched is left out.
            shared: the only node that gives the shared state; None: every node gives its own.
            kept: nodes of which the kept copy is yielded, as it is of nodes that have left.
        """
        ...

    def adopt(self, saved: Mapping[NodeId, StateExport]) -> None:
        """Keep the exports of a ``snapshot``, for ``restore``."""
        ...


class Models(Protocol):
    """Committed models, evaluated and fetched; programs may run."""

    def evaluate(self, nodes: Sequence[NodeId], max_batches: int | None, *, averaged: bool = False) -> dict[str, float]:
        """Return metrics on held-out data of the mean of what ``Algorithm.model`` gives on ``nodes``.

        ``averaged``: of the mean of their running averages. The first node computes the metrics; if it is the only
        one, its program is between two rounds.

        Raises:
            NodeGoneError: one of them died meanwhile; ``Died`` is reported too.
        """
        ...

    def fetch(self, nodes: Sequence[NodeId], *, averaged: bool = False) -> FinalModel:
        """Return the mean model of ``nodes``, or the mean of their running averages; no program runs any more.

        Raises as ``evaluate``.
        """
        ...


class Runtime(Protocol):
    """Carries out the controller's decisions and reports events."""

    virtual: bool
    """``now`` is a virtual clock."""
    num_parts: int | None
    """Number of parts into which the data are divided: set before ``start``, or chosen by it."""

    layout: Layout
    """Layout of the parameters; known once ``start`` has returned, as are the next two."""
    baselines: dict[str, float]
    """Reference values of the task's validation loss."""
    part_sizes: tuple[int, ...] | None
    """Samples of each part, if other nodes may draw them while its own is away."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the data; known once ``start`` has returned."""
        ...

    @property
    def processes(self) -> Processes:
        """The processes that host nodes."""
        ...

    @property
    def programs(self) -> Programs:
        """The programs of the running round."""
        ...

    @property
    def exchanges(self) -> ExchangeSteps:
        """The exchanges of the running round."""
        ...

    @property
    def messages(self) -> Messages:
        """Payloads on their way."""
        ...

    @property
    def states(self) -> States:
        """Committed state."""
        ...

    @property
    def models(self) -> Models:
        """Committed models."""
        ...

    @property
    def standing(self) -> Standing | None:
        """The processes, to be saved and restored exactly; None where time is not the runtime's own."""
        ...

    @property
    def now(self) -> float:
        """Seconds on the runtime's clock."""
        ...

    @property
    def transport_nbytes(self) -> int | None:
        """Bytes that moved between processes so far; None in the simulator."""
        ...

    def start(self) -> list[NodeFacts]:
        """Bring up the nodes for which there is room, at least ``cluster.nodes.min``, in the initial state.

        ``Up`` is reported later for the others.

        Raises:
            StarlingError: they cannot be brought up.
        """
        ...

    def retire(self, nodes: Sequence[NodeId], *, empty: Collection[NodeId] = ()) -> None:
        """Keep what idle nodes have committed, and let them leave; ``Retired`` or ``Died`` is reported for each.

        Nodes in ``empty`` have committed nothing; what is kept of their predecessors stays.
        """
        ...

    def set_forward(self, seconds: float, transport_nbytes: int | None) -> None:
        """Set the byte count of a resumed run, and a virtual clock, to their saved values."""
        ...

    def next(self, until: float) -> Happening | None:
        """Wait for the next event; return None when ``now`` has reached ``until``."""
        ...

    def check(self) -> None:
        """Look for the cause behind an error that is about to end the run.

        Raises:
            RunError: there is one; the message names it.
        """
        ...

    def close(self) -> None:
        """End all processes and remove temporary files. Idempotent; never raises."""
        ...
