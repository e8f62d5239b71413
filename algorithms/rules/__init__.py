"""Rules: what wraps a node's gradient function."""

from algorithms.rules.base import DataBatch, GradientFunction, LocalProblem, Rule, Sampler

__all__ = ["DataBatch", "GradientFunction", "LocalProblem", "Rule", "Sampler"]
