"""What the controller asks of a runtime. Two keep this contract: ``simulator.Simulator`` and ``cluster.Cluster``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from starling.actors.data.plans import NOTHING_NEW
from starling.orchestrator.runtimes.events import (
    FinalModel,
    Happening,
    NodeFacts,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from starling.actors.data import Place, Position
    from starling.actors.data.fingerprint import Fingerprint
    from starling.actors.replica.catch_up import Transcript
    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import Layout, NodeId, View
    from starling.orchestrator.protocol.events import Decision
    from starling.orchestrator.protocol.mailboxes import Envelope, Handover


class Standing(Protocol):
    """Processes as they are between two rounds, on a clock that can be set."""

    initial: tuple[NodeId, ...]
    """The nodes to begin with, besides the server, if they are not those of the configuration."""

    def to_json(self) -> Mapping[str, Any]:
        """What processes are doing, and what is to happen when, as plain data; nothing of a round is in it."""
        ...

    def bring_back(
        self,
        processes: Mapping[str, Any],
        saved: Mapping[NodeId, StateExport],
        kept: Collection[NodeId],
        new: Collection[NodeId],
        in_flight: Sequence[Envelope],
    ) -> None:
        """Let everything be as it was when ``to_json`` gave ``processes``, with the nodes of ``initial`` started.

        ``saved`` is of those who were there, but for ``new`` ones, and of ``kept``; ``in_flight`` had not arrived.
        """
        ...


class Runtime(Protocol):
    """Carries out what the controller decides, and reports what happens."""

    virtual: bool
    """Whether ``now`` is a virtual clock."""
    layout: Layout
    """Of the parameters; known once ``start`` has returned."""
    keeps_letters: bool
    """Whether a payload that was handed over is kept until it is told to ``discard`` it; else only the server's is."""
    baselines: dict[str, float]
    """What the task's validation loss compares with; known once ``start`` has returned."""
    num_parts: int | None
    """Into how many the data are divided: known once ``start`` has returned, and kept if it is set before."""
    part_sizes: tuple[int, ...] | None
    """Samples of each part, if others may draw it while its node is away; known once ``start`` has returned."""
    fingerprint: Fingerprint
    """Of the data; known once ``start`` has returned."""

    @property
    def standing(self) -> Standing | None:
        """Its processes, if they can be brought back as they were; ``None`` where time is not the runtime's own."""
        ...

    @property
    def now(self) -> float:
        """Seconds on the runtime's clock."""
        ...

    @property
    def transport_nbytes(self) -> int | None:
        """Bytes that really moved between processes so far; ``None`` where nothing does."""
        ...

    @property
    def num_spares(self) -> int:
        """Processes that stand by, or are being started for that."""
        ...

    def start(self) -> list[NodeFacts]:
        """Bring nodes up with their initial state: those for which there is room, at least ``cluster.nodes.min``.

        ``Up`` comes later for the others.

        Raises:
            StarlingError: they cannot be brought up.
        """
        ...

    def launch(self, nodes: Sequence[NodeId]) -> None:
        """Start nodes, elsewhere if need be; a process that stands by is used if there is one.

        ``Up`` comes for each, or ``NotUp``. One that had ``Notice`` and is there still goes on until it is retired.
        """
        ...

    def stand_by(self, count: int) -> None:
        """Start so many processes that can take the place of lost ones; ``SpareLost`` comes for those that die."""
        ...

    def probe(self, nodes: Sequence[NodeId]) -> None:
        """Ask the processes of ``nodes`` whether they live; ``Died`` comes of those that do not answer in time.

        A node that computes, for however long, does answer.
        """
        ...

    def retire(self, nodes: Sequence[NodeId], *, empty: Collection[NodeId] = ()) -> None:
        """Let nodes that stand still leave; ``Retired`` comes for each, or ``Died``.

        What they have committed is kept. Those in ``empty`` have nothing: what is kept of their places stays.
        """
        ...

    def kill(self, node: NodeId) -> None:
        """End a node's process, as a fault would."""
        ...

    def hang(self, node: NodeId) -> None:
        """Let a node's process stand still and answer nothing, as a fault would."""
        ...

    def preempt(self, node: NodeId) -> None:
        """Give a node notice, and end its process when ``cluster.drain_s`` is over, as a cloud would."""
        ...

    def begin(
        self,
        epoch: int,
        number: int,
        view: View,
        committed: int,
        nodes: Sequence[NodeId],
        *,
        repair: bool,
        joiners: Sequence[NodeId] = (),
        places: Mapping[NodeId, Place] = NOTHING_NEW,
        seen: Sequence[float] = (),
    ) -> None:
        """Begin a round on ``nodes``; ``committed`` is the last committed round.

        With ``repair`` programs begin with ``on_view_change``; those of ``joiners``, which were given another node's
        state, with ``join`` before it. ``places`` says of whom there is news what it is to draw; ``seen``, what the
        programs of one node have ``Seen`` in this round before, and see again.
        """
        ...

    def perform(self, decisions: Sequence[Decision]) -> None:
        """Carry out what the rendezvous decided at one moment."""
        ...

    def dispatch(self, envelope: Envelope) -> None:
        """Carry a message that was ``Sent`` to where its receiver is; ``Arrived`` says when it is there."""
        ...

    def discard(self, node: NodeId, letter: int) -> None:
        """Nobody is to have what ``node`` sent."""
        ...

    def hand_over(self, handover: Handover) -> None:
        """Let a node that ``Receives`` run on. A payload for the server is kept until it is told to ``discard`` it."""
        ...

    def letters(self, envelopes: Sequence[Envelope]) -> Iterator[StateExport]:
        """The payloads of messages that wait, as one export, which may be taken in another thread as a ``snapshot``."""
        ...

    def put_back(self, envelopes: Sequence[Envelope], letters: StateExport) -> None:
        """Have again what ``letters`` gave; ``envelopes`` name their places in it, -1 is the first."""
        ...

    def halt(self, nodes: Sequence[NodeId]) -> None:
        """Cancel the programs of ``nodes``; ``Halted`` comes for each, or ``Died`` if it does not stand still."""
        ...

    def settle(self, committed: Mapping[NodeId, int]) -> None:
        """Apply the commits up to the given round of each node; ``begin`` does so too."""
        ...

    def transfer(self, joiner: NodeId, donor: NodeId, position: Position | None = None) -> None:
        """Give ``joiner`` the committed parameters and shared state of ``donor``; its data go on at ``position``.

        Its local state stays. ``Loaded`` comes, or ``NotLoaded``, or ``Died`` for the joiner.
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
        """Let ``joiner`` catch up by itself instead, with the records of the rounds that it has missed.

        ``base`` is the model before the first of them. It ends as a transfer from ``donor``, which does nothing, would.
        """
        ...

    def keep(self, node: NodeId, number: int) -> None:
        """Keep what ``node`` committed in round ``number``, where it outlives the node's machine; ``Kept`` comes then.

        What was kept before is kept until then.
        """
        ...

    def release(self, node: NodeId) -> None:
        """What was kept of ``node`` is not needed any more."""
        ...

    def restore(self, node: NodeId) -> bool:
        """Give ``node`` all that was kept of it; say whether there is anything. Otherwise as ``transfer``."""
        ...

    def snapshot(
        self, nodes: Sequence[NodeId], shared: NodeId | None, kept: Collection[NodeId] = ()
    ) -> Iterator[tuple[NodeId, StateExport]]:
        """All that ``nodes`` have committed, as it is now; those that have left, and ``kept``, as it was kept.

        It may be taken in another thread, while rounds go on; who dies before is left out. The shared state comes from
        ``shared`` alone, unless that is ``None``.
        """
        ...

    def adopt(self, saved: Mapping[NodeId, StateExport]) -> None:
        """Keep what a ``snapshot`` has given, as that of these nodes: ``restore`` gives it to them."""
        ...

    def set_forward(self, seconds: float, transport_nbytes: int | None) -> None:
        """The run has gone on for so long before, and moved so many bytes; a virtual clock shows it."""
        ...

    def next(self, until: float) -> Happening | None:
        """Wait for something to happen, until ``now`` reaches ``until`` (``None`` then)."""
        ...

    def evaluate(self, nodes: Sequence[NodeId], max_batches: int | None) -> dict[str, float]:
        """The metrics, on held-out data, of the mean of what ``Algorithm.model`` gives on ``nodes``.

        That of committed state, also of nodes whose program runs. The first of them computes it; if it is the only one,
        its program is between two rounds.

        Raises:
            NodeGoneError: one of them died meanwhile, which ``Died`` tells too.
        """
        ...

    def finish(self, nodes: Sequence[NodeId]) -> FinalModel:
        """Fetch the mean model of ``nodes``; no program runs any more. Raises as ``evaluate``."""
        ...

    def check(self) -> None:
        """Look whether a failure is but a consequence.

        Raises:
            RunError: it is; this says of what.
        """
        ...

    def close(self) -> None:
        """Leave nothing behind: no process, no actor, no temporary file. Idempotent; never raises."""
        ...
