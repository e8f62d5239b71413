"""The pace maps a node's steps to steps of the run, by which learning-rate schedules go on all nodes alike.

Steps count as those of a node that is in every round, and are derived from the run's rounds. So a node that sits a
round out, or joins late, is at the others' place. With n steps in a round of the run, and k taken since it began,

    place = n · round + k          T = n · rounds

Where nodes take n_i < n steps, each of theirs counts n / n_i. Without a barrier n is the steps of K/N node rounds, or
of ``Algorithm.node_rounds``, in one round of the server. ``round`` is then the server's round at its last message that
the node received. k is at most n, or a round of the node's if that has more: a faster node waits for the server's next
round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from starling.actors.data.samplers import planned_samples
from starling.algorithms.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.actors.replica.spec import ReplicaSpec
    from starling.actors.training.optimizers import Schedule


class Milestone(NamedTuple):
    """A node's place in the run."""

    round: int = 0
    """Latest round of the run that the node knows of."""
    steps: int = 0
    """Optimizer steps that the node has taken since that round began."""


@dataclass(frozen=True)
class Pace:
    """A run's steps, as its configuration and data plan them."""

    rounds: int
    steps: float
    """n, of a node in a round of the run. 0: none is planned, and nodes go by those that they have taken."""
    most: int
    """The most that any node takes in one of its own rounds."""

    @staticmethod
    def of(spec: ReplicaSpec, num_samples: Sequence[int], num_nodes: int) -> Pace:
        """Return the pace of a run among ``num_nodes`` nodes that own ``num_samples`` each."""
        size = spec.samples_per_step
        drawn = {planned_samples(count, size, spec.min_batch) for count in num_samples}
        most = max((spec.algorithm.steps_per_round(count, size) or 0 for count in drawn), default=0)
        return Pace(spec.rounds, most * spec.algorithm.node_rounds(num_nodes), most)

    @property
    def planned_steps(self) -> float:
        """Steps of the whole run."""
        return self.rounds * self.steps

    def total_steps(self, schedule: Schedule) -> float:
        """Return T: the schedule's own, or the run's.

        Raises:
            SettingsError: the schedule has none, and neither has the run.
        """
        if schedule.total_steps is None and not self.steps and schedule.name != "constant":
            unknown = f"{schedule.name} goes by the steps of the whole run, and the algorithm does not say how many"
            raise SettingsError(
                f"optimizer.schedule: {unknown}; set total_steps, or define steps_per_round in its class"
            )
        return self.planned_steps if schedule.total_steps is None else schedule.total_steps

    def place(self, milestone: Milestone, own_steps: int) -> float:
        """Return how many steps of the run a node has done at ``milestone`` that takes ``own_steps`` in a round."""
        taken = milestone.steps * (self.most / own_steps if own_steps else 1.0)
        return milestone.round * self.steps + min(taken, max(self.steps, self.most))
