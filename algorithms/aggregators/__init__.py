"""Aggregators: how contributions combine into one."""

from algorithms.aggregators.base import Aggregator, Mean, Uniform
from algorithms.aggregators.robust import Median, TrimmedMean

__all__ = ["Aggregator", "Mean", "Median", "TrimmedMean", "Uniform"]
