"""Outgoing messages of a process's nodes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from starling.actors.wire import buffers
from starling.actors.wire.tickets import Sending
from starling.algorithms.api import INLINE_LIMIT_BYTES

if TYPE_CHECKING:
    from starling.actors.wire.buffers import Buffer
    from starling.algorithms.api import NodeId, Payload


class MessageOutbox:
    """Numbers the messages of a process's nodes, and holds large ones until they are fetched or discarded.

    Args:
        first: number of the first message.
    """

    def __init__(self, first: int = 0) -> None:
        self._numbers = itertools.count(first)
        self._large: dict[int, Buffer] = {}

    def send(self, to: NodeId, payload: Payload) -> Sending:
        """Copy a payload into a message for ``to``; a small one travels inside the returned ticket.

        Raises:
            ProgramError: the payload cannot travel.
        """
        specs = buffers.specs_of(payload)
        data, nbytes, letter = buffers.pack(payload).copy(), buffers.payload_nbytes(specs), next(self._numbers)
        is_inline = nbytes <= INLINE_LIMIT_BYTES
        if not is_inline:
            self._large[letter] = data
        return Sending(to, letter, specs, nbytes, data if is_inline else None)

    def put(self, letter: int, data: Buffer) -> None:
        """Hold a large message again, as a checkpoint has it."""
        self._large[letter] = data

    def read(self, letter: int) -> Buffer:
        """Return a large message, and hold it further on."""
        return self._large[letter]

    def take(self, letter: int) -> Buffer:
        """Return a large message, and hold it no longer."""
        return self._large.pop(letter)

    def discard(self, letter: int) -> None:
        """Drop a large message, if it is held."""
        self._large.pop(letter, None)
