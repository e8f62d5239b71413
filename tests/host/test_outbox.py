"""Outgoing messages: small ones travel in their tickets, large ones wait to be fetched."""

from __future__ import annotations

import pytest
import torch

from starling.actors.host.outbox import MessageOutbox
from starling.algorithms.errors import ProgramError


def test_a_small_message_travels_in_its_ticket():
    outbox = MessageOutbox(7)
    values = torch.arange(3.0)
    sending = outbox.send(1, values)
    values.zero_()
    assert (sending.to, sending.letter, sending.nbytes) == (1, 7, 12)
    assert sending.inline is not None
    assert torch.from_numpy(sending.inline).view(torch.float32).tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(KeyError):
        outbox.take(7)


def test_a_large_message_is_held_until_it_is_taken_or_discarded():
    outbox = MessageOutbox()
    one, other = (outbox.send(1, torch.ones(40_000)) for _ in range(2))
    assert one.inline is None
    assert outbox.read(one.letter).nbytes == outbox.take(one.letter).nbytes == one.nbytes
    outbox.discard(one.letter)  # it is gone already
    outbox.discard(other.letter)
    for sent in (one, other):
        with pytest.raises(KeyError):
            outbox.read(sent.letter)


def test_what_cannot_travel_is_refused():
    with pytest.raises(ProgramError, match="a payload is a object"):
        MessageOutbox().send(1, object())  # type: ignore[arg-type]
