"""Codecs: what an exchanged tensor looks like as bytes."""

from algorithms.codecs.base import Codec, Identity, exchange_codecs
from algorithms.codecs.feedback import refuse_lossy
from algorithms.codecs.fp4 import FP4
from algorithms.codecs.half import BFloat16, Float16
from algorithms.codecs.int8 import Int8
from algorithms.codecs.qsgd import QSGD
from algorithms.codecs.random_k import RandomK
from algorithms.codecs.sign import Sign
from algorithms.codecs.top_k import TopK

__all__ = [
    "FP4",
    "QSGD",
    "BFloat16",
    "Codec",
    "Float16",
    "Identity",
    "Int8",
    "RandomK",
    "Sign",
    "TopK",
    "exchange_codecs",
    "refuse_lossy",
]
