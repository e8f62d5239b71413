"""Close policies: when an exchange may close without everyone."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from algorithms.registry import Part

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet


class ClosePolicy(Part, family="close policy", catalog="algorithms.closing"):
    """A pure decision over who has arrived.

    The rendezvous asks after each arrival. While the answer is no, the exchange waits for every active member, up to
    the round's deadline. Once it is yes, members that have not arrived are treated as past the deadline.
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


class Quorum(ClosePolicy, name="quorum"):
    """Waits for all that are active; only the round's deadline closes it earlier. The default."""

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited_s: float) -> bool:
        """When nobody is missing."""
        del waited_s
        return arrived == active
