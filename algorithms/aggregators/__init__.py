"""Aggregators: how contributions combine into one."""

from starling.algorithms.aggregators.base import Aggregator, Mean, Uniform
from starling.algorithms.aggregators.robust import Median, TrimmedMean

__all__ = ["Aggregator", "Mean", "Median", "TrimmedMean", "Uniform"]
