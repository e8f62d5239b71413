"""Asynchronous methods: no barrier; each node has rounds of its own."""

from algorithms.asynchronous.fedbuff import FedBuff

__all__ = ["FedBuff"]
