"""Nodes on a GPU; skipped where there is none."""

import importlib.util

import pytest
import torch

from starling.actors.host.build import build_replicas, load_data
from starling.actors.host.host import Host
from starling.actors.host.recorded_clock import Times
from starling.actors.host.round_order import RoundOrder
from starling.actors.wire.tickets import Computing, Contributed, Posted, Returned
from starling.algorithms.api import View
from starling.orchestrator.config.schema import parse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_two_nodes_train_on_a_gpu_and_agree(precision: str, compiled: bool):
    if compiled and importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton")
    config = parse(
        {
            "algorithm": {"name": "diloco", "inner_steps": 20},
            "task": {"name": "digits", "model": "cnn"},
            "optimizer": {"name": "adamw", "lr": 0.01, "precision": precision, "compile": compiled},
        }
    )
    data = load_data(config.task, config.data, 2, 0)
    device = torch.device("cuda", 0)
    replicas = build_replicas((0, 1), config.replica_spec(), data, [device, device])
    host = Host(replicas, Times())
    host.init()
    before = replicas[0].evaluate(data.validation, None)["loss"]
    for number in range(3):
        host.begin(RoundOrder(0, number, View(0, (0, 1)), number - 1), (0, 1))
        tickets = dict(host.drive([(0, None), (1, None)]))
        assert not any(isinstance(ticket, Computing) for ticket in tickets.values())
        inline = []
        for node, ticket in tickets.items():
            assert isinstance(ticket, Posted), ticket
            assert ticket.specs is not None
            assert ticket.inline is not None
            inline.append(Contributed(node, ticket.weight, ticket.specs, ticket.inline))
        host.exchanges.conclude_inline(0, 0, inline)
        host.exchanges.release(0)
        ends = dict(host.drive([(node, host.exchanges.take(node, 0)) for node in (0, 1)]))
        assert isinstance(ends[0], Returned)
        assert isinstance(ends[1], Returned)
        assert ends[0].digest == ends[1].digest
    host.settle({0: 2, 1: 2})
    assert replicas[0].parameters.device.type == "cuda"
    assert torch.equal(replicas[0].parameters, replicas[1].parameters)
    assert replicas[0].evaluate(data.validation, None)["loss"] < before
