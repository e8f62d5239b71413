"""The rendezvous: a state machine without IO that matches the operations of a round's members and closes exchanges.

One instance serves one *epoch*: one attempt at a round with one view. It is fed events (what happened) and answers
with decisions (what is to be done); a runtime carries them out and reports back. It knows no clock, no tensor and no
Ray, so both runtimes share it, and a test can drive it through any order of events.

An exchange goes through ``open → securing → delivering → closed``, or ``open → measuring → securing → …``:

* *open*: contributions are announced. When every active member has posted, their set is the target.
* *measuring*, if the aggregator compares whole contributions: reducers fetch the contributions of their parts, and each
  says how one part of them measures. The coefficients of a combination follow from the measures of all parts. They are
  of one set of contributions: if that shrinks while it is reduced, what is left is measured again.
* *securing*: reducers fetch the contributions of their parts and reduce them; each says what it got. What not all
  could get leaves the set. When all parts were made of one set, that set is *closed*'s membership.
* *delivering*: every active member fetches the reduced parts. Nobody runs on before all have them. Without this step
  one member may already run on while another cannot fetch a part whose holder has just died: then the exchange can
  neither be finished nor shrunk.
* *closed*: members that wait are advanced, those of a started exchange when they come to wait for it.

Contributions that travel inline are secured and delivered by being there: ``open → closed``.

Four sets, never mixed: the *view* began the epoch; *active* = view - dead - late; *closed* are the contributors of one
exchange; *committed* is who was active at the commit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.wire.tickets import Measured, Posted, Returned, Secured, Waiting, among
from starling.algorithms.closing import Quorum, Waited
from starling.algorithms.words import listed
from starling.orchestrator.protocol.events import (
    Abort,
    Advance,
    AskAgain,
    Cancel,
    Close,
    Commit,
    Deadline,
    Decision,
    Deliver,
    Delivered,
    Diverged,
    Elapsed,
    Event,
    GiveUp,
    Lost,
    Measure,
    Posts,
    ProgramsDiverge,
    Reached,
    Returns,
    Secure,
    Withdrawn,
)
from starling.orchestrator.protocol.exchange import Exchange, Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from starling.algorithms.api import NodeId


_UNDER_WAY = frozenset({Phase.MEASURING, Phase.SECURING, Phase.DELIVERING})
_MAX_REPEATS = 8
"""Remakes of an exchange beyond two for each member of the view, before it is given up."""


class Rendezvous:
    """One attempt at one round. Decisions come back from ``handle``; after ``over`` there are no more."""

    def __init__(
        self,
        members: Sequence[NodeId],
        need: int,
        *,
        replicated: bool = True,
        heal: bool = False,
        began: float = 0.0,
    ) -> None:
        """``began`` is when the attempt did, on the clock of ``handle``.

        With ``heal`` a majority with one shared state commits, and the others are cancelled.
        """
        self.view = tuple(sorted(members))
        self.need = need
        self.active = set(self.view)
        self.exchanges: dict[int, Exchange] = {}
        self.returned: dict[NodeId, Returned] = {}
        """What active members said at the end of their programs."""
        self.over = False
        self.payload_nbytes = 0
        """Logical deliveries between distinct nodes so far."""
        self._replicated, self._heal = replicated, heal
        self._now = began
        self._last_close = began
        self._out: list[Decision] = []

    @property
    def is_waited_for(self) -> bool:
        """Whether any node waits for others to post or to return, or for an exchange to be carried out."""
        return bool(self.returned) or any(
            exchange.waiting or exchange.phase in _UNDER_WAY for exchange in self.exchanges.values()
        )

    def handle(self, event: Event, now: float = 0.0) -> list[Decision]:
        """Take one event that happened at ``now``, in seconds; return the decisions that follow, in order."""
        if self.over:
            return []
        self._now = now
        match event:
            case Reached(node, Posted() as ticket):
                self._post({node: ticket})
            case Reached(node, Waiting(seq)):
                self._waits(node, seq)
            case Reached(node, Returned() as ticket):
                self._return({node: ticket})
            case Posts(tickets):
                self._posts(tickets)
            case Returns(tickets):
                self._return(tickets)
            case Measured() | Secured():
                self._made(event)
            case Delivered():
                self._delivered(event)
            case Lost(node):
                self._lost(node)
            case Withdrawn(node, reason):
                self._cancel({node} & self.active, reason)
            case Deadline():
                self._deadline()
            case Elapsed(seq):
                self._elapsed(seq)
            case _:
                pass  # an operation that the rendezvous has nothing to do with
        if not self.over:
            self._try_commit()
        decisions, self._out = self._out, []
        return decisions

    # --- events ------------------------------------------------------------------------------------------------------

    def _post(self, posts: Mapping[NodeId, Posted]) -> None:
        """Take contributions to one exchange, announced at one moment."""
        active = {node: post for node, post in posts.items() if node in self.active}
        for node, post in active.items():
            self._admit(node, post)
            if self.over:
                return
        for post in active.values():
            self._try_close(self.exchanges[post.seq])
            return

    def _posts(self, posts: Mapping[NodeId, Posted]) -> None:
        """Take contributions that differ in nothing but ``wants``."""
        node, first = next(iter(posts.items()))
        if self.returned or first.seq in self.exchanges or not self.active.issuperset(posts):
            self._post(posts)
            return
        self._admit(node, first)
        exchange = self.exchanges[first.seq]
        exchange.posts = dict(posts)
        if first.waits:
            exchange.waiting.update(posts)
        self._try_close(exchange)

    def _admit(self, node: NodeId, post: Posted) -> None:
        done = next((node for node, one in self.returned.items() if one.num_collectives <= post.seq), None)
        if done is not None:
            self._fail_programs(post.seq, done, node, f"the end of the program; {post.signature}")
            return
        exchange = self.exchanges.get(post.seq)
        if exchange is None:
            exchange = self.exchanges[post.seq] = Exchange(post.seq)
        if not exchange.posts:
            exchange.first_at = None  # all that had come are gone
        if exchange.first_at is None and post.contributes:
            exchange.first_at, exchange.first_s = self._now, self._now - self._last_close
        exchange.is_gather = post.signature.operation != "AllReduce"
        first = next(iter(exchange.posts.values()), post)
        # Nodes of one process have one signature.
        if post.signature is not first.signature and not self._agrees(exchange, node, post):
            return
        exchange.posts[node] = post
        if post.waits:
            exchange.waiting.add(node)

    def _agrees(self, exchange: Exchange, node: NodeId, post: Posted) -> bool:
        """Compare a node's post with those that are there, all of which agree already."""
        others = list(exchange.posts.items())
        compared = others[:1]
        # The first contribution fixes what a receiver without one leaves open.
        if post.signature.tensors is not None:
            compared += [other for other in others if other[1].signature.tensors is not None][:1]
        for other, known in compared:
            if not post.signature.agrees_with(known.signature):
                self._fail_programs(post.seq, other, node, known.signature.against(post.signature))
                return False
        return True

    def _waits(self, node: NodeId, seq: int) -> None:
        if node not in self.active:
            return
        # A large contribution is announced when it is in the store, which may take longer than to come to wait for it.
        exchange = self.exchanges.setdefault(seq, Exchange(seq))
        if exchange.phase is Phase.CLOSED:
            self._advance(exchange, (node,))
        else:
            exchange.waiting.add(node)
            self._move(exchange)

    def _made(self, event: Measured | Secured) -> None:
        if isinstance(event, Measured):
            self._measured(event)
        else:
            self._secured(event)

    def _secured(self, event: Secured) -> None:
        exchange = self.exchanges[event.seq]
        if exchange.phase is not Phase.SECURING or event.generation != exchange.generation:
            return
        if exchange.is_gather:
            if event.by not in self.active:
                return
            exchange.secured[event.by] = event.got
        else:
            if exchange.makers[event.part] != event.by:
                return
            exchange.secured[event.part] = event.got
        self._book(exchange, event)
        if exchange.measured and event.by not in exchange.told:
            exchange.told.add(event.by)
            others = (one for one in exchange.measured.values() if one.by != event.by)
            self.payload_nbytes += sum(one.values.nbytes for one in others)
        self._try_agree(exchange)

    def _measured(self, event: Measured) -> None:
        exchange = self.exchanges[event.seq]
        stale = exchange.phase is not Phase.MEASURING or event.generation != exchange.generation
        if stale or exchange.makers[event.part] != event.by:
            return
        self._book(exchange, event)
        exchange.fetched[event.part, event.by] = event.got | exchange.held(event.part, event.by)
        exchange.measured[event.part] = event
        self._try_agree_on_measures(exchange)

    def _book(self, exchange: Exchange, event: Measured | Secured) -> None:
        """Count the contributions that a maker has fetched."""
        fetched = event.got - {event.by} - exchange.held(event.part, event.by)
        self.payload_nbytes += sum(exchange.posts[node].part_nbytes[event.part] for node in fetched)

    def _delivered(self, event: Delivered) -> None:
        exchange = self.exchanges[event.seq]
        stale = exchange.phase is not Phase.DELIVERING or event.generation != exchange.generation
        if stale or event.node not in self.active:
            return
        if event.missing:
            # Nobody has run on yet, so the parts can be made again of what is still there; the set only shrinks.
            for part in event.missing:
                exchange.secured.pop(part, None)
            self._secure(exchange, sorted(event.missing))
            return
        exchange.delivered.add(event.node)
        if not exchange.is_gather:
            sizes = exchange.posts[exchange.closed[0]].result_nbytes
            self.payload_nbytes += sum(sizes[part] for part, by in exchange.makers.items() if by != event.node)
        self._try_finish(exchange)

    def _return(self, reports: Mapping[NodeId, Returned]) -> None:
        """Take the ends of programs that had one number of collectives."""
        active = {node: report for node, report in reports.items() if node in self.active}
        if not active:
            return
        first, report = next(iter(active.items()))
        ahead = (exchange for exchange in self.exchanges.values() if exchange.seq >= report.num_collectives)
        other = next((one for exchange in ahead for one in exchange.posts.items()), None)
        if other is not None:
            node, post = other
            self._fail_programs(post.seq, first, node, f"the end of the program; {post.signature}")
            return
        self.returned |= active

    def _lost(self, node: NodeId) -> None:
        if node not in self.view:
            return
        if any(one.phase in _UNDER_WAY for one in self.exchanges.values()):
            self._out.append(GiveUp(node))
        self._leave({node})

    def _deadline(self) -> None:
        for exchange in list(self.exchanges.values()):
            if not self.over:
                self._try_close(exchange, past_deadline=True)
            if not self.over:
                self._leave_debtors(exchange)
        # The end of the program is waited for like an exchange.
        if not self.over and len(self.returned) >= self.need:
            self._cancel(self.active - self.returned.keys(), "it had not finished the round")

    def _elapsed(self, seq: int) -> None:
        exchange = self.exchanges.get(seq)
        if exchange is not None:  # else all who had come to it are gone
            self._try_close(exchange)

    def _leave_debtors(self, exchange: Exchange) -> None:
        """Cancel nodes that have owed an answer since the deadline before: a member may hang in an exchange too."""
        match exchange.phase:
            case Phase.SECURING if exchange.is_gather:
                owing = self.active - exchange.secured.keys()
            case Phase.MEASURING | Phase.SECURING:
                owing = {by for part, by in exchange.makers.items() if part not in exchange.made} & self.active
            case Phase.DELIVERING:
                owing = self.active - exchange.delivered
            case _:
                owing = set()
        asked = exchange.phase, exchange.generation
        if exchange.asked == asked and len(self.active) - len(owing) >= self.need:
            self._cancel(owing, f"it had not answered in exchange {exchange.seq}")
        exchange.asked = asked

    # --- who is in ---------------------------------------------------------------------------------------------------

    def _cancel(self, nodes: set[NodeId], reason: str) -> None:
        if nodes:
            self._out.extend(Cancel(node, reason) for node in sorted(nodes))
            self._leave(nodes)

    def _leave(self, nodes: set[NodeId]) -> None:
        """Take ``nodes`` out of the active set, dead or late, and see what that moves."""
        self.active -= nodes
        if len(self.active) < self.need:
            self._abort(f"{len(self.active)} of {len(self.view)} members are left, {self.need} are needed")
            return
        for node in nodes:
            self.returned.pop(node, None)
        for exchange in list(self.exchanges.values()):
            exchange.waiting -= nodes
            exchange.delivered -= nodes
            if exchange.phase is Phase.OPEN:
                for node in nodes:
                    exchange.posts.pop(node, None)
                if not exchange.posts and not exchange.waiting:
                    # Only they had come so far. An exchange that nobody else awaits must not hold up the commit.
                    del self.exchanges[exchange.seq]
            elif exchange.is_gather:
                for node in nodes:
                    exchange.secured.pop(node, None)
        for exchange in list(self.exchanges.values()):
            if not self.over:
                self._move(exchange)

    def _move(self, exchange: Exchange) -> None:
        """Take an exchange as far as it can go with those that are active now."""
        match exchange.phase:
            case Phase.OPEN:
                self._try_close(exchange)
            case Phase.MEASURING:
                self._check_need(exchange)
                if not self.over:
                    self._replace_makers(exchange)
                    self._try_agree_on_measures(exchange)
            case Phase.SECURING:
                self._check_need(exchange)
                if not self.over:
                    self._replace_makers(exchange)
                    self._try_agree(exchange)
            case Phase.DELIVERING:
                self._check_need(exchange)
                if not self.over:
                    self._try_finish(exchange)
            case Phase.CLOSED:
                pass

    def _check_need(self, exchange: Exchange) -> None:
        if not exchange.closed:
            self._abort(_nobody(exchange))
            return
        least = max(post.least for post in exchange.posts.values())
        if len(exchange.closed) < least:
            count = len(exchange.closed)
            self._abort(f"exchange {exchange.seq} has {count} contributions, and its aggregator needs {least}", least)
            return
        receivers = {node for node in self.active if not exchange.posts[node].contributes}
        if len(receivers.union(exchange.closed)) < self.need:
            self._abort(f"exchange {exchange.seq} has fewer than the {self.need} members that are needed")

    # --- an exchange's way -------------------------------------------------------------------------------------------

    def _try_close(self, exchange: Exchange, *, past_deadline: bool = False) -> None:
        """Open → measuring, securing or closed, when everybody active has posted or enough have."""
        if exchange.phase is not Phase.OPEN:
            return
        if len(exchange.posts) < len(self.active):
            if self._enough(exchange, past_deadline=past_deadline):
                # This comes back here, and then nobody is missing.
                late = self.active - exchange.posts.keys()
                self._cancel(late, f"it had not reached exchange {exchange.seq} when that closed")
            return
        exchange.closed = tuple(sorted(node for node, post in exchange.posts.items() if post.contributes))
        self._check_need(exchange)
        if self.over:
            return
        if exchange.inline:
            self.payload_nbytes += self._inline_nbytes(exchange)
            self._close(exchange)
            return
        if exchange.measures:
            self._measure(exchange, range(exchange.num_parts))
            return
        self._secure(exchange, range(exchange.num_parts))

    def _inline_nbytes(self, exchange: Exchange) -> int:
        """Return the bytes of a small exchange: each contribution, times its receivers."""
        sizes = {node: sum(exchange.posts[node].part_nbytes) for node in exchange.closed}
        if not any(exchange.posts[by].wants is not None for by in self.active):
            return sum(sizes.values()) * (len(self.active) - 1)
        wanted = ((by, among(exchange.posts[by].wants or frozenset(), sizes)) for by in self.active)
        return sum([sizes[node] for by, those in wanted for node in those if node != by])

    def _enough(self, exchange: Exchange, *, past_deadline: bool) -> bool:
        """Whether those that have not posted are to be left behind: the deadline's row, or the policy's word."""
        if len(exchange.posts) < self.need or not exchange.waiting:
            return False
        policy = next(iter(exchange.posts.values())).close
        if policy is None or isinstance(policy, Quorum):
            return past_deadline
        receivers = {node for node, post in exchange.posts.items() if not post.contributes}
        arrived, expected = exchange.posts.keys() - receivers, self.active - receivers
        since_first_s = 0.0 if exchange.first_at is None else self._now - exchange.first_at
        waited = Waited(exchange.first_s, since_first_s)
        if policy.enough(arrived, expected, waited):
            return True
        if past_deadline:
            if policy.past_deadline(arrived, expected):
                return True
            late = listed(sorted(expected - arrived))
            self._abort(f"exchange {exchange.seq} cannot close without nodes {late}, says its policy {policy.name!r}")
            return False
        again = policy.ask_again_s(arrived, expected, waited)
        if again is not None:
            self._out.append(AskAgain(exchange.seq, again))
        return False

    def _begin(self, exchange: Exchange, phase: Phase) -> bool:
        """Enter a phase in which parts are made, for the first time or again; return False if that was too often."""
        exchange.phase = phase
        exchange.generation += 1
        # Each repetition loses a contribution or a member, unless two living members cannot reach one another.
        if exchange.generation > (2 * len(self.view) + _MAX_REPEATS) * (1 + exchange.measures):
            self._abort(
                f"exchange {exchange.seq} was made {exchange.generation} times, and a part is missing each time"
            )
            return False
        return True

    def _measure(self, exchange: Exchange, parts: Sequence[int]) -> None:
        """Ask for the measures of ``parts`` of the contributions of ``exchange.closed``."""
        if self._begin(exchange, Phase.MEASURING):
            self._share_out(exchange, parts)

    def _secure(self, exchange: Exchange, parts: Sequence[int]) -> None:
        """Ask for ``parts`` to be made of ``exchange.closed``."""
        exchange.delivered.clear()
        if not self._begin(exchange, Phase.SECURING):
            return
        if exchange.is_gather:
            exchange.secured.clear()
            for node in sorted(self.active):
                self._request(exchange, 0, node)
            return
        self._share_out(exchange, parts)

    def _share_out(self, exchange: Exchange, parts: Sequence[int]) -> None:
        """Ask members for ``parts``, each of one."""
        # Contributors first: a maker that contributes has its own share already, so fewer bytes travel.
        makers = [node for node in exchange.closed if node in self.active] or sorted(self.active)
        for part in parts:
            maker = exchange.makers.get(part)
            # Who has measured a part holds its contributions.
            if maker is None or maker not in self.active or not exchange.held(part, maker):
                exchange.makers[part] = makers[part % len(makers)]
            self._request(exchange, part, exchange.makers[part])

    def _request(self, exchange: Exchange, part: int, by: NodeId) -> None:
        seq, generation, held = exchange.seq, exchange.generation, exchange.held(part, by)
        if exchange.phase is Phase.MEASURING:
            self._out.append(Measure(seq, part, by, exchange.closed, generation, held))
            return
        members = exchange.wanted(by) if exchange.is_gather else exchange.closed
        self._out.append(Secure(seq, part, by, members, generation, held, exchange.measures_in_order))

    def _replace_makers(self, exchange: Exchange) -> None:
        """Hand unfinished parts of makers that have left to the next active member in cyclic order."""
        for part, maker in exchange.makers.items():
            if maker not in self.active and part not in exchange.made:
                active = sorted(self.active)
                exchange.makers[part] = next((node for node in active if node > maker), active[0])
                self._request(exchange, part, exchange.makers[part])

    def _try_agree_on_measures(self, exchange: Exchange) -> None:
        """Measuring → securing, when all parts of one set of contributions are measured."""
        if len(exchange.measured) < len(exchange.makers):
            return
        agreed = frozenset(exchange.closed).intersection(*(one.got for one in exchange.measured.values()))
        exchange.closed = tuple(sorted(agreed))
        self._check_need(exchange)
        if self.over:
            return
        other = sorted(part for part, one in exchange.measured.items() if one.got != agreed)
        if other:
            for part in other:
                del exchange.measured[part]
            self._measure(exchange, other)
            return
        self._secure(exchange, range(exchange.num_parts))

    def _try_agree(self, exchange: Exchange) -> None:
        """Securing → delivering, when all parts are made of one set."""
        expected = len(self.active) if exchange.is_gather else len(exchange.makers)
        if len(exchange.secured) < expected:
            return
        if exchange.is_gather:
            missing = (frozenset(exchange.wanted(by)) - got for by, got in exchange.secured.items())
            agreed = frozenset(exchange.closed).difference(*missing)
        else:
            agreed = frozenset(exchange.closed).intersection(*exchange.secured.values())
        is_smaller = len(agreed) < len(exchange.closed)
        exchange.closed = tuple(sorted(agreed))
        self._check_need(exchange)
        if self.over:
            return
        if is_smaller and exchange.measured:
            # All parts again, also those that were made of what is left: their coefficients are those of more.
            exchange.measured.clear()
            exchange.secured.clear()
            exchange.told.clear()
            self._measure(exchange, range(exchange.num_parts))
            return
        if exchange.is_gather:
            if any(not got.issuperset(exchange.wanted(by)) for by, got in exchange.secured.items()):
                self._secure(exchange, ())  # others take the places of those that are missing now
                return
        else:
            other = sorted(part for part, got in exchange.secured.items() if got != agreed)
            if other:
                for part in other:
                    del exchange.secured[part]
                self._secure(exchange, other)
                return
        exchange.phase = Phase.DELIVERING
        unfetched = {node for node in self.active - agreed if exchange.posts[node].contributes}
        self._cancel(unfetched, f"nobody could fetch what it contributed to exchange {exchange.seq}")
        if self.over:
            return
        makers = tuple(exchange.makers[part] for part in sorted(exchange.makers))
        self._out.append(
            Deliver(exchange.seq, tuple(sorted(self.active)), exchange.closed, makers, exchange.generation)
        )

    def _try_finish(self, exchange: Exchange) -> None:
        """Delivering → closed, when every active member has the result."""
        if len(exchange.delivered) == len(self.active):
            self._close(exchange)

    def _close(self, exchange: Exchange) -> None:
        exchange.phase = Phase.CLOSED
        self._last_close = self._now
        self._out.append(Close(exchange.seq, exchange.closed, exchange.inline))
        self._advance(exchange, tuple(sorted(exchange.waiting)))

    def _advance(self, exchange: Exchange, nodes: tuple[NodeId, ...]) -> None:
        exchange.waiting.difference_update(nodes)
        if nodes:
            self._out.append(Advance(exchange.seq, nodes, exchange.closed, exchange.inline))

    # --- the end -----------------------------------------------------------------------------------------------------

    def _try_commit(self) -> None:
        if len(self.returned) < len(self.active) or any(
            exchange.phase is not Phase.CLOSED for exchange in self.exchanges.values()
        ):
            return
        self.over = True
        groups: dict[str, list[NodeId]] = {}
        for node in sorted(self.active):
            groups.setdefault(self.returned[node].digest, []).append(node)
        if self._replicated and len(groups) > 1 and not self._healed(groups.values()):
            return
        self._out.append(Commit(tuple(sorted(self.active))))

    def _healed(self, groups: Iterable[Sequence[NodeId]]) -> bool:
        """Report that replicas differ; return True if a majority goes on, and cancel the other nodes then."""
        largest_first = tuple(tuple(group) for group in sorted(groups, key=len, reverse=True))
        majority = largest_first[0]
        healed = self._heal and 2 * len(majority) > len(self.active) and len(majority) >= self.need
        self._out.append(Diverged(largest_first, healed))
        if healed:
            others = sorted(self.active.difference(majority))
            self._out.extend(Cancel(node, "its shared state differs from that of most") for node in others)
            self.active.intersection_update(majority)
        return healed

    def _abort(self, reason: str, least: int = 1) -> None:
        if not self.over:
            self.over = True
            self._out.append(Abort(reason, least))

    def _fail_programs(self, seq: int, first: NodeId, second: NodeId, message: str) -> None:
        self.over = True
        self._out.append(ProgramsDiverge(seq, first, second, message))


def _nobody(exchange: Exchange) -> str:
    """Say why an exchange has no contributions."""
    skipped = {node: post.skipped for node, post in sorted(exchange.posts.items()) if post.skipped}
    if not skipped:
        return f"nobody contributes to exchange {exchange.seq}, or nobody can fetch what is contributed"
    first, reason = next(iter(skipped.items()))
    who = f"node {first} skips" if len(skipped) == 1 else f"nodes {listed(skipped)} skip"
    others = "" if len(skipped) == 1 else f"node {first}: "
    advice = "lower optimizer.lr"
    return f"nobody contributes to exchange {exchange.seq}: {who} the round (on_nan: skip); {others}{reason}; {advice}"
