"""Random streams by name: a seed is a hash of what it is for.

Streams that are numbered (``seed + node``) meet again as ``seed + 1``, ``node − 1``. Hashed labels do not, and a new
purpose shifts none of the others::

    generator("partition", seed)
    generator("epoch", seed, node, epoch)

The global generators are never used: what a draw gives must not depend on who else drew.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*labels: int | str) -> int:
    """Derive a 63-bit seed from ``labels``, equal on all machines; 1 and "1" are different labels.

    >>> derive_seed("partition", 0)
    7012597396184491732
    """
    digest = hashlib.sha256(repr(labels).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*labels: int | str) -> torch.Generator:
    """Return a fresh CPU generator, seeded by ``labels``; torch's CPU generator uses the low 32 bits."""
    return torch.Generator().manual_seed(derive_seed(*labels))
