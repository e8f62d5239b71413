"""The mixing of many nodes of one process, worked out at once: the bits of `Inbox.mix`, a row for each node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.algorithms.api import NodeId, Payload

_DTYPES = (torch.float32, torch.float64)
"""Types in which scalar · tensor rounds as tensor · tensor does."""


class MixingMatrix:
    """A mixing matrix by entries: the first of each row, the second, …; each with the rows that have so many."""

    def __init__(self, weights: Mapping[NodeId, Mapping[NodeId, float]]) -> None:
        place = self.places = {node: index for index, node in enumerate(weights)}
        entries = [[(place[other], weight) for other, weight in row.items()] for row in weights.values()]
        self.slots: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]] = []
        """Rows (``None``: all), columns, weights as float64."""
        for slot in range(max(map(len, entries))):
            rows = [row for row, entry in enumerate(entries) if len(entry) > slot]
            columns = torch.tensor([entries[row][slot][0] for row in rows])
            values = torch.tensor([entries[row][slot][1] for row in rows], dtype=torch.float64)
            self.slots.append((None if len(rows) == len(entries) else torch.tensor(rows), columns, values))

    def mix(self, values: torch.Tensor) -> torch.Tensor:
        """W x, shape (n, …), of x with one row per node; product and sum are rounded apart, entry by entry."""
        shape = (-1,) + (1,) * (values.dim() - 1)
        mixed: torch.Tensor | None = None
        for rows, columns, weights in self.slots:
            product = values.index_select(0, columns).mul_(weights.to(values.dtype).view(shape))
            if mixed is None:
                mixed = product
            elif rows is None:
                mixed.add_(product)
            else:
                mixed[rows] = mixed[rows].add_(product)
        assert mixed is not None
        return mixed


class Mixtures:
    """Mixed values of all nodes of a neighbour gather, computed at once for contributions that nobody has changed."""

    def __init__(self, rows: MixingMatrix, own: Mapping[NodeId, Payload], stacked: Mapping[str, torch.Tensor]) -> None:
        self._rows = rows
        self._stacked = stacked
        self._own = {node: _members(payload) for node, payload in own.items()}
        self._mixed: dict[str, list[torch.Tensor]] = {}

    def of(
        self, node: NodeId, received: Mapping[NodeId, Payload]
    ) -> Callable[[object, torch.Tensor, str | None], torch.Tensor | None]:
        """Return a function that gives the result of ``Inbox.mix`` for ``node``.

        It gives ``None`` for payloads other than ``received``, and for values other than the node's contribution.
        """
        remaining = self._own[node]

        def mix(payloads: object, own: torch.Tensor, name: str | None) -> torch.Tensor | None:
            if payloads is not received:
                return None
            key = name or ""
            # Once: a second result must not share memory with the first.
            contributed = remaining.pop(key, None)
            if contributed is None or contributed[0] is not own or contributed[1] != own._version:  # noqa: SLF001
                return None
            mixed = self._mixed.get(key)
            if mixed is None:
                mixed = self._mixed[key] = self._work_out(key)
            return mixed[self._rows.places[node]] if mixed else None

        return mix

    def _work_out(self, key: str) -> list[torch.Tensor]:
        """All nodes' mixtures of the tensors named ``key``; empty if they cannot be worked out at once."""
        values = self._stacked.get(key)
        if values is None or values.dtype not in _DTYPES:
            return []
        # As data: rows of one tensor would share a version counter, by which writing in place is found out.
        return [row.data for row in self._rows.mix(values).unbind()]


def _members(payload: Payload) -> dict[str, tuple[torch.Tensor, int]]:
    """The tensors of a payload, with their version counters."""
    members = payload.items() if isinstance(payload, Mapping) else [("", payload)]
    return {name: (value, value._version) for name, value in members if isinstance(value, torch.Tensor)}  # noqa: SLF001
