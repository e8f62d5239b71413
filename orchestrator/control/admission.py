"""Lets nodes into a run without a barrier once they have the state that they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.algorithms.api import SERVER
from starling.orchestrator.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.members import Members
    from starling.orchestrator.control.messaging import Mail
    from starling.orchestrator.control.node_rounds import NodeRounds
    from starling.orchestrator.control.run_state import RunState


class Admission:
    """Takes nodes in and out.

    Args:
        state: of the run.
        members: give state to nodes.
        mail: has their mailboxes.
        nodes: books who is in.
        begin: lets a node that has come in begin a round.
    """

    def __init__(
        self, state: RunState, members: Members, mail: Mail, nodes: NodeRounds, begin: Callable[[NodeId], None]
    ) -> None:
        self._state = state
        self._members = members
        self._mail = mail
        self._nodes = nodes
        self._begin = begin
        self._has_server = state.run.config.algorithm.has_server
        self._known: dict[NodeId, dict[NodeId, int]] = {}
        """Latest round of every other node that an entering node's state, its own or its donor's, has heard of."""

    def admit(self) -> None:
        """Let nodes begin that have all that they need, and see to it that the others get it."""
        members, holdings, nodes, roster = self._members, self._members.holdings, self._nodes, self._state.roster
        for node in sorted(roster.facts.keys() - roster.down - nodes.entered - set(members.transfers.pending)):
            nodes.numbers.setdefault(node, 0)
            if node not in holdings.new or node in holdings.loaded or not nodes.needs_state(node):
                self._enter(node)
            elif node == SERVER or not self._has_server or nodes.donors:
                # Else the server is away, and has the only model: its return is waited for.
                members.give_state(nodes.numbers[node], node)
        members.transfers.retry()

    def _enter(self, node: NodeId) -> None:
        if node == SERVER:
            self._nodes.enter(SERVER, self._members.holdings.kept.get(SERVER, -1) + 1)
            self._mail.room.again(SERVER)
        else:
            self._mail.room.join(node, self._known.pop(node, {}))
            self._nodes.enter(node)
        self._begin(node)

    def transfer_begins(self, joiner: NodeId, donor: NodeId) -> None:
        """``joiner`` is no older than ``donor``, whose state it begins with."""
        self._known[joiner] = self._mail.room.known(donor) | {donor: self._nodes.numbers[donor]}

    def gone(self, node: NodeId) -> None:
        """Take out ``node``, whose process is gone, and tell the others."""
        room = self._mail.room
        known = room.known(node)
        was_present = self._nodes.gone(node)
        if node == SERVER:
            room.stop(SERVER)  # it will be embodied anew; what is sent to it waits
        elif was_present:
            self._known[node] = known
            self._mail.discard(room.clear(node))
            self._mail.left(node)

    def check_model(self) -> None:
        """End the run at once when all who had a trained model are gone, and nothing of theirs is kept.

        Raises:
            RunError: it is so.
        """
        members = self._members
        if self._has_server or self._nodes.present or not self._nodes.any_committed:
            return
        coming = members.holdings.loaded or members.transfers.pending or members.departures.is_retiring
        if not (members.holdings.keeps(None) or coming):
            raise RunError(f"round {self._state.committed + 1}: no node is left that has a model that was trained")

    def to_json(self) -> dict[str, Any]:
        """Return what is known of nodes that are to come in, as plain data."""
        return {
            "known": {
                str(node): {str(other): number for other, number in known.items()}
                for node, known in self._known.items()
            }
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``to_json`` gave."""
        self._known = {
            int(node): {int(other): number for other, number in known.items()} for node, known in state["known"].items()
        }
