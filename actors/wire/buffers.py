"""Tensors as raw bytes: contributions are cut, encoded, reduced and put together here, the same way in both runtimes.

An exchange's tensors are numbered through: values 0 … V−1 over all of them in the order of their names. A *part* is a
range of these values. A tensor is cut at multiples of the codec's block, counted from the tensor's beginning, so that
the encoded bits do not depend on the number of parts. A part travels as one uint8 buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from starling.algorithms.api import AllGather, AllReduce, NeighborAllGather
from starling.algorithms.errors import ProgramError
from starling.algorithms.words import listed, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from starling.algorithms.aggregators.gram import GramAggregator
    from starling.algorithms.api import Payload
    from starling.algorithms.codecs import Codec

Buffer: TypeAlias = "NDArray[np.uint8]"


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor of a payload; a bare tensor has the name ``""``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_number: bool = False
    """A plain number, carried as one float64 or int64."""

    @property
    def num_values(self) -> int:
        """Values in the tensor."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name or 'tensor'} {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class TensorSlice:
    """The piece of one tensor that lies in a part."""

    tensor: int
    start: int
    stop: int


class BufferPool:
    """Memory for large results, used again once nothing refers to it any more.

    A round's results are as large as the model. Memory that is fresh from the system is cleared by the kernel first,
    page by page, which takes about as long as to fill it.
    """

    def __init__(self, min_bytes: int, max_blocks: int) -> None:
        self._min_bytes = min_bytes
        self._free: deque[Buffer] = deque(maxlen=max_blocks)

    def empty(self, num_values: int, dtype: torch.dtype) -> Tensor:
        """A flat CPU tensor with arbitrary content."""
        nbytes = num_values * dtype.itemsize
        if nbytes < self._min_bytes:
            return torch.empty(num_values, dtype=dtype)
        block = self._take(nbytes)
        # The tensor's storage holds this view of the block, and nothing else does: its end is the storage's end.
        view = block[:]
        weakref.finalize(view, self._free.append, block).atexit = False
        return torch.from_numpy(view).view(dtype)

    def _take(self, nbytes: int) -> Buffer:
        # Finalizers of other threads may append meanwhile: each block is taken out before it is looked at.
        for _ in range(len(self._free)):
            with contextlib.suppress(IndexError):
                block = self._free.popleft()
                if block.size == nbytes:
                    return block
                self._free.append(block)
        return np.empty(nbytes, dtype=np.uint8)


_MOST_TENSORS, _MOST_PARTS = 4, 300
"""Tensors, and characters of the parts, that are shown of a signature."""
_POOL = BufferPool(min_bytes=1024 * 1024, max_blocks=3)


def as_buffer(tensor: Tensor) -> Buffer:
    """View a contiguous CPU tensor as uint8, without a copy."""
    return cast("Buffer", tensor.detach().reshape(-1).view(torch.uint8).numpy())


def as_tensor(buffer: Buffer) -> Tensor:
    """View a uint8 buffer as a tensor, without a copy, also if it is read-only; nobody may write to the result.

    Torch has no read-only tensors and warns about buffers that are; what comes out of an object store is.
    """
    if buffer.size == 0:
        return torch.empty(0, dtype=torch.uint8)
    if buffer.flags.writeable:
        return torch.from_numpy(buffer)
    memory = (ctypes.c_uint8 * buffer.size).from_address(buffer.ctypes.data)
    memory.owner = buffer  # type: ignore[attr-defined]  # keeps the bytes alive as long as the tensor lives
    return torch.frombuffer(memory, dtype=torch.uint8)


def specs_of(payload: Payload) -> tuple[TensorSpec, ...]:
    """The specs of a payload's members, sorted by name.

    Raises:
        ProgramError: something in it is neither a tensor nor a number.
    """
    if isinstance(payload, Mapping) and not all(isinstance(name, str) and name for name in payload):
        message = f"the names of a payload's members must be texts, not {listed(payload)}"
        raise ProgramError(message)
    return tuple(_spec(name, value) for name, value in _members(payload))


