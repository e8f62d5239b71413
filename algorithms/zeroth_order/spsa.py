"""What methods of simultaneous perturbation have in common: probes, codes, and the step that all nodes take alike."""

from __future__ import annotations

import hashlib
import math
import struct
from typing import TYPE_CHECKING, Literal, cast

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from algorithms.api import Algorithm, AllGather, Batch, Layout, Loss, Node, NodeId
from algorithms.errors import ProgramError
from algorithms.noise import Distribution, accumulate, perturb
from algorithms.seeds import derive_seed
from algorithms.zeroth_order.codes import Log8, ScalarCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from algorithms.rules import DataBatch

_HEADER = struct.Struct("<ddH")
"""Of a record: learning rate, ε, and the number of contributors."""
_ID = struct.Struct("<i")


class SPSA(Algorithm):
    """Stochastic gradients from two losses each; a node sends the one number that they give."""

    lr: PositiveFloat = 1e-3  # η
    eps: PositiveFloat = 1e-3  # ε, how far a probe is from the model, in units of the direction; MeZO's default
    samples: PositiveInt = 1  # K, directions of a node in a round, each with a batch of its own
    distribution: Distribution = "gaussian"  # of the values of a direction; rademacher: −1 or 1
    one_sided: bool = False  # L(θ) instead of L(θ − εz); the round's samples then share one batch
    normalizer: Literal["mean", "sqrt"] = "mean"  # c: the number of estimates in a round, or its root
    code: ScalarCode = Log8()  # what an estimate looks like as bytes; fp16, fp32
    clip: PositiveFloat | None = None  # largest size of an estimate; null: none
    weight_decay: NonNegativeFloat = 0.0  # λ, of tensors with two dimensions or more: not of biases and norms
    layerwise: bool = False  # an estimate for each layer, of its values alone, instead of one for all
    verify_every: NonNegativeInt = 64  # rounds between two comparisons of all nodes' parameters; 0: never

    def init(self, node: Node) -> None:
        node.shared["codes"] = {}

    async def round(self, node: Node) -> None:
        estimates = await self._estimates(node)
        codes = self.code.encode(estimates, node.rng("rounding"))
        sealed = await AllGather(codes)
        self._step(node, sealed, self.lr)
        dropped = sum(math.isnan(value) for value in estimates)
        if dropped:
            words = f"{dropped} of {len(estimates)} estimates were not finite, and are dropped"
            print(f"round {node.round}: {words}")  # noqa: T201 - to the node's log

    async def _estimates(self, node: Node) -> list[float]:
        """ĝ of each sample, and of each layer in it if ``layerwise``. The model is as it was, to the last bit."""
        estimates: list[float] = []
        batch = at_model = None
        if self.one_sided:
            batch = await Batch()
            at_model = await Loss(batch=batch, probe=True)
        for sample in range(self.samples):
            samples = batch or await Batch()
            key = self._key(node, node.id, sample)
            for start, stop in self._spans(node.layout):
                above = await self._probe(node, samples, key, (start, stop), self.eps)
                below = at_model
                if below is None:
                    below = await self._probe(node, samples, key, (start, stop), -self.eps)
                # Nothing is subtracted from what was added: the model is what was committed, and is copied from there.
                node.parameters[start:stop].copy_(node.committed[start:stop])
                estimates.append(self._clipped((above - below) / (self.eps if self.one_sided else 2 * self.eps)))
        return estimates

    async def _probe(self, node: Node, batch: DataBatch, key: int, span: tuple[int, int], scale: float) -> float:
        start, stop = span
        perturb(node.parameters[start:stop], node.committed[start:stop], scale, self.distribution, key, start)
        return await Loss(batch=batch, probe=True)

    def _clipped(self, estimate: float) -> float:
        if self.clip is None or not math.isfinite(estimate):
            return estimate
        return min(max(estimate, -self.clip), self.clip)

    def _key(self, node: Node, of: NodeId, sample: int) -> int:
        """Names a direction: a pure function of (run, round, node, sample).

        N nodes with K samples each have those of one with N·K.
        """
        return derive_seed("direction", node.seed, node.round, of * self.samples + sample)

    def _spans(self, layout: Layout) -> list[tuple[int, int]]:
        """What has an estimate of its own, as ranges of the parameters: all, or the layers."""
        if not self.layerwise:
            return [(0, layout.num_values)]
        spans: list[tuple[int, int]] = []
        last = None
        for entry in layout.entries:
            layer = entry.name.rpartition(".")[0]
            start = spans.pop()[0] if layer == last else entry.start
            spans.append((start, entry.stop))
            last = layer
        return spans

    # --- the step ----------------------------------------------------------------------------------------------------

    def _step(self, node: Node, sealed: Mapping[NodeId, Tensor], lr: float) -> None:
        """Apply the list that all nodes have, in the order of (node, sample)."""
        spans = self._spans(node.layout)
        estimates = {member: self._decoded(member, codes, len(spans)) for member, codes in sealed.items()}
        parameters = node.parameters
        if self.weight_decay:
            for entry in node.layout.entries:
                if len(entry.shape) > 1:
                    parameters[entry.start : entry.stop].mul_(1 - lr * self.weight_decay)
        for place, (start, stop) in enumerate(spans):
            found = [
                (self._key(node, member, sample), values[sample * len(spans) + place])
                for member, values in estimates.items()
                for sample in range(self.samples)
            ]
            counted = [(key, value) for key, value in found if not math.isnan(value)]
            scale = lr / (math.sqrt(len(counted)) if self.normalizer == "sqrt" else len(counted)) if counted else 0.0
            terms = [(key, -scale * value) for key, value in counted if value]
            accumulate(parameters[start:stop], terms, self.distribution, start)
        node.shared["codes"] = {str(member): codes for member, codes in sealed.items()}
        node.shared.pop("parameters", None)  # of an earlier round, which a joiner need not have done
        if self._verifies(node):
            node.shared["parameters"] = hashlib.sha256(parameters.cpu().numpy().tobytes()).hexdigest()

    def _decoded(self, member: NodeId, codes: Tensor, num_spans: int) -> list[float]:
        expected = self.samples * num_spans * self.code.nbytes
        if codes.dtype != torch.uint8 or codes.numel() != expected:
            raise ProgramError(f"node {member} has {codes.numel()} bytes of codes; it must have {expected}")
        return self.code.decode(codes)

    # --- the log -----------------------------------------------------------------------------------------------------

    def sealed(self, node: Node) -> bytes:
        codes = cast("Mapping[str, Tensor]", node.shared["codes"])
        pieces = [_HEADER.pack(self.lr, self.eps, len(codes))]
        pieces += [_ID.pack(int(member)) + one.cpu().numpy().tobytes() for member, one in codes.items()]
        if self._verifies(node):
            pieces.append(bytes.fromhex(cast("str", node.shared["parameters"])))
        return b"".join(pieces)

    def replay(self, node: Node, record: bytes) -> None:
        lr, _, count = _HEADER.unpack_from(record)
        size = self.samples * len(self._spans(node.layout)) * self.code.nbytes
        end = _HEADER.size + count * (_ID.size + size)
        digest = record[end:]
        if len(record) < end or len(digest) != 32 * self._verifies(node):
            raise ProgramError(f"the record of round {node.round} has {len(record)} bytes, not those of {count} nodes")
        sealed: dict[NodeId, Tensor] = {}
        for place in range(_HEADER.size, end, _ID.size + size):
            codes = bytearray(record[place + _ID.size : place + _ID.size + size])
            sealed[_ID.unpack_from(record, place)[0]] = torch.frombuffer(codes, dtype=torch.uint8)
        self._step(node, sealed, lr)
        if digest and node.shared["parameters"] != digest.hex():
            message = f"it gives parameters with digest {node.shared['parameters']}, the run had {digest.hex()}"
            raise ProgramError(f"round {node.round} cannot be replayed: {message}")

    def _verifies(self, node: Node) -> bool:
        """Whether all nodes' parameters are compared at the end of this round."""
        return self.verify_every > 0 and (node.round + 1) % self.verify_every == 0

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return num_nodes * (num_nodes - 1) * self.samples * len(self._spans(layout)) * self.code.nbytes

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        del num_samples, batch_size
        return 0
