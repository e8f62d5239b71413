"""The compressor interface: average a gradient in exchanges of its own. Each compressor has a module of its own."""

from starling.algorithms.compressors.base import Compressor

__all__ = ["Compressor"]
