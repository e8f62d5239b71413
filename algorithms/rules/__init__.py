"""The rule interface: wrap a node's gradient function. Each rule has a module of its own."""

from starling.algorithms.rules.base import BatchSampler, DataBatch, GradientFunction, LocalProblem, Rule

__all__ = ["BatchSampler", "DataBatch", "GradientFunction", "LocalProblem", "Rule"]
