"""Counts a run's samples, and hands the data of absent nodes to others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.actors.data import Epoch, Position
from starling.algorithms.api import SERVER
from starling.orchestrator.errors import RunError
from starling.orchestrator.protocol.sample_ledger import DataLedger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from starling.actors.data import Place, Sampler
    from starling.actors.wire.tickets import Returned
    from starling.algorithms.api import NodeId
    from starling.orchestrator.runtimes.events import NodeFacts


class SampleProgress:
    """The samples of one run.

    Args:
        sampler: of the configuration.
        record: adds to the run's log of events.
        script: says what a node is to draw from a round on, in a replay.
    """

    def __init__(
        self,
        sampler: Sampler,
        record: Callable[..., None],
        script: Callable[[NodeId, int], Place | None] | None = None,
    ) -> None:
        self._law, self._is_epoch = sampler.name, type(sampler) is Epoch
        self._record = record
        self._script = script
        self.num_parts: int | None = None
        self.ledger: DataLedger | None = None
        """Ledger of parts that other nodes may draw; None: data stay with their nodes, or have another law."""
        self._positions: dict[NodeId, Position] = {}
        self.num_drawn = 0
        self.num_committed = 0

    def start(self, num_parts: int | None, part_sizes: Sequence[int] | None) -> None:
        """Divide the data into parts of these sizes; None: no part is drawn by other nodes."""
        self.num_parts = num_parts
        self.ledger = None if part_sizes is None else DataLedger(part_sizes)

    def begin(
        self, number: int, nodes: Sequence[NodeId], present: Collection[NodeId], *, again: bool = False
    ) -> Mapping[NodeId, Place]:
        """Return the changed plans of ``nodes``, which begin round ``number``, ``again`` with the draws of before."""
        if self.ledger is None:
            return {}
        if self._script is None:
            there = [node for node in present if node != SERVER]
            places = self.ledger.begin((node for node in nodes if node != SERVER), there, again=again)
        else:
            scripted = {node: self._script(node, number) for node in nodes}
            places = {node: place for node, place in scripted.items() if place is not None}
            self.ledger.impose(places)
        for node, place in places.items():
            self._record("plan", round=number, node=node, extras=place.extras, position=place.position)
        return places

    def committed(self, number: int, reports: Mapping[NodeId, Returned]) -> None:
        """Book the draws of nodes that have committed round ``number``.

        Raises:
            RunError: they have not drawn what they were to draw, which a log that does not fit can lead to.
        """
        moved = {node: one.position for node, one in reports.items() if one.position is not None}
        if self.ledger is None:
            self._positions |= moved
        else:
            try:
                self.ledger.committed(moved)
            except ValueError as error:
                raise RunError(f"round {number}: samples would be committed twice, or not at all: {error}") from None
        committed = sum(report.num_drawn for report in reports.values())
        self.num_committed += committed
        self.num_drawn += committed + sum(report.num_void for report in reports.values())
        if not self._is_epoch:
            draws = {node: (*self.position(node)[:2], one.num_drawn) for node, one in reports.items() if one.num_drawn}
            if draws:
                self._record("draws", round=number, law=self._law, nodes=draws)

    def set_back(self, node: NodeId) -> None:
        """Book that the process of ``node`` does not know its plan: it is a new one, or was given state."""
        if self.ledger is not None:
            self.ledger.set_back(node)

    def position(self, node: NodeId) -> Position:
        """Return the committed position of ``node`` in its own part."""
        known = self._positions.get(node, Position()) if self.ledger is None else self.ledger.position(node)
        return Position(known.epoch, known.offset)

    def counts(self, present: Iterable[NodeId], away: Iterable[NodeFacts]) -> dict[str, int]:
        """Count ``drawn``, ``committed``, ``redrawn`` and ``lost`` samples so far.

        *Redrawn* samples were drawn in rounds that their node did not commit, and are drawn again. Draws of a process
        that died in mid-round are not counted. *Lost* samples belong to epochs that all present nodes have completed;
        their node is away, and no other node may draw them. Only data that stay with their nodes can be lost.
        """
        lost = 0
        if self.ledger is None and self._is_epoch:
            complete = min((self.position(node).epoch for node in present), default=0)
            for facts in away:
                epoch, offset, _ = self.position(facts.node)
                lost += max(0, (complete - epoch) * facts.num_samples - offset)
        redrawn = self.num_drawn - self.num_committed
        return {"drawn": self.num_drawn, "committed": self.num_committed, "redrawn": redrawn, "lost": lost}

    def to_json(self) -> dict[str, Any]:
        """Return the books as plain data, for a checkpoint."""
        return {
            "parts": self.num_parts,
            "ledger": None if self.ledger is None else self.ledger.to_json(),
            "positions": {str(node): list(position) for node, position in sorted(self._positions.items())},
            "drawn": self.num_drawn,
            "committed": self.num_committed,
        }

    def restore(self, state: Mapping[str, Any], *, same_processes: bool = False) -> None:
        """Go on from what ``to_json`` gave, with other processes, or with the same at the same moment.

        If the data are divided into other parts now, all of them begin anew.
        """
        self.num_drawn, self.num_committed = state["drawn"], state["committed"]
        if state["parts"] == self.num_parts:
            self._positions = {int(node): Position(*position) for node, position in state["positions"].items()}
            if self.ledger is not None and state["ledger"] is not None:
                self.ledger = DataLedger.from_json(state["ledger"], same_processes=same_processes)
