"""Asynchronous methods: no barrier; each node has rounds of its own."""

from algorithms.asynchronous.async_diloco import AsyncDiLoCo
from algorithms.asynchronous.fedbuff import FedBuff

__all__ = ["AsyncDiLoCo", "FedBuff"]
