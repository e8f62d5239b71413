"""The close policy interface, and the policies that count who has arrived."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, PositiveInt

from starling.algorithms.registry import Part

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

# A clock of floats rounds: asked again after 0.1 s, a policy may find that 0.0999999 s have passed. If it asked for the
# rest, which may not move the clock at all, it would do so for ever. Up to 2³² s a clock is finer than this.
_RESOLUTION_S = 1e-6


@dataclass(frozen=True)
class Waited:
    """Durations of an exchange so far, in seconds on the runtime's clock."""

    first_s: float
    """Time of the fastest member: from the round's begin, or the preceding exchange's close, to the first arrival."""
    since_first_s: float
    """Time since the first arrival."""

    def left_s(self, seconds: float, factor: float = 0.0) -> float:
        """Return the rest of ``seconds`` or ``factor`` · ``first_s``, whichever is longer, since the first arrival.

        Less than a microsecond counts as 0.

        >>> Waited(first_s=4.0, since_first_s=1.5).left_s(2.0), Waited(4.0, 1.5).left_s(2.0, factor=1.0)
        (0.5, 2.5)
        """
        left_s = max(seconds, factor * self.first_s) - self.since_first_s
        return left_s if left_s > _RESOLUTION_S else 0.0


class ClosePolicy(Part, family="close policy", catalog="starling.algorithms.closing"):
    """A pure decision over who has arrived.

    The rendezvous asks after each arrival, and when the time is over that ``ask_again_s`` gave. While the answer is no,
    the exchange waits for every active member, up to the round's deadline. Once it is yes, members that have not
    arrived are treated as past the deadline. More arrivals never turn a yes into a no, and when all that are active
    have arrived every policy says yes: there is nobody left to wait for.
    """

    @abstractmethod
    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> bool:
        """Say whether ``arrived`` (a subset of ``active``) suffices after this time.

        ``arrived`` and ``active`` count those that contribute; a member that only receives is not waited for.
        """

    def ask_again_s(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> float | None:
        """Return the seconds after which to ask again without an arrival; ``None``: ask at the next arrival."""
        del arrived, active, waited
        return None

    def past_deadline(self, arrived: AbstractSet[int], active: AbstractSet[int]) -> bool:
        """Say whether the exchange may close with ``arrived`` when the round's deadline is over."""
        del arrived, active
        return True


class Quorum(ClosePolicy, name="quorum"):
    """Waits for all that are active; only the round's deadline closes it earlier. The default.

    >>> Quorum().enough({0, 1}, {0, 1, 2}, Waited(1.0, 60.0)), Quorum().past_deadline({0, 1}, {0, 1, 2})
    (False, True)
    """

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> bool:
        """Close when all active members have arrived."""
        del waited
        return arrived == active


class Everyone(ClosePolicy, name="all"):
    """Never closes without all that are active, past the deadline either.

    >>> Everyone().past_deadline({0, 1}, {0, 1, 2})
    False
    """

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> bool:
        """Close when all active members have arrived."""
        del waited
        return arrived == active

    def past_deadline(self, arrived: AbstractSet[int], active: AbstractSet[int]) -> bool:
        """Close when all active members have arrived."""
        return arrived == active


class FirstK(ClosePolicy, name="first_k"):
    """Closes with the first k arrivals, or with all that are active if these are fewer.

    >>> FirstK(k=2).enough({0, 3}, {0, 1, 2, 3}, Waited(1.0, 0.0))
    True
    """

    k: PositiveInt  # members whose contributions are waited for

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> bool:
        """Close when k members, or all active ones, have arrived."""
        del waited
        return len(arrived) >= min(self.k, len(active))


class Grace(ClosePolicy, name="grace"):
    """Closes some time after the first arrival, when enough have arrived by then.

    The grace counts from the first arrival, whose pace is the only one that is known early. It lasts ``seconds``, or
    ``factor`` times the first one's time if that is longer. Slower members are left behind, but not before ``after``
    have arrived.

    >>> policy, active = Grace(after=2, seconds=5.0), {0, 1, 2, 3}
    >>> policy.enough({0, 3}, active, Waited(1.0, 4.0)), policy.ask_again_s({0, 3}, active, Waited(1.0, 4.0))
    (False, 1.0)
    >>> policy.enough({0, 3}, active, Waited(1.0, 5.0)), policy.enough({0}, active, Waited(1.0, 5.0))
    (True, False)
    """

    after: PositiveInt = 1  # members that are waited for in any case
    seconds: NonNegativeFloat = 0  # from the first arrival, on the runtime's clock
    factor: NonNegativeFloat = 0  # the same, as a multiple of what the first took; the later of the two counts

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> bool:
        """Close when the time is over and ``after`` members have arrived, or all active ones have."""
        return arrived == active or (not self._left_s(waited) and len(arrived) >= self.after)

    def ask_again_s(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> float | None:
        """Ask again at the end of the time, if nothing else is missing."""
        left_s = self._left_s(waited)
        return left_s if left_s and arrived != active and len(arrived) >= self.after else None

    def _left_s(self, waited: Waited) -> float:
        return waited.left_s(self.seconds, self.factor)
