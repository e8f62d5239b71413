"""The close policy interface, and the policies that count who has arrived."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, PositiveInt

from algorithms.registry import Part

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

# A clock that rounds may not move at all for the rest of a float's last digit: asked again after that, and after no
# time again, a policy would be asked for ever.
_MIN_AGAIN_S = 0.001


class ClosePolicy(Part, family="close policy", catalog="algorithms.closing"):
    """A pure decision over who has arrived.

    The rendezvous asks after each arrival. While the answer is no, the exchange waits for every active member, up to
    the round's deadline. Once it is yes, members that have not arrived are treated as past the deadline. More arrivals
    never turn a yes into a no, and when all that are active have arrived every policy says yes: there is nobody left
    to wait for.
    """

    @abstractmethod
    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited_s: float) -> bool:
        """Say whether ``arrived`` (a subset of ``active``) suffices, ``waited_s`` after the first arrival.

        ``arrived`` and ``active`` count those that contribute; a member that only receives is not waited for.
        """

    def ask_again_s(self, arrived: AbstractSet[int], active: AbstractSet[int], waited_s: float) -> float | None:
        """After how many more seconds to ask again although nobody else has arrived; ``None``: at the next arrival."""
        del arrived, active, waited_s
        return None

    def past_deadline(self, arrived: AbstractSet[int], active: AbstractSet[int]) -> bool:
        """Say whether the exchange may close with ``arrived`` when the round's deadline is over."""
        del arrived, active
        return True


class Quorum(ClosePolicy, name="quorum"):
    """Waits for all that are active; only the round's deadline closes it earlier. The default.

    >>> Quorum().enough({0, 1}, {0, 1, 2}, waited_s=60.0), Quorum().past_deadline({0, 1}, {0, 1, 2})
    (False, True)
    """

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited_s: float) -> bool:
        """When nobody is missing."""
        del waited_s
        return arrived == active


class Everyone(ClosePolicy, name="all"):
    """Never closes without all that are active, past the deadline either.

    >>> Everyone().past_deadline({0, 1}, {0, 1, 2})
    False
    """

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited_s: float) -> bool:
        """When nobody is missing."""
        del waited_s
        return arrived == active

    def past_deadline(self, arrived: AbstractSet[int], active: AbstractSet[int]) -> bool:
        """When nobody is missing."""
        return arrived == active


class FirstK(ClosePolicy, name="first_k"):
    """Closes with the first k arrivals, or with all that are active if these are fewer.

    >>> FirstK(k=2).enough({0, 3}, {0, 1, 2, 3}, waited_s=0.0)
    True
    """

    k: PositiveInt  # members whose contributions are waited for

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited_s: float) -> bool:
        """When k have arrived, or everybody has."""
        del waited_s
        return len(arrived) >= min(self.k, len(active))


class Grace(ClosePolicy, name="grace"):
    """Closes some time after the first arrival, when enough have arrived by then.

    The time counts from the first arrival, whose pace is the only one that is known early: members that are slower by
    more than ``seconds`` are left behind, but not before ``after`` have arrived.

    >>> policy = Grace(after=2, seconds=5.0)
    >>> policy.enough({0, 3}, {0, 1, 2, 3}, waited_s=4.0), policy.ask_again_s({0, 3}, {0, 1, 2, 3}, waited_s=4.0)
    (False, 1.0)
    >>> policy.enough({0, 3}, {0, 1, 2, 3}, waited_s=5.0), policy.enough({0}, {0, 1, 2, 3}, waited_s=5.0)
    (True, False)
    """

    after: PositiveInt = 1  # members that are waited for in any case
    seconds: NonNegativeFloat  # from the first arrival, on the runtime's clock

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited_s: float) -> bool:
        """When the time is over and ``after`` have arrived, or everybody has."""
        return arrived == active or (waited_s >= self.seconds and len(arrived) >= self.after)

    def ask_again_s(self, arrived: AbstractSet[int], active: AbstractSet[int], waited_s: float) -> float | None:
        """When the time is over, if only that is missing."""
        if waited_s >= self.seconds or len(arrived) < self.after or arrived == active:
            return None
        return max(self.seconds - waited_s, _MIN_AGAIN_S)
