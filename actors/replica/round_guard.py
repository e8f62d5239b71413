"""The guard of a node's round: values that are not finite stop the run, or the node skips its round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.replica.spec import NOT_STARTED, NonFiniteLossError, node_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.algorithms.api import NodeId


class RoundGuard:
    """Decides about a node's values that are not finite, as ``on_nan`` says.

    Args:
        node: whose rounds they are.
        skips: whether the run goes on without the node's round; else it stops.
        undo: takes the node's model back to the last commit, and its optimizer to its beginning.
    """

    def __init__(self, node: NodeId, undo: Callable[[], None], *, skips: bool) -> None:
        self._node, self._undo, self._skips = node, undo, skips
        self._round = NOT_STARTED
        self.skipping = False
        """Set for the rest of a round in which a value was not finite: the node contributes nothing."""
        self.reason = ""
        """Why the node skips, or skipped last."""

    def begin(self, number: int) -> None:
        """Enter round ``number``."""
        self._round, self.skipping = number, False

    def give_up(self, what: str, culprit: str | None = None) -> None:
        """Skip the rest of the round, and go back to what was committed.

        Args:
            what: is not finite, and where.
            culprit: the sample that the value comes from, if one is known.

        Raises:
            NonFiniteLossError: ``on_nan`` is ``stop``.
        """
        if not self._skips:
            hint = "lower optimizer.lr" if culprit is None else f"{culprit}: mend the data, or leave such samples out"
            where = f"{node_name(self._node)}, round {self._round}: {what}; {hint}"
            raise NonFiniteLossError(f"{where}, or set on_nan: skip to go on without this node's round")
        # The round goes on with what was committed; the optimizer's moments have seen the NaN and are made anew.
        self.skipping, self.reason = True, what
        self._undo()
