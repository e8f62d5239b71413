"""Close policies of coded methods: close as soon as the sum over all data parts can be recovered.

Node i sends Σ_j B_ij g_j over data parts j. Let I be the nodes that have arrived. If the all-ones vector is a
combination of their rows, Σ_{i∈I} a_i B_i = 1, the sum Σ_j g_j is Σ a_i (Σ_j B_ij g_j).

Reference: Tandon et al., "Gradient Coding: Avoiding Stragglers in Distributed Learning", ICML 2017, arXiv:1612.03301.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, TypeAlias, cast

import torch
from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, field_validator

from starling.algorithms.closing.base import ClosePolicy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from torch import Tensor

    from starling.algorithms.closing.base import Waited

Rows: TypeAlias = tuple[Annotated[tuple[FiniteFloat, ...], Field(min_length=1)], ...]
Groups: TypeAlias = tuple[Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)], ...]

_MAX_RESIDUAL = 1e-8


class _Recoverable(ClosePolicy):
    """Closes when the sum can be recovered, and not without it, past the deadline either.

    Those close behind get a grace: ``grace_s`` from the first arrival, or ``grace_factor`` times the first one's time
    if that is longer. So with μ an exchange waits for (1 + μ) times the fastest one's time. Without, all are left
    behind that are not needed. The round's deadline ends it.

    With all that are active in, the exchange closes in any case, and the program sees who is: members that were lost
    can make the sum impossible to recover.
    """

    grace_s: NonNegativeFloat = 0  # for those close behind, from the first arrival, on the runtime's clock
    grace_factor: NonNegativeFloat = 0  # the same, as a multiple of what the first took; the later of the two counts

    @abstractmethod
    def recoverable(self, arrived: AbstractSet[int]) -> bool:
        """Say whether the contributions of ``arrived`` determine the sum over all data parts."""

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> bool:
        """Close when the grace is over and the sum can be recovered, or when all active members have arrived."""
        return arrived == active or (not self._left_s(waited) and self.recoverable(arrived))

    def ask_again_s(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> float | None:
        """Ask again at the end of the grace, if nothing else is missing."""
        left_s = self._left_s(waited)
        return left_s if left_s and arrived != active and self.recoverable(arrived) else None

    def past_deadline(self, arrived: AbstractSet[int], active: AbstractSet[int]) -> bool:
        """Close when the sum can be recovered, or when all active members have arrived."""
        return arrived == active or self.recoverable(arrived)

    def _left_s(self, waited: Waited) -> float:
        return waited.left_s(self.grace_s, self.grace_factor)


class OneOfEach(_Recoverable, name="one_of_each"):
    """Closes when one node of each group has arrived: fractional repetition, where a group's nodes send the same.

    >>> policy = OneOfEach(groups=((0, 1), (2, 3)))
    >>> policy.recoverable({0, 1}), policy.recoverable({1, 2})
    (False, True)
    """

    groups: Annotated[Groups, Field(min_length=1)]  # ids of the nodes that hold the same data parts

    @field_validator("groups")
    @classmethod
    def _disjoint(cls, groups: Groups) -> Groups:
        node, times = Counter(node for group in groups for node in group).most_common(1)[0]
        if times > 1:
            message = f"a node can be in one group only, and node {node} is named {times} times"
            raise ValueError(message)
        return groups

    def recoverable(self, arrived: AbstractSet[int]) -> bool:
        return all(not arrived.isdisjoint(group) for group in self.groups)


class Decodable(_Recoverable, name="decodable"):
    """Closes when the all-ones vector is a combination of the rows of those that have arrived, whatever the code.

    >>> policy = Decodable(rows=((1, 0), (0, 1), (1, 2)))
    >>> policy.recoverable({0}), policy.recoverable({0, 2})
    (False, True)
    """

    rows: Annotated[Rows, Field(min_length=1)]  # B_i of node i; a node without a row decides nothing

    @field_validator("rows")
    @classmethod
    def _of_a_code(cls, rows: Rows) -> Rows:
        if len({len(row) for row in rows}) > 1:
            raise ValueError("all rows must have as many entries as there are data parts")
        if decoding(rows, frozenset(range(len(rows)))) is None:
            raise ValueError("the sum cannot be recovered even from all rows together")
        return rows

    def recoverable(self, arrived: AbstractSet[int]) -> bool:
        return decoding(self.rows, frozenset(arrived)) is not None


@functools.lru_cache(maxsize=4096)
def decoding(rows: Rows, arrived: frozenset[int]) -> Mapping[int, float] | None:
    """Return the coefficients a_i that recover the sum, by node, sorted; ``None`` if no coefficients do.

    Those of least norm, in float64; they exist if no entry of Σ a_i B_i is farther than 1e-8 from 1.

    >>> sorted(decoding(((2.0, 0.0), (0.0, 1.0)), frozenset({0, 1})).items())
    [(0, 0.5), (1, 1.0)]
    """
    nodes = sorted(node for node in arrived if 0 <= node < len(rows))
    if not nodes:
        return None
    matrix = torch.tensor([rows[node] for node in nodes], dtype=torch.float64)
    ones = torch.ones(matrix.shape[1], dtype=torch.float64)
    # By singular values: rows that depend on one another, as they do in most codes, are no difficulty to it.
    inverse = cast("Tensor", torch.linalg.pinv(matrix))  # pyright: ignore[reportUnknownMemberType] - torch's stubs
    coefficients = ones @ inverse
    if float((coefficients @ matrix - ones).abs().max()) > _MAX_RESIDUAL:
        return None
    values = cast("list[float]", coefficients.tolist())  # pyright: ignore[reportUnknownMemberType] - torch's stubs
    return MappingProxyType(dict(zip(nodes, values, strict=True)))
