"""Messages stay readable however many nodes, tensors or columns they are about."""

from __future__ import annotations

import pytest
import torch

from starling.actors.host.failures import failure
from starling.actors.wire.buffers import signature_of
from starling.algorithms.api import AllReduce
from starling.algorithms.import_paths import raised
from starling.algorithms.words import listed, shortened
from starling.orchestrator.control.synchronous import _divergence


def test_a_list_shows_its_first_few_and_a_count():
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
    assert listed(range(1000)).endswith("10, 11 and 988 more")
    assert listed([]) == ""
    assert len(listed(["x" * 10_000] * 50)) < 1000


@pytest.mark.parametrize("most", [10, 80, 600])
def test_a_long_text_keeps_its_begin_and_end_in_one_line(most: int):
    text = f"begin\n{'x' * 5000}\nend"
    found = shortened(text, most)
    assert len(found) <= most + 3
    assert "\n" not in found
    assert (found[:3], found[-3:]) == ("beg", "end")
    assert shortened("as it is", most) == "as it is"


def test_of_two_signatures_the_difference_is_shown():
    many = {f"model.layers.{number}.self_attention.projection.weight": torch.zeros(2, 3) for number in range(300)}
    other = dict(many)
    other["model.layers.250.self_attention.projection.weight"] = torch.zeros(7, 3)
    text = signature_of(AllReduce(many)).against(signature_of(AllReduce(other)))
    assert len(text) < 1000
    assert " alike, model.layers.250.self_attention.projection.weight float32[2, 3]" in text
    assert "float32[2, 3]" in text
    assert "float32[7, 3]" in text
    small = signature_of(AllReduce(torch.zeros(1))).against(signature_of(AllReduce(torch.zeros(2))))
    assert "tensor float32[1])" in small
    assert "alike" not in small
    longer = signature_of(AllReduce(many)).against(signature_of(AllReduce(many | {"more": torch.zeros(1)})))
    assert "300 alike, more float32[1]" in longer


def test_replicas_of_a_thousand_nodes_that_differ_are_one_readable_line():
    groups = [range(500), range(500, 900), *([number] for number in range(900, 1000))]
    text = _divergence(3, [list(group) for group in groups], "stop")
    assert len(text) < 500
    assert "nodes 0, 1, 2" in text
    assert "and 98 more groups" in text


def test_what_a_users_exception_says_is_in_the_traceback_and_its_begin_in_the_line():
    error = ValueError(f"the batch is wrong: {'9, ' * 10_000}")
    failed = failure(3, 7, error)
    assert failed.message.startswith("node 3, round 7: ValueError: the batch is wrong: 9, ")
    assert len(failed.message) < 1000
    assert failed.traceback is not None
    assert str(error) in failed.traceback
    assert len(raised(error)) < 1000
