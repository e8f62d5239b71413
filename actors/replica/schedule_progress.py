"""A node's progress along the learning-rate schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.data.samplers import planned_samples
from starling.actors.replica.pace import Milestone

if TYPE_CHECKING:
    from starling.actors.replica.pace import Pace
    from starling.actors.replica.spec import ReplicaSpec


class ScheduleProgress:
    """Counts a node's optimizer steps, and gives the learning rate of the next one.

    Args:
        spec: of the run.
        pace: the run's steps, as they are planned.
        num_samples: of the node; ``None``: it is the server, and takes no steps.

    Raises:
        SettingsError: the schedule needs the number of the run's steps, and nothing says it.
    """

    def __init__(self, spec: ReplicaSpec, pace: Pace, num_samples: int | None) -> None:
        self._config, self._pace = spec.optimizer, pace
        self._is_synchronous = spec.algorithm.synchronous
        self.step = 0
        """Optimizer steps that the node has taken."""
        self.milestone = Milestone()
        """The node's place in the run, in rounds and optimizer steps."""
        planned = 0
        if num_samples is not None:
            drawn = planned_samples(num_samples, spec.samples_per_step, spec.min_batch)
            planned = spec.algorithm.steps_per_round(drawn, spec.samples_per_step)
        self._own_steps = planned or 0
        if num_samples is not None and (planned is None or pace.steps):
            self.rate()  # raises, before anything is trained, if the schedule cannot work

    def rate(self, ahead: int = 0) -> float:
        """Return the learning rate of the next step, or of one ``ahead`` of it."""
        schedule, pace, (number, taken) = self._config.schedule, self._pace, self.milestone
        if schedule.is_flat:
            return self._config.lr
        place = pace.place(Milestone(number, taken + ahead), self._own_steps)
        if self._is_synchronous or not pace.steps:
            # It has taken more only if that is more than it plans; it is not to go by one step twice.
            place = max(place, self.step + ahead)
        return self._config.lr * schedule.factor(place, pace.total_steps(schedule))

    @property
    def place(self) -> tuple[object, ...] | None:
        """Node-specific inputs of ``rate``, as a key for batching; ``None`` with a flat schedule."""
        if self._config.schedule.is_flat:
            return None
        return self.milestone, self._own_steps, self.step

    def hear(self, number: int) -> None:
        """Enter round ``number`` of the run, by the count of the server or of the node itself."""
        if number != self.milestone.round:
            self.milestone = Milestone(number)

    def advance(self, steps: int) -> None:
        """Count ``steps`` more optimizer steps."""
        self.step += steps
        self.milestone = Milestone(self.milestone.round, self.milestone.steps + steps)
