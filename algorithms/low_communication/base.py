"""Base class of low-communication methods: inner steps, and outer gradients that are encoded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from starling.algorithms.api import Algorithm, all_reduce_bytes
from starling.algorithms.codecs import Codec, Identity, exchange_codecs, refuse_lossy

if TYPE_CHECKING:
    from starling.algorithms.api import Layout, Node

_RESIDUAL = "residual"
"""Begins the names of residuals in ``node.local``."""


class LowCommunication(Algorithm):
    """Inner steps, and an exchange whose contributions and results are encoded."""

    averages_buffers: ClassVar[bool] = True

    inner_steps: PositiveInt = 100  # H, optimizer steps between exchanges of the same values
    codec: Codec = Identity()  # encodes contributions, which are decoded before they are combined
    result_codec: Codec = Identity()  # encodes the combined outer gradient
    error_feedback: bool = False  # add to each contribution what the codec left out of the last one

    @model_validator(mode="after")
    def _codecs_lose_nothing(self) -> Self:
        refuse_lossy(self.codec, self.result_codec, feedback=self.error_feedback)
        return self

    def codecs_at(self, number: int, name: str = "") -> tuple[Codec, Codec]:
        """Return the codecs of one exchange: of what is contributed, and of its result.

        A codec draws other random numbers for each ``number``, each ``name`` and each of the two ways. ``random_k``
        with the same places both ways would scale by n/k twice what is sent once.
        """
        return exchange_codecs(self.codec, self.result_codec, number, name)

    def compensated(self, node: Node, values: Tensor, codec: Codec, name: str = "") -> Tensor:
        """Return ``values``, shape (n,), plus the residual ``name`` of the last exchange, and stage the next residual.

        e ← (x + e) - C(x + e), C being the ``codec`` of this exchange: what C leaves out is sent later, also if it is
        never among the largest.
        """
        if not self.error_feedback:
            return values
        key = f"{_RESIDUAL} {name}".rstrip()
        residual = node.local.get(key)
        corrected = values + residual if isinstance(residual, Tensor) else values
        node.local[key] = corrected - codec.through(corrected)
        return corrected

    def unsent(self, node: Node) -> float:
        kept = (value for key, value in node.local.items() if key.startswith(_RESIDUAL))
        return math.sqrt(sum(float(torch.dot(one, one)) for one in kept if isinstance(one, Tensor)))

    def exchange_bytes(self, num_values: int, layout: Layout, num_nodes: int) -> int:
        """Return the payload bytes of an ``AllReduce`` of ``num_values`` values with this algorithm's codecs."""
        sent, received = (codec.nbytes(num_values, layout.dtype) for codec in (self.codec, self.result_codec))
        return all_reduce_bytes(sent, num_nodes, result_nbytes=received)
