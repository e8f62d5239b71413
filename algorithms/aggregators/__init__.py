"""Aggregators: how contributions combine into one."""

from algorithms.aggregators.base import Aggregator, Mean

__all__ = ["Aggregator", "Mean"]
