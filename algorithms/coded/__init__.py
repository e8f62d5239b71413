"""Coded methods: data are computed more than once, so that nobody waits for stragglers and nothing is missing."""

from starling.algorithms.coded.gradient_coding import GradientCoding

__all__ = ["GradientCoding"]
