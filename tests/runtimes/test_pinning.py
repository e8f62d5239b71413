"""Which GPU a node computes on, as Ray and torch would say on a machine with eight; the real ones are in test_gpu."""

from __future__ import annotations

import pytest
import torch

from starling.actors.remote import node_builder


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_builder.ray, "get_gpu_ids", lambda: [str(gpu) for gpu in range(8)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def test_eight_nodes_of_one_process_have_a_gpu_each(eight: None):
    devices, gpus, warnings = node_builder.pin_devices(8)
    assert [(device.type, device.index) for device in devices] == [("cuda", number) for number in range(8)]
    assert gpus == tuple("01234567")
    assert not warnings


def test_sixteen_nodes_share_eight_evenly(eight: None):
    devices, _, _ = node_builder.pin_devices(16)
    assert [device.index for device in devices] == [number // 2 for number in range(16)]


def test_a_process_of_its_own_sees_its_gpu_as_the_first(monkeypatch: pytest.MonkeyPatch):
    # Ray hides the others from a process that was given one.
    monkeypatch.setattr(node_builder.ray, "get_gpu_ids", lambda: ["5"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    devices, gpus, _ = node_builder.pin_devices(1)
    assert (devices[0].index, gpus) == (0, ("5",))
