"""Fragments: the parts of a model that are exchanged together."""

from __future__ import annotations

import functools
import itertools
import re
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from starling.algorithms.errors import SettingsError

if TYPE_CHECKING:
    from starling.algorithms.layout import Layout, LayoutEntry

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Places in the flat parameters, from start to stop, ascending and disjoint."""

Pattern: TypeAlias = Literal["auto", "strided", "sequential", "size"]


@functools.lru_cache(maxsize=16)
def fragments_of(layout: Layout, count: int, pattern: Pattern) -> tuple[Ranges, ...]:
    """Divide a model's values into ``count`` fragments.

    ``strided`` and ``sequential`` divide its blocks, which are the modules in numbered lists: of L blocks fragment p
    has p, p + F, p + 2F, …, or the p-th run. Tensors outside of blocks, an embedding say, go one by one to the fragment
    that is smallest by then. ``size`` cuts the flat parameters into equal parts, whatever they are. ``auto`` is strided
    where there are as many blocks as fragments, and else size.

    Raises:
        SettingsError: there is less to divide than there are fragments.
    """
    blocks = list(dict.fromkeys(entry.block for entry in layout.entries if _is_numbered(entry)))
    if pattern == "auto":
        pattern = "size" if len(blocks) < count else "strided"
    if pattern == "size":
        if layout.num_values < count:
            raise SettingsError(
                f"algorithm.fragments: {count} fragments of {layout.num_values} parameters; take no more fragments"
            )
        bounds = [layout.num_values * part // count for part in range(count + 1)]
        return tuple(((start, stop),) for start, stop in itertools.pairwise(bounds))
    if len(blocks) < count:
        there = f"this model has {len(blocks)}, and algorithm.fragments is {count}"
        cure = "set algorithm.pattern: size" + (", or take fewer fragments" if blocks else "")
        raise SettingsError(f"algorithm.pattern: {pattern} divides blocks (numbered modules); {there}: {cure}")
    if pattern == "strided":
        owner = {block: place % count for place, block in enumerate(blocks)}
    else:
        owner = {block: place * count // len(blocks) for place, block in enumerate(blocks)}
    owned: list[list[LayoutEntry]] = [[] for _ in range(count)]
    for entry in layout.entries:
        if entry.block in owner:
            owned[owner[entry.block]].append(entry)
    sizes = [sum(entry.stop - entry.start for entry in entries) for entries in owned]
    for entry in layout.entries:
        if entry.block not in owner:
            smallest = sizes.index(min(sizes))
            owned[smallest].append(entry)
            sizes[smallest] += entry.stop - entry.start
    return tuple(_merged(entries) for entries in owned)


def modules_of(layout: Layout) -> tuple[Ranges, ...]:
    """Return the ranges of the model's modules, in order of definition: a block is one module, or else a tensor."""
    owned: dict[str, list[LayoutEntry]] = {}
    for entry in layout.entries:
        owned.setdefault(entry.block or entry.name, []).append(entry)
    return tuple(_merged(entries) for entries in owned.values())


def size_of(ranges: Ranges) -> int:
    """Return the number of values in ``ranges``.

    >>> size_of(((0, 3), (5, 6)))
    4
    """
    return sum(stop - start for start, stop in ranges)


def gather(flat: Tensor, ranges: Ranges) -> Tensor:
    """Return a copy of the values in ``ranges`` of a flat tensor, shape (n,)."""
    return torch.cat([flat[start:stop] for start, stop in ranges])


def scatter(values: Tensor, flat: Tensor, ranges: Ranges) -> None:
    """Write ``values``, shape (n,), to ``ranges`` of a flat tensor."""
    place = 0
    for start, stop in ranges:
        flat[start:stop].copy_(values[place : place + stop - start])
        place += stop - start


def to_host(values: Tensor) -> Tensor:
    """Return ``values`` on the CPU; from a GPU through page-locked memory, at the speed of the bus."""
    if not values.is_cuda:
        return values
    staged = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    staged.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return staged


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return ``values`` on ``device``; a copy to a GPU is queued, and the program does not wait for it."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _is_numbered(entry: LayoutEntry) -> bool:
    return re.search(r"(^|\.)\d+$", entry.block) is not None


def _merged(entries: list[LayoutEntry]) -> Ranges:
    ranges: list[tuple[int, int]] = []
    for entry in sorted(entries, key=lambda one: one.start):
        if ranges and ranges[-1][1] == entry.start:
            ranges[-1] = (ranges[-1][0], entry.stop)
        else:
            ranges.append((entry.start, entry.stop))
    return tuple(ranges)
