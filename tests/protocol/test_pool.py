"""The pool's policy: what it decides, given what has happened."""

from __future__ import annotations

from starling.orchestrator.protocol.pool import Launch, Pool, StandBy


def decided(pool: Pool, now: float, num_spares: int = 0) -> list[tuple[int, ...] | int]:
    return [one.nodes if isinstance(one, Launch) else one.count for one in pool.decide(now, num_spares)]


def test_a_lost_node_is_started_again_with_growing_pauses_and_given_up_in_a_crash_loop():
    pool = Pool(range(4), most=4)
    delays: list[float] = []
    now = 100.0
    while pool.lost(3, now):
        due = pool.next_due()
        assert due is not None
        delays.append(due - now)
        assert due == now or decided(pool, due - 1e-6) == []
        now = due
        assert decided(pool, now) == [(3,)]
        assert pool.next_due() is None
        pool.up(3)
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert decided(pool, 1e9) == []


def test_a_node_that_does_not_come_up_is_a_crash_too():
    pool = Pool(range(2), most=2)
    assert pool.lost(1, 0.0)
    assert decided(pool, 0.0) == [(1,)]
    assert [pool.failed(1, 0.0) and decided(pool, 100.0) == [(1,)] for _ in range(5)] == [True] * 4 + [False]


def test_a_commit_forgives():
    pool = Pool(range(2), most=2)
    for _ in range(20):
        assert pool.lost(1, 5.0)
        assert decided(pool, 5.0) == [(1,)]
        pool.up(1)
        pool.committed((0, 1))


def test_a_pause_is_kept_when_others_commit():
    pool = Pool(range(2), most=2)
    for _ in range(2):
        pool.lost(1, 0.0)
        decided(pool, 0.0)
        pool.up(1)
    assert pool.next_due() == 0.5
    pool.committed((0, 1))
    assert pool.next_due() == 0.5


def test_who_is_to_take_a_leaving_nodes_place_is_started_once():
    pool = Pool(range(4), most=4)
    pool.leaves(2, 1.0)
    assert decided(pool, 1.0) == [(2,)]
    pool.leaves(2, 1.5)
    assert decided(pool, 1.5) == []
    assert pool.lost(2, 2.0)  # before its time: its successor is on the way
    assert decided(pool, 2.0) == []
    pool.up(2)
    assert pool.lost(2, 3.0)
    assert decided(pool, 3.0) == [(2,)]


def test_a_late_node_is_wanted_when_its_time_comes():
    pool = Pool((0, 1), most=3)
    assert decided(pool, 0.0) == []
    pool.want(2, 7.0)
    assert decided(pool, 7.0) == [(2,)]
    assert decided(pool, 8.0) == []


def test_spares_are_kept_up():
    pool = Pool(range(3), most=3, warm_spares=2)
    assert pool.decide(0.0, 0) == [StandBy(2)]
    assert decided(pool, 0.0, 2) == []
    pool.lost(1, 1.0)
    # The one that takes the place no longer stands by.
    assert decided(pool, 1.0, 2) == [(1,), 1]
    assert decided(pool, 1.0, 2) == []


def test_spares_that_die_are_replaced_with_pauses_and_given_up():
    pool = Pool(range(3), most=3, warm_spares=1)
    assert decided(pool, 0.0) == [1]
    assert pool.spare_lost(0.0)
    assert decided(pool, 0.0) == [1]
    assert pool.spare_lost(0.0)
    assert decided(pool, 0.4) == []
    assert decided(pool, 0.5) == [1]
    while pool.spare_lost(1.0):
        pass
    assert decided(pool, 1e9) == []


def test_auto_grows_where_there_is_room_up_to_max():
    pool = Pool((0, 1), most=5, auto=True)
    assert decided(pool, 0.0) == []
    pool.room(2)
    assert decided(pool, 1.0) == [(2, 3)]
    pool.room(2)  # counted before those two have taken their places
    assert decided(pool, 2.0) == []
    pool.up(2)
    pool.up(3)
    pool.room(9)
    assert decided(pool, 3.0) == [(4,)]
    pool.up(4)
    pool.room(9)
    assert decided(pool, 4.0) == []


def test_auto_fills_processes():
    pool = Pool((0, 1), most=8, auto=True, per_process=2)
    pool.room(2)
    assert decided(pool, 0.0) == [(2, 3, 4, 5)]


def test_nodes_that_are_being_started_take_whole_processes():
    """Three nodes take two of four processes, with two nodes in each."""
    pool = Pool((0, 1, 2), most=20, auto=True, per_process=2)
    pool.starting((0, 1, 2))
    pool.room(4)
    assert decided(pool, 0.0) == [(3, 4, 5, 6)]


def test_room_counts_once():
    pool = Pool((0,), most=9, auto=True)
    pool.room(2)
    assert decided(pool, 0.0) == [(1, 2)]
    pool.up(1)
    pool.up(2)
    assert decided(pool, 1.0) == [], "those two have taken it"


def test_the_first_that_is_due_is_waited_for():
    pool = Pool((0,), most=4)
    for node, due in ((2, 7.0), (3, 5.0), (1, 9.0)):
        pool.want(node, due)
    assert pool.next_due() == 5.0
    assert decided(pool, 5.0) == [(3,)]
    assert pool.next_due() == 7.0


def test_a_fixed_target_ignores_room():
    pool = Pool((0, 1), most=8)
    pool.room(3)
    assert decided(pool, 0.0) == []


def test_a_spare_that_is_started_after_a_pause_is_started_while_nothing_else_happens():
    pool = Pool(range(3), most=3, warm_spares=1)
    assert decided(pool, 0.0) == [1]
    assert pool.next_due(num_spares=1) is None
    assert pool.spare_lost(5.0)
    assert pool.spare_lost(5.0)
    due = pool.next_due(num_spares=0)
    assert due is not None
    assert due > 5.0
    assert decided(pool, 5.0) == []
    assert decided(pool, due) == [1]
