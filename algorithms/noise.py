"""Noise by counters: value i of a stream is a pure function of (key, i), with the same bits on every device.

A 64-bit word w of stream k is splitmix64's output function of k + (w + 1)·γ modulo 2⁶⁴ (Steele, Lea and Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014). So any part of a stream is made without the rest:

    gaussian     four values a word: 16 bits each choose one of 65 536 quantiles of the normal distribution
    rademacher   64 values a word: a bit each, −1 or 1

Integer operations and a look-up: no transcendental function, of which a CPU and a GPU give different last bits, is
evaluated. The quantiles are those of (j + ½)/65 536, scaled to variance 1 and rounded to multiples of 2⁻²⁰; |z| ≤ 4.33.
Values of different keys overlap with probability 2⁻⁶⁴ · length, as the streams are parts of one sequence.

Results are computed in chunks of noise that stay in a core's cache. Product and sum are rounded apart, so that no bit
depends on where a chunk begins, on the number of threads, or on how a model is cut.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Distribution: TypeAlias = Literal["gaussian", "rademacher"]

CHUNK = 128 * 1024
"""Values that are made at a time."""

_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1
_PER_WORD: dict[Distribution, int] = {"gaussian": 4, "rademacher": 64}
_QUANTILES_SHA256 = "e8cfff23047b7e58f6ae180f798c0bd13cfa7a46c5e6db798596865662071226"


@dataclass(frozen=True)
class Perturbed:
    """A point next to the parameters θ of a node: θ + ``scale`` · z in a range, and θ elsewhere.

    z_i is value i of stream ``key``, counted from the first of all parameters. The point is never made whole.
    """

    scale: float
    distribution: Distribution
    key: int
    start: int
    stop: int
    """The range of parameters that is perturbed is ``start`` to ``stop``."""

    def write(self, out: Tensor, center: Tensor, first: int) -> None:
        """Make the part that ``center``, shape (n,), is of θ, which begins at its value ``first``."""
        low, high = (min(max(end - first, 0), out.numel()) for end in (self.start, self.stop))
        out[:low].copy_(center[:low])
        perturb(out[low:high], center[low:high], self.scale, self.distribution, self.key, first + low)
        out[high:].copy_(center[high:])


def fill(out: Tensor, distribution: Distribution, key: int, start: int = 0) -> Tensor:
    """Write the values ``start``, ``start`` + 1, … of stream ``key`` into ``out``, shape (n,), floating; return it.

    >>> import torch
    >>> whole, part = torch.empty(10), torch.empty(3)
    >>> torch.equal(fill(whole, "gaussian", key=7)[5:8], fill(part, "gaussian", key=7, start=5))
    True
    """
    for low, high in _spans(out.numel()):
        _fill_chunk(out[low:high], distribution, key, start + low)
    return out


def perturb(out: Tensor, center: Tensor, scale: float, distribution: Distribution, key: int, start: int = 0) -> None:
    """Set ``out`` to ``center`` + ``scale`` · z, shapes (n,), with z_i the value ``start`` + i of stream ``key``."""
    scratch = torch.empty(min(CHUNK, out.numel()), dtype=out.dtype, device=out.device)
    for low, high in _spans(out.numel()):
        z = _fill_chunk(scratch[: high - low], distribution, key, start + low)
        torch.add(center[low:high], z.mul_(scale), out=out[low:high])


def accumulate(out: Tensor, terms: Sequence[tuple[int, float]], distribution: Distribution, start: int = 0) -> None:
    """Add Σ coefficient · z(key) over ``terms``, (key, coefficient) each, to ``out``, summed in their order."""
    scratch = torch.empty(min(CHUNK, out.numel()), dtype=out.dtype, device=out.device)
    total = torch.empty_like(scratch)
    for low, high in _spans(out.numel()) if terms else ():
        here = total[: high - low].zero_()
        for key, coefficient in terms:
            here.add_(_fill_chunk(scratch[: high - low], distribution, key, start + low).mul_(coefficient))
        out[low:high].add_(here)


def _spans(size: int) -> Iterator[tuple[int, int]]:
    return ((low, min(low + CHUNK, size)) for low in range(0, size, CHUNK))


def _fill_chunk(out: Tensor, distribution: Distribution, key: int, start: int) -> Tensor:
    per_word = _PER_WORD[distribution]
    first, skipped = divmod(start, per_word)
    words = _words(key, first, -(-(skipped + out.numel()) // per_word), out.device)
    if distribution == "gaussian":
        # Signed, from −32 768: the same order as the quantiles'.
        places = words.view(torch.int16).to(torch.int32).add_(32_768)[skipped : skipped + out.numel()]
        if out.dtype == torch.float32:
            return torch.index_select(_quantiles(out.device), 0, places, out=out)
        values = torch.index_select(_quantiles(out.device), 0, places)
    else:
        places = words.view(torch.uint8).to(torch.int32)
        values = torch.index_select(_signs(out.device), 0, places).view(-1)[skipped : skipped + out.numel()]
    return out.copy_(values)


def _words(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """``count`` words of a stream from its word ``first`` on, int64."""
    words = _steps(device)[:count] + _signed(key + (first + 1) * _GAMMA)
    words.bitwise_xor_(_shifted(words, 30)).mul_(_signed(_FIRST))
    words.bitwise_xor_(_shifted(words, 27)).mul_(_signed(_SECOND))
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shifted to the right, with zeros from the left: torch's shift of an int64 keeps the sign."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of ``value`` modulo 2⁶⁴."""
    return (value + 2**63 & _MASK) - 2**63


@functools.cache
def _steps(device: torch.device) -> Tensor:
    """0, γ, 2γ, … modulo 2⁶⁴, one for each word that a chunk may touch."""
    return (torch.arange(CHUNK // 4 + 1) * _signed(_GAMMA)).to(device)


@functools.cache
def _signs(device: torch.device) -> Tensor:
    """For each byte the signs of its bits, from the lowest, shape (256, 8)."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (bits * 2.0 - 1.0).to(device)


@functools.cache
def _quantiles(device: torch.device) -> Tensor:
    """The 65 536 values of a gaussian, sorted."""
    normal = statistics.NormalDist()
    upper = torch.tensor([normal.inv_cdf((j + 0.5) / 65_536) for j in range(32_768, 65_536)], dtype=torch.float64)
    quantiles = torch.cat([upper.flip(0).neg(), upper])
    scaled = quantiles / quantiles.square().mean().sqrt()
    # On a grid that is far coarser than what two mathematical libraries differ by.
    table = ((scaled * 2**20).round() / 2**20).float()
    found = hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest()
    if found != _QUANTILES_SHA256:
        raise RuntimeError(f"this machine's normal quantiles have digest {found}, and must have {_QUANTILES_SHA256}")
    return table.to(device)
