"""The aggregator interface: how contributions combine into one. Each rule has a module of its own."""

from starling.algorithms.aggregators.base import Aggregator, Mean

__all__ = ["Aggregator", "Mean"]
