"""Asynchronous methods: no barrier; each node has rounds of its own."""

from starling.algorithms.asynchronous.async_diloco import AsyncDiLoCo
from starling.algorithms.asynchronous.fedbuff import FedBuff

__all__ = ["AsyncDiLoCo", "FedBuff"]
