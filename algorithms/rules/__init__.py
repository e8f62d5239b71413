"""Rules: what wraps a node's gradient function."""

from algorithms.rules.base import DataBatch, GradientFunction, LocalProblem, Rule, Sampler
from algorithms.rules.control_variate import ControlVariate
from algorithms.rules.proximal import Proximal

__all__ = ["ControlVariate", "DataBatch", "GradientFunction", "LocalProblem", "Proximal", "Rule", "Sampler"]
