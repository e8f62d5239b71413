"""Rules: what wraps a node's gradient function."""

from starling.algorithms.rules.base import DataBatch, GradientFunction, LocalProblem, Rule, Sampler
from starling.algorithms.rules.control_variate import ControlVariate
from starling.algorithms.rules.proximal import Proximal

__all__ = ["ControlVariate", "DataBatch", "GradientFunction", "LocalProblem", "Proximal", "Rule", "Sampler"]
