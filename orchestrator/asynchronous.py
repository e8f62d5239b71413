"""The loop of algorithms whose nodes each have rounds of their own: no barrier, messages only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from algorithms.api import SERVER, View
from orchestrator.errors import NodeLostError, RunError
from orchestrator.mail import Mail
from orchestrator.runtime import Died, Finished, Halted

if TYPE_CHECKING:
    from actors.tickets import Returned
    from algorithms.api import NodeId
    from orchestrator.mailroom import Mailroom
    from orchestrator.progress import Progress
    from orchestrator.runtime import Happening


class Asynchronous:
    """Per-node rounds: each is committed when its program returns, and the next begins.

    A round of the run is one of the server's; without a server, as many node rounds as there are nodes.
    """

    def __init__(self, progress: Progress, room: Mailroom | None = None) -> None:
        self._progress = progress
        self._runtime = progress.runtime
        self._config = progress.config
        self._mail = Mail(progress, room)
        members = progress.nodes
        self._view = View(0, members, joined=members)
        self._rounds = dict.fromkeys(progress.facts, 0)
        """Committed, of each node."""
        self._seen_view: dict[NodeId, int] = {}
        self._num_commits = 0
        """Of nodes that are not the server."""
        self._last = -1
        self._since: list[Returned] = []
        """Reports since the last recorded round."""
        self._contributed: set[NodeId] = set()
        self._mark = (0.0, 0, 0)
        """Clock, payload and transport at the last recorded round."""

    def run(self) -> None:
        """Go on until the configured number of rounds is done, then let everybody stand still."""
        progress = self._progress
        self._mark = self._now()
        for node in sorted(progress.facts):
            self._begin(node)
        while not self._is_over():
            self._step()
        self._stop()

    @property
    def result(self) -> tuple[NodeId, ...]:
        """Whose mean model is the run's."""
        algorithm = self._config.algorithm
        if algorithm.has_server:
            return (SERVER,)
        return (self._last,) if algorithm.result == "last" else self._progress.nodes

    def _is_over(self) -> bool:
        return self._progress.committed + 1 >= self._config.rounds

    def _begin(self, node: NodeId) -> None:
        number = self._rounds[node]
        view = self._view_of(node, number)
        changed = self._seen_view.get(node) != view.number
        if changed:
            self._seen_view[node] = view.number
            members, left = view.members, view.left
            self._progress.record("view", node=node, round=number, number=view.number, members=members, left=left)
        self._mail.room.begin(node, number)
        self._runtime.begin(0, number, view, number - 1, (node,), repair=changed and number > 0)

    def _view_of(self, node: NodeId, number: int) -> View:
        """The view in which ``node`` does its round ``number``."""
        del node, number
        return self._view

    def _step(self) -> None:
        if self._mail.room.stuck(self._mail.room.nodes):
            message = "every node waits for a message, and none is on its way: the programs wait for one another"
            raise RunError(message)
        timeout = self._mail.next_timeout()
        happening = self._runtime.next(math.inf if timeout is None else timeout)
        if happening is None:
            self._mail.expire()
        else:
            self._note(happening)

    def _note(self, happening: Happening) -> None:
        match happening:
            case Finished(node, report):
                self._commit(node, report)
            case Died(node, reason):
                self._died(node, reason)
            case _:
                _ = self._progress.note(happening) or self._mail.take(happening)

    def _commit(self, node: NodeId, report: Returned) -> None:
        progress = self._progress
        progress.record("commit", node=node, round=self._rounds[node])
        self._rounds[node] += 1
        if node != SERVER:
            self._num_commits += 1
            self._last = node
            self._since.append(report)
            self._contributed.add(node)
        by_server = self._config.algorithm.has_server
        if node == SERVER if by_server else self._num_commits % len(self._view.members) == 0:
            self._round_done()
        if not self._is_over():
            self._begin(node)

    def _round_done(self) -> None:
        progress = self._progress
        progress.committed += 1
        progress.members = progress.nodes
        before, self._mark = self._mark, self._now()
        clock, payload, transport = (now - then for now, then in zip(self._mark, before, strict=True))
        progress.round_done(
            self._since,
            {node: self._rounds[node] - 1 for node in self.result},
            alike=False,
            contributing=len(self._contributed),
            payload_bytes=int(payload),
            transport_bytes=None if self._runtime.transport_nbytes is None else int(transport),
            seconds=clock,
        )
        self._since, self._contributed = [], set()

    def _now(self) -> tuple[float, int, int]:
        return self._runtime.now, self._progress.ledger.payload, self._runtime.transport_nbytes or 0

    def _died(self, node: NodeId, reason: str) -> None:
        progress = self._progress
        message = progress.lose(node, reason, self._rounds[node])
        if node == SERVER:
            raise NodeLostError(message)
        left = progress.nodes
        if len(left) < self._config.need:
            raise NodeLostError(f"{message}; {len(left)} nodes are left, and {self._config.need} are needed")
        self._view = View(self._view.number + 1, left, left=(node,))
        self._mail.left(node)

    def _stop(self) -> None:
        """Cancel what still runs; it goes back to its last commit."""
        waiting = set(self._mail.room.nodes)
        self._runtime.settle({node: self._rounds[node] - 1 for node in waiting})
        self._runtime.halt(sorted(waiting))
        while waiting:
            # Bounded: a runtime ends a node that does not stand still within the grace period.
            happening = self._runtime.next(self._runtime.now + self._config.cluster.round_deadline_s)
            match happening:
                case Halted(node):
                    waiting.discard(node)
                case Died(node, reason):
                    waiting.discard(node)
                    self._progress.lose(node, reason, self._rounds[node])
                case None:
                    pass
                case _:
                    _ = self._progress.note(happening)
