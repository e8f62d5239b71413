"""Traffic of the steps of an exchange: casts on the network, and bytes in object stores."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from starling.actors.wire.tickets import among
from starling.algorithms.api import INLINE_LIMIT_BYTES
from starling.orchestrator.protocol.events import Measure, Secure
from starling.orchestrator.runtimes.network import Cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from starling.actors.wire.tickets import Posted
    from starling.algorithms.api import Algorithm, Layout, NodeId
    from starling.orchestrator.protocol.events import Deliver

    Announced = Mapping[NodeId, Posted]
    Home = Callable[[NodeId], tuple[str, int]]
    """Returns a node's machine and process."""


def securing(requests: Sequence[Measure | Secure], posted: Callable[[int], Announced]) -> list[Cast]:
    """Return the casts of a measuring or securing phase: each member's part goes to its reducer, and all measures do.

    ``posted`` returns the announcements of an exchange.
    """
    casts: list[Cast] = []
    for one in requests:
        sizes = {node: posted(one.seq)[node].part_nbytes[one.part] for node in one.members if node not in one.held}
        casts.append(Cast(sizes, [one.by]))
    return casts + _measures([one for one in requests if isinstance(one, Secure)])


def _measures(secures: Sequence[Secure]) -> list[Cast]:
    """Return the casts of measures: those that a maker made go to all other makers of its exchange."""
    makers: defaultdict[int, set[NodeId]] = defaultdict(set)
    made: dict[int, Counter[NodeId]] = {}
    for one in secures:
        if one.measured:
            makers[one.seq].add(one.by)
            if one.seq not in made:
                made[one.seq] = Counter()
                for measured in one.measured:
                    made[one.seq][measured.by] += measured.values.nbytes
    return [Cast(made[seq], sorted(nodes)) for seq, nodes in makers.items()]


def delivering(decision: Deliver, posted: Announced) -> list[Cast]:
    """Return the casts of a delivering phase: each reduced part goes from its maker to everybody."""
    sizes = posted[decision.closed[0]].result_nbytes
    made: Counter[NodeId] = Counter()
    for part, maker in enumerate(decision.makers):
        made[maker] += sizes[part]
    return [Cast(made, decision.nodes)]


def inline(closed: Sequence[NodeId], posted: Announced) -> list[Cast]:
    """Return the casts of small contributions: each goes to everybody, or to those that want it."""
    sizes = {node: posted[node].nbytes for node in closed}
    receivers = sorted(posted)
    if posted[closed[0]].wants is None:
        return [Cast(sizes, receivers)]
    return [
        Cast({sender: sizes[sender] for sender in sorted(among(posted[node].wants or frozenset(), sizes))}, [node])
        for node in receivers
    ]


def stored(
    parts: Sequence[int],
    results: Sequence[int],
    most: int,
    members: Sequence[NodeId],
    givers: Sequence[NodeId],
    home: Home,
) -> Counter[str]:
    """Return the bytes in the stores of machines during an exchange to which all ``givers`` contribute alike.

    A contribution lies where it was made, without the parts that its own process reduces, and a machine that fetches
    it has a copy; a reduced part lies on every machine.

    Args:
        parts: bytes of the parts of one contribution.
        results: bytes of the parts of the result; none: a gather.
        most: contributions that a node receives of a gather.
        members: nodes that receive; the first ones reduce a part each.
        givers: those of them that contribute.
        home: where a node is.
    """
    receiving = Counter(home(node)[0] for node in members)
    giving = Counter(home(node)[0] for node in givers)
    found: Counter[str] = Counter()
    if not results:
        for machine, count in receiving.items():
            found[machine] = sum(parts) * (giving[machine] + min(len(givers) - giving[machine], count * most))
        return found
    in_process = Counter(home(node) for node in givers)
    for part, reducer in enumerate(members[: len(parts)]):
        machine = home(reducer)[0]
        for other in receiving:
            found[other] += parts[part] * giving[other] + results[part]
        found[machine] += parts[part] * (len(givers) - giving[machine] - in_process[home(reducer)])
    return found


def contribution_bytes(algorithm: Algorithm, layout: Layout, num_nodes: int) -> int:
    """Return an upper bound of a node's contribution to an exchange; 0 if unknown, or small enough to travel inline.

    ``expected_bytes`` are those of all exchanges of a round: one of them has no more than that, nor than the model.
    """
    each = algorithm.expected_bytes(layout, num_nodes)
    if each is None or num_nodes < 2:
        return 0
    each += algorithm.buffer_bytes(layout, num_nodes)
    nbytes = min(each // (2 * (num_nodes - 1)), layout.nbytes + layout.buffer_nbytes)
    return nbytes if nbytes > INLINE_LIMIT_BYTES else 0


def stored_bytes(contribution: int, nodes: Sequence[NodeId], home: Home) -> Counter[str]:
    """Return the bytes in the object stores of machines during an average of contributions of this size."""
    part = -(-contribution // max(1, len(nodes)))
    parts = [part] * len(nodes)
    return stored(parts, parts, len(nodes), nodes, nodes, home)
