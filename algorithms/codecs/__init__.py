"""The codec interface: an exchanged tensor as bytes. Each codec has a module of its own."""

from starling.algorithms.codecs.base import Codec, Identity, exchange_codecs
from starling.algorithms.codecs.feedback import refuse_lossy

__all__ = ["Codec", "Identity", "exchange_codecs", "refuse_lossy"]
