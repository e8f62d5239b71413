"""Codecs: what an exchanged tensor looks like as bytes."""

from algorithms.codecs.base import Codec, Identity

__all__ = ["Codec", "Identity"]
