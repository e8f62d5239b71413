"""Codecs: what an exchanged tensor looks like as bytes."""

from starling.algorithms.codecs.base import Codec, Identity, exchange_codecs
from starling.algorithms.codecs.feedback import refuse_lossy
from starling.algorithms.codecs.fp4 import FP4
from starling.algorithms.codecs.half import BFloat16, Float16
from starling.algorithms.codecs.int8 import Int8
from starling.algorithms.codecs.qsgd import QSGD
from starling.algorithms.codecs.random_k import RandomK
from starling.algorithms.codecs.sign import Sign
from starling.algorithms.codecs.top_k import TopK

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
