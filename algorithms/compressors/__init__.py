"""Compressors: how a gradient is averaged over all nodes without being sent whole, in several exchanges if need be."""

from starling.algorithms.compressors.base import Compressor
from starling.algorithms.compressors.powersgd import PowerSGD

__all__ = ["Compressor", "PowerSGD"]