def _spec(name: str, value: object) -> TensorSpec:
    match value:
        case Tensor():
            return TensorSpec(name, value.dtype, tuple(value.shape))
        case int():
            return TensorSpec(name, torch.int64, (), is_number=True)
        case float():
            return TensorSpec(name, torch.float64, (), is_number=True)
        case _:
            what = f"{name!r} in a payload" if name else "a payload"
            message = f"{what} is a {type(value).__name__}; only tensors, numbers and flat mappings of them can travel"
            raise ProgramError(message)


def _members(payload: Payload) -> list[tuple[str, Tensor | float]]:
    if isinstance(payload, Mapping):
        return sorted(payload.items())
    return [("", payload)]


def _flat(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu().reshape(-1)
    return torch.tensor([value], dtype=torch.int64 if isinstance(value, int) else torch.float64)


class Cuts:
    """Cuts of an exchange's tensors into parts; a pure function of its arguments."""

    def __init__(self, specs: tuple[TensorSpec, ...], codec: Codec, result_codec: Codec, num_parts: int) -> None:
        self.specs = specs
        self.codec = codec
        self.result_codec = result_codec
        total = sum(spec.num_values for spec in specs)
        bounds = [self._place(total * part // num_parts) for part in range(num_parts)]
        self.parts = [self._segments(*bound) for bound in itertools.pairwise([*bounds, total])]

    def _place(self, value: int) -> int:
        """The last place at or before ``value`` at which a tensor may be cut."""
        block = math.lcm(self.codec.block, self.result_codec.block)
        base = 0
        for spec in self.specs:
            if value < base + spec.num_values:
                return base + (value - base) // block * block
            base += spec.num_values
        return base

    def _segments(self, low: int, high: int) -> list[TensorSlice]:
        segments: list[TensorSlice] = []
        base = 0
        for index, spec in enumerate(self.specs):
            start, stop = max(low, base), min(high, base + spec.num_values)
            if start < stop:
                segments.append(TensorSlice(index, start - base, stop - base))
            base += spec.num_values
        return segments

    def _nbytes(self, codec: Codec, segments: list[TensorSlice]) -> int:
        return sum(codec.nbytes(one.stop - one.start, self.specs[one.tensor].dtype) for one in segments)

    @functools.cached_property
    def part_nbytes(self) -> tuple[int, ...]:
        """Encoded bytes of each part of one contribution."""
        return tuple(self._nbytes(self.codec, segments) for segments in self.parts)

    @functools.cached_property
    def result_nbytes(self) -> tuple[int, ...]:
        """Encoded bytes of each part of the result."""
        return tuple(self._nbytes(self.result_codec, segments) for segments in self.parts)

    def encode(self, payload: Payload) -> list[Buffer]:
        """Encode a contribution, one buffer per part. With one tensor and the identity codec nothing is copied."""
        tensors = [_flat(value) for _, value in _members(payload)]
        return [
            _join([self.codec.encode(tensors[one.tensor][one.start : one.stop]) for one in segments])
            for segments in self.parts
        ]

    def are_finite(self, parts: Sequence[Buffer]) -> bool:
        """Whether the values of an encoded contribution are finite, as others will decode them."""
        for segments, buffer in zip(self.parts, parts, strict=True):
            offset = 0
            for one in segments:
                dtype, size = self.specs[one.tensor].dtype, one.stop - one.start
                nbytes = self.codec.nbytes(size, dtype)
                if not bool(self.codec.decode(_slice(buffer, offset, nbytes, dtype), size, dtype).isfinite().all()):
                    return False
                offset += nbytes
        return True

    def measure(self, operation: AllReduce[Any], part: int, contributions: Sequence[Buffer]) -> Buffer:
        """Decode one part of several contributions, and return the sum of its pieces' measures as bytes."""
        aggregator = cast("GramAggregator", operation.aggregator)
        total: NDArray[np.float64] | None = None
        for values in self._decoded(part, contributions):
            measured = aggregator.measure(values)
            total = measured if total is None else total + measured
        if total is None:
            total = aggregator.measure([torch.empty(0)] * len(contributions))
        return np.ascontiguousarray(total, dtype=np.float64).reshape(-1).view(np.uint8)

    def reduce(
        self, operation: AllReduce[Any], part: int, contributions: Sequence[Buffer], weights: Sequence[float]
    ) -> Buffer:
        """Decode one part of several contributions, combine them in the order given, and encode the result."""
        pieces: list[Tensor] = []
        for values in self._decoded(part, contributions):
            dtype = values[0].dtype
            out = _POOL.empty(values[0].numel(), torch.float64 if dtype == torch.float64 else torch.float32)
            operation.aggregator.reduce(values, weights, out)
            pieces.append(self.result_codec.encode(out.to(dtype)))
        return _join(pieces)

    def _decoded(self, part: int, contributions: Sequence[Buffer]) -> Iterator[list[Tensor]]:
        """Decode one part of several contributions, tensor by tensor."""
        offset = 0
        for one in self.parts[part]:
            dtype, size = self.specs[one.tensor].dtype, one.stop - one.start
            nbytes = self.codec.nbytes(size, dtype)
            yield [self.codec.decode(_slice(buffer, offset, nbytes, dtype), size, dtype) for buffer in contributions]
            offset += nbytes

    def assemble(self, parts: Sequence[Buffer], device: torch.device) -> Tensor | dict[str, Tensor]:
        """Decode the parts of a result into fresh tensors on ``device``."""
        tensors = [_empty(spec, device) for spec in self.specs]
        for segments, buffer in zip(self.parts, parts, strict=True):
            offset = 0
            for one in segments:
                dtype, size = self.specs[one.tensor].dtype, one.stop - one.start
                nbytes = self.result_codec.nbytes(size, dtype)
                data = _slice(buffer, offset, nbytes, dtype)
                tensors[one.tensor][one.start : one.stop].copy_(self.result_codec.decode(data, size, dtype))
                offset += nbytes
        shaped = [tensor.view(spec.shape) for tensor, spec in zip(tensors, self.specs, strict=True)]
        if len(self.specs) == 1 and not self.specs[0].name:
            return shaped[0]
        return {spec.name: tensor for spec, tensor in zip(self.specs, shaped, strict=True)}


def coefficients(operation: AllReduce[Any], measures: Sequence[Buffer], weights: Sequence[float]) -> list[float]:
    """Return the coefficients of contributions, given the measures of all parts in order; equal on all members."""
    aggregator = cast("GramAggregator", operation.aggregator)
    size = len(weights) + 1
    matrices = added(measures).view(np.float64).reshape(-1, size, size)
    return aggregator.weigh(matrices[0] if len(matrices) == 1 else matrices, weights)


def added(measures: Sequence[Buffer]) -> Buffer:
    """Return the sum of measures, added up in the order given."""
    first, *others = (one.view(np.float64) for one in measures)
    total = first.copy()
    for one in others:
        total += one
    return total.view(np.uint8)


def _slice(buffer: Buffer, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    """The bytes of one segment; copied where a narrower tensor before it leaves them unaligned for ``dtype``."""
    data = as_tensor(buffer[offset : offset + nbytes])
    return data.clone() if data.data_ptr() % dtype.itemsize else data


def _empty(spec: TensorSpec, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return _POOL.empty(spec.num_values, spec.dtype)
    return torch.empty(spec.num_values, dtype=spec.dtype, device=device)


def _join(pieces: list[Tensor]) -> Buffer:
    """Encoded pieces, flat and uint8, as one buffer."""
    if len(pieces) == 1:
        return cast("Buffer", pieces[0].numpy())
    return as_buffer(torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8))


def pack(payload: Payload) -> Buffer:
    """A payload's values as one buffer, in the order of ``specs_of``."""
    return _join([_flat(value).view(torch.uint8) for _, value in _members(payload)])


def unpack(specs: tuple[TensorSpec, ...], buffer: Buffer, device: torch.device) -> Payload:
    """The inverse of ``pack``: fresh tensors on ``device``."""
    members: dict[str, Tensor | float] = {}
    offset = 0
    for spec in specs:
        nbytes = spec.num_values * spec.dtype.itemsize
        # Cloned before the dtype changes: a buffer of several tensors need not be aligned for the wider ones.
        data = as_tensor(buffer[offset : offset + nbytes]).clone()
        value = data.view(spec.dtype).view(spec.shape)
        members[spec.name] = value.item() if spec.is_number else value.to(device)
        offset += nbytes
    return members[""] if len(specs) == 1 and not specs[0].name else members


class StackedPayloads(Mapping[Any, "Payload"]):
    """Payloads of one form by owner: rows of one tensor for each name, made when they are asked for."""

    def __init__(self, owners: Iterable[Any], stacked: Mapping[str, Tensor], *, bare: bool) -> None:
        self._places = {owner: row for row, owner in enumerate(owners)}
        self._stacked = stacked
        self._bare = bare
        self._made: dict[Any, Payload] = {}

    def __getitem__(self, owner: Any) -> Payload:  # noqa: ANN401 - a node, say
        payload = self._made.get(owner)
        if payload is None:
            row = self._places[owner]
            # As data: rows of one tensor would share a version counter, by which writing in place is found out.
            values = {name: tensor[row].data for name, tensor in self._stacked.items()}
            payload = self._made[owner] = values[""] if self._bare else values
        return payload

    def __contains__(self, owner: object) -> bool:
        return owner in self._places

    def __iter__(self) -> Iterator[Any]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def copies(payloads: Mapping[Any, Payload]) -> tuple[Mapping[Any, Payload], dict[str, Tensor]]:
    """Copy payloads; return the copies, and by name the tensors of which they are rows.

    Copies become rows of one tensor per name if all payloads have tensors of equal names and shapes, and nothing else.
    Otherwise the second result is empty. A bare tensor has the name ``""``.
    """
    first = next(iter(payloads.values()), None)
    if isinstance(first, Tensor):
        stacked = _stacked(list(payloads.values()))
        if stacked is not None:
            return StackedPayloads(payloads, {"": stacked}, bare=True), {"": stacked}
    elif isinstance(first, Mapping) and first:
        by_name: dict[str, Tensor] = {}
        for name in sorted(first):
            stacked = _stacked([one.get(name) if isinstance(one, Mapping) else None for one in payloads.values()])
            if stacked is not None:
                by_name[name] = stacked
        lengths = {len(one) for one in payloads.values() if isinstance(one, Mapping)}
        if len(by_name) == len(first) and lengths == {len(first)}:
            return StackedPayloads(payloads, by_name, bare=False), by_name
    return {key: _copied(payload) for key, payload in payloads.items()}, {}


def _stacked(values: Sequence[object]) -> Tensor | None:
    """Copies of tensors of one form as rows of one; ``None`` if they are not."""
    first = values[0]
    if not isinstance(first, Tensor):
        return None
    shape, dtype, device = first.shape, first.dtype, first.device
    for one in values:
        if not isinstance(one, Tensor) or one.shape != shape or one.dtype is not dtype or one.device != device:
            return None
    with torch.no_grad():
        return torch.stack(cast("list[Tensor]", values))


def _copied(payload: Payload) -> Payload:
    if isinstance(payload, Mapping):
        return {name: _cloned(value) for name, value in sorted(payload.items())}
    return _cloned(payload)


def _cloned(value: Tensor | float) -> Tensor | float:
    return value.detach().clone() if isinstance(value, Tensor) else value


def described(payload: Payload) -> tuple[tuple[TensorSpec, ...], int]:
    """Specs and bytes of a payload; remembered by its form, as most payloads have that of an earlier one."""
    if isinstance(payload, Tensor):
        key: Any = payload.dtype, payload.shape
    elif isinstance(payload, Mapping):
        key = tuple(
            [
                (name, value.dtype, value.shape) if isinstance(value, Tensor) else (name, type(value))
                for name, value in payload.items()
            ]
        )
    else:
        key = type(payload)
    known = _DESCRIBED.get(key)
    if known is None:
        specs = specs_of(payload)
        if len(_DESCRIBED) >= _MAX_TEXTS:
            _DESCRIBED.clear()
        known = _DESCRIBED[key] = specs, payload_nbytes(specs)
    return known


def payload_nbytes(specs: tuple[TensorSpec, ...]) -> int:
    """Bytes of a payload: its tensors' bytes, and 8 for each number."""
    return sum(spec.num_values * spec.dtype.itemsize for spec in specs)


@dataclass(frozen=True)
class Signature:
    """Properties on which all members' operations at one sequence number must agree."""

    operation: str
    parts: str
    """Aggregator, codecs and close policy, or topology."""
    tensors: tuple[TensorSpec, ...] | None
    """``None`` fixes and violates nothing: a receiver without a contribution, or a gather."""

    def agrees_with(self, other: Signature) -> bool:
        """Whether two members may meet in one exchange."""
        return (self.operation, self.parts) == (other.operation, other.parts) and (
            self.tensors is None or other.tensors is None or self.tensors == other.tensors
        )

    def __str__(self) -> str:
        return self._shown(0)

    def against(self, other: Signature) -> str:
        """Return both signatures as text, beginning with the first tensor in which they differ."""
        pairs = zip(self.tensors or (), other.tensors or (), strict=False)
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        begin = alike if alike >= _MOST_TENSORS else 0
        return f"{self._shown(begin)}; {other._shown(begin)}"

    def _shown(self, begin: int) -> str:
        tensors = self.tensors or ()
        before = [f"{begin} alike"] * bool(begin and tensors)
        inside = ", ".join([*before, *([listed(tensors[begin:], _MOST_TENSORS)] if tensors[begin:] else [])])
        return f"{self.operation}({inside}) with {shortened(self.parts, _MOST_PARTS)}"


def signature_of(operation: AllReduce[Any] | AllGather[Any] | NeighborAllGather[Any]) -> Signature:
    """The signature of a collective operation.

    Raises:
        ProgramError: it contributes what cannot travel.
    """
    if isinstance(operation, AllGather):
        return Signature("AllGather", _describe([operation.close]), None)
    if isinstance(operation, NeighborAllGather):
        return Signature("NeighborAllGather", _describe([operation.topology, operation.close]), None)
    tensors = None if operation.tensors is None else specs_of(operation.tensors)
    if any(spec.is_number for spec in tensors or ()):
        message = "AllReduce takes a tensor or a mapping of tensors; make numbers tensors (of float64, if need be)"
        raise ProgramError(message)
    parts = _describe([operation.aggregator, operation.codec, operation.result_codec, operation.close])
    return Signature("AllReduce", parts, tensors)


def _describe(parts: list[Any]) -> str:
    return ", ".join(_repr(part) for part in parts)


def _repr(part: object) -> str:
    """``repr``, remembered by identity: to make it takes longer than a small exchange, and to hash a part nearly so."""
    known = _TEXTS.get(id(part))
    if known is None or known[0] is not part:
        if len(_TEXTS) >= _MAX_TEXTS:
            _TEXTS.clear()
        known = _TEXTS[id(part)] = part, repr(part)
    return known[1]


_MAX_TEXTS = 256
_TEXTS: dict[int, tuple[object, str]] = {}
_DESCRIBED: dict[Any, tuple[tuple[TensorSpec, ...], int]] = {}
