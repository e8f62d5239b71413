"""Codecs: what an exchanged tensor looks like as bytes."""

from algorithms.codecs.base import Codec, Identity
from algorithms.codecs.half import BFloat16, Float16
from algorithms.codecs.int8 import Int8

__all__ = ["BFloat16", "Codec", "Float16", "Identity", "Int8"]
