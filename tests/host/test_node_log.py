"""Logs of single nodes."""

from __future__ import annotations

import io

from starling.actors.host.node_log import NodeLogs, Tee


def test_complete_lines_go_to_the_log_of_the_node_whose_turn_it_is():
    logs, stream = NodeLogs(0), io.StringIO()
    tee = Tee(stream, logs)
    tee.write("one\ntw")
    logs.turn_to(2)
    tee.write("o\n")
    logs.add(0, "by the host")
    assert logs.drain() == {0: ["one", "by the host"], 2: ["two"]}
    assert logs.drain() == {}
    assert stream.getvalue() == "one\ntwo\n"


def test_a_stream_that_cannot_be_written_to_fails_no_program():
    stream = io.StringIO()
    stream.close()
    logs = NodeLogs(0)
    tee = Tee(stream, logs)
    tee.write("said\n")
    tee.flush()
    assert logs.drain() == {0: ["said"]}
