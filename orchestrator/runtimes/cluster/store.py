"""Ray's object stores: checks that exchanges fit, and warns when a store is full.

A store that is full loses nothing: Ray writes to the disk what is in it. But that takes long, nodes are late, and a run
that leaves out who is late would say everything but why.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

import ray

from starling.orchestrator.errors import ClusterError
from starling.orchestrator.runtimes.cluster import ray_internals
from starling.orchestrator.runtimes.traffic import stored
from starling.orchestrator.units import bytes_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starling.actors.wire.tickets import Posted
    from starling.algorithms.api import NodeId
    from starling.orchestrator.runtimes.cluster.actors import ActorPool
    from starling.orchestrator.runtimes.cluster.attempt import RunningAttempt
    from starling.orchestrator.runtimes.cluster.placement import Placement

_LOG = logging.getLogger("starling")

_RESOURCE = "object_store_memory"
_MOST_KNOWN = 100
"""Exchanges and messages that are known to fit."""

_PERIOD_S = 5.0
_TIMEOUT_S = 10.0


def remedy(*, is_local: bool) -> str:
    """Return advice that gives a store more room."""
    where = "cluster.object_store_gb" if is_local else "ray start --object-store-memory"
    return f"raise {where}, have fewer nodes on that machine, or exchange less (a codec, a smaller model)"


def check_room(needed: Mapping[str, int], what: str, *, is_local: bool) -> None:
    """Check that the stores are large enough for ``needed``, by Ray's names for machines.

    Raises:
        ClusterError: it does not fit into one of them.
    """
    for machine in ray.nodes():
        size, wanted = machine["Resources"].get(_RESOURCE, 0.0), needed.get(machine["NodeID"], 0)
        if machine["Alive"] and 0 < size < wanted:
            raise ClusterError(
                f"cluster: {what} needs {bytes_text(wanted)} in Ray's object store on {machine['NodeManagerHostname']} "
                f"({machine['NodeManagerAddress']}), which has {bytes_text(size)}; {remedy(is_local=is_local)}"
            )


class StoreRoom:
    """Checks exchanges and messages against the sizes of the stores; what fitted once is not computed again.

    Args:
        pool: where nodes are.
        attempt: members of an exchange.
        placement: whether the remedy is a configuration key or an option of ``ray start``.
    """

    def __init__(self, pool: ActorPool, attempt: RunningAttempt, placement: Placement) -> None:
        self._pool = pool
        self._attempt = attempt
        self._placement = placement
        self._fits: set[tuple[object, ...]] = set()
        """Keys of exchanges and messages that fit."""

    def check(self, needed: Mapping[str, int], what: str) -> None:
        """Raise ``ClusterError`` if a machine's store has no room for ``needed``, by Ray's names for machines."""
        check_room(needed, what, is_local=self._placement.is_local)

    def check_exchange(self, posted: Mapping[NodeId, Posted], givers: Sequence[NodeId]) -> None:
        """Check that the stores have room for an exchange.

        Args:
            posted: announcements.
            givers: nodes whose contributions go through the store, all alike.

        Raises:
            ClusterError: one has not; Ray would write to its disk, and nodes be late for no visible reason.
        """
        ticket, home = posted[givers[0]], self._pool.home
        members = tuple(node for node in self._attempt.members if home[node].ready is not None)
        homes = tuple(home[node].index for node in members)
        key = ticket.part_nbytes, ticket.result_nbytes, members, tuple(givers), homes
        if key in self._fits:
            return
        most = len(members) if ticket.wants is None else len(ticket.wants)
        place_of = self._pool.place_of
        needed = stored(ticket.part_nbytes, ticket.result_nbytes, most, members, givers, place_of)
        self.check(needed, f"an exchange of {bytes_text(ticket.nbytes)} from each of {len(givers)} nodes")
        self._remember(key)

    def check_message(self, node: NodeId, nbytes: int) -> None:
        """Check that a sender's store has room for a message; raises as ``check_exchange``."""
        if (node, nbytes) not in self._fits:
            self.check({self._pool.place_of(node)[0]: nbytes}, f"a message of {bytes_text(nbytes)}")
            self._remember((node, nbytes))

    def _remember(self, key: tuple[object, ...]) -> None:
        self._fits = {key, *list(self._fits)[:_MOST_KNOWN]}


class StoreWatch:
    """Polls Ray in a thread of its own, and warns once when a store is full."""

    def __init__(self, *, is_local: bool) -> None:
        self._is_local = is_local
        self._before: int | None = None
        """Bytes that had been written before this run."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="starling-stores", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_PERIOD_S if self._before is not None else 0.0):
            # A Ray that does not answer is told by whatever else is asked of it.
            with contextlib.suppress(Exception):
                spilled = ray_internals.spilled_bytes(_TIMEOUT_S)
                if self._before is None:
                    self._before = spilled
                if self._say(spilled - self._before):
                    return
            if self._before is None and self._over.wait(_PERIOD_S):
                return

    def _say(self, spilled: int) -> bool:
        if spilled <= 0:
            return False
        _LOG.warning(
            "Ray's object store is full: %s of it have been written to the disk, which is slow, and nodes may be late "
            "because of it; %s",
            bytes_text(spilled),
            remedy(is_local=self._is_local),
        )
        return True

    def stop(self) -> None:
        """Stop polling. Never raises."""
        self._over.set()
        self._thread.join(timeout=1.0)  # of a call that is on its way, nobody waits for the answer
