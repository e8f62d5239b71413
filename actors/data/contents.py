"""Evidence of what data hold: bytes at fixed places, so that an edit is noticed that leaves counts and sizes alone.

Data of at most ``MOST_BYTES`` are taken whole. Larger data are sampled in evenly spread blocks, the first and the last
of a file among them; of very many files an evenly spread selection is taken. The cost is bounded for data of any size:
``MOST_BYTES``, and a block for each opened file. There are as many reads as the file system answers in a second or two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from pyarrow.fs import FileSystem

MOST_BYTES = 32 * 2**20
BLOCK_BYTES = 512 * 2**10

_LOCAL_READS, _REMOTE_READS = 2048, 64
"""An object store takes tens of milliseconds for each."""


def places(size: int, most: int, reads: int = _LOCAL_READS) -> list[tuple[int, int]]:
    """Return start and length of the pieces of ``size`` bytes to look at: some ``most`` bytes, in at most ``reads``.

    >>> places(1000, 1000)
    [(0, 1000)]
    >>> places(10 * BLOCK_BYTES, 2 * BLOCK_BYTES) == [(0, BLOCK_BYTES), (9 * BLOCK_BYTES, BLOCK_BYTES)]
    True
    """
    if size <= max(most, BLOCK_BYTES):
        return [(0, size)]
    count = max(1, min(most // BLOCK_BYTES, reads))
    last = size - BLOCK_BYTES
    # One alone is the last: formats with a footer have their sums and bounds there.
    return [(last * place // (count - 1) if count > 1 else last, BLOCK_BYTES) for place in range(count)]


def of_memory(values: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Pieces of what is in memory, or mapped into it."""
    yield np.frombuffer(str(len(values)).encode(), dtype=np.uint8)
    for start, length in places(len(values), MOST_BYTES):
        yield values[start : start + length]


def of_files(filesystem: FileSystem, paths: Sequence[str]) -> Iterator[bytes]:
    """Pieces of files; their names do not count, as machines may have them elsewhere.

    Raises:
        OSError: one cannot be read.
    """
    reads = _LOCAL_READS if filesystem.type_name == "local" else _REMOTE_READS
    step = max(1.0, len(paths) / reads)
    chosen = [paths[int(place * step)] for place in range(min(len(paths), reads))]
    infos = filesystem.get_file_info(chosen)
    whole = sum(info.size or 0 for info in infos)
    for info in infos:
        size = info.size or 0
        share = size if whole <= MOST_BYTES else MOST_BYTES * size // whole
        yield str(size).encode()
        with filesystem.open_input_file(info.path) as file:
            for start, length in places(size, share, max(1, reads // len(chosen))):
                yield file.read_at(length, start)
