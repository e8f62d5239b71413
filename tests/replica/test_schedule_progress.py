"""A node's progress along the learning-rate schedule."""

from __future__ import annotations

import pytest

from starling.actors.replica.pace import Milestone
from starling.actors.replica.schedule_progress import ScheduleProgress
from tests.toys import replica


def progress(**keys: object) -> ScheduleProgress:
    return replica(rounds=10, **keys).schedule  # type: ignore[arg-type]


def test_steps_move_the_rate_and_the_milestone_and_rounds_begin_it_anew():
    schedule = progress(schedule="linear")
    before, ahead = schedule.rate(), schedule.rate(2)
    schedule.advance(2)
    assert (schedule.step, schedule.milestone) == (2, Milestone(0, 2))
    assert before > schedule.rate() == pytest.approx(ahead)
    schedule.hear(0)
    assert schedule.milestone == Milestone(0, 2), "it is in that round already"
    schedule.hear(3)
    assert (schedule.step, schedule.milestone) == (2, Milestone(3, 0))


def test_nodes_with_one_place_have_one_rate():
    flat, one, other = progress(), progress(schedule="linear"), progress(schedule="linear")
    assert flat.place is None
    assert one.place == other.place
    one.advance(1)
    assert one.place != other.place
